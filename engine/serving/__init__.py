"""The process in front of the workers: accepts jobs, starts and watches worker processes, hands jobs out. Torch-free."""
