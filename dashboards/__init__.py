"""The Streamlit page: reads what the user chose, asks the planner, draws the answer. Decides nothing by itself."""
