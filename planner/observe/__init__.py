"""What a serving engine did, read back: its records as the tables of :mod:`traces.records`, or a Prometheus server's counters as windows."""
