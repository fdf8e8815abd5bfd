"""The line between a base worker and a ControlNet worker: messages over a socket, tensors over shared memory or a process group."""
