"""HTTP in front of the engine: the images API, health, metrics, tenants, traffic splits."""
