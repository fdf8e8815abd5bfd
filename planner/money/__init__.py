"""What a plan is worth: its full cost, the value of lower latency, and the return on changing, each with its uncertainty."""
