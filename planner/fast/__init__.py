"""The compiled tier of the simulator, for search and for answers while a slider moves: static allocations, the SimPy model's
events in the same order and its latencies to 1e-9. Published numbers come from ``planner.simulator``.
"""

from planner.fast.flat import FlatWorkload, flatten
from planner.fast.refusal import NotModelledError
from planner.fast.run import FastRun, Prepared, prepare, simulate_fast

__all__ = ["FastRun", "FlatWorkload", "NotModelledError", "Prepared", "flatten", "prepare", "simulate_fast"]
