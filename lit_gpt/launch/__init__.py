"""Processes, signals and nodes: how a run comes up, is asked to stop, and is ended when it hangs."""
