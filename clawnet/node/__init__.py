"""The node: a state machine without I/O. `kernel.Node.step(now, stimulus)` returns the effects the runtime performs."""
