"""Decisions the engine and the simulator share: plain functions over arrays and scalars, with time and randomness injected.

They import nothing but the standard library and numpy, hold no state, and keep to the subset of Python that numba compiles.
"""
