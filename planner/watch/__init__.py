"""Whether a serving engine still does what was planned: sequential tests of live windows against the plan's simulated run."""
