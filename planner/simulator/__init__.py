"""The SimPy model: what an allocation does to a workload, request by request. All published numbers come from it."""

from planner.simulator.mechanisms import mechanisms_in_use
from planner.simulator.model import simulate
from planner.simulator.result import ProfileFacts, SimulationResult
from planner.simulator.start_state import Held, StartState
from planner.simulator.world import World

__all__ = ["Held", "ProfileFacts", "SimulationResult", "StartState", "World", "mechanisms_in_use", "simulate"]
