"""Measures the engine, fits latency laws, and ships the profiles that came out. Importing this package imports no torch."""
