"""The SimPy model: what an allocation does to a workload, request by request. All published numbers come from it."""

from planner.simulator.model import simulate
from planner.simulator.result import ProfileFacts, SimulationResult

__all__ = ["ProfileFacts", "SimulationResult", "simulate"]
