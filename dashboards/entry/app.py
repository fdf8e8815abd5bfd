"""The script that Streamlit runs for every visitor and every change; everything it shows is in :mod:`dashboards.frame`.

It stands in a folder of its own because Streamlit takes a folder ``pages`` beside its script for scripts to be run by themselves.
"""

from dashboards.frame import show

show()
