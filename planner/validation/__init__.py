"""How well a simulation agrees with an engine: the same trace and allocation, two logs, joined by request id."""
