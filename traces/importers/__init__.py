"""Other people's request logs as traces."""
