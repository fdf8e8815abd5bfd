"""The script that Streamlit runs for every visitor and every change; everything it shows is in :mod:`dashboards.page`."""

from dashboards.page import show

show()
