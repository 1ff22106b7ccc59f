"""The OpenAI-compatible HTTP front. Knows the engine by the names in `engine_port` only.

A request: route -> convert (off the loop) -> submit -> news -> stream or collect;
a client that goes away aborts what it asked for.
"""
