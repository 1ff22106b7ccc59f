"""Outputs of a given form: what clients ask for, compiled in a process of its own, kept to token
by token while the engine runs."""
