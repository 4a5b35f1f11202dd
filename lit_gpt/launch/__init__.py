"""Processes, signals and nodes: how a run starts, is asked to stop, and is ended when it hangs."""
