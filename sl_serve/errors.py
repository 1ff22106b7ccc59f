"""Every error this package raises on purpose.

    SlServeError
    ├── UserError            the message is for the user: one sentence, with the numbers
    │   ├── ModelError       the model cannot be found, read or run        (exit code 2)
    │   │   └── CheckpointError   a file of it is damaged or hostile
    │   ├── MemoryBudgetError     it does not fit, by how much, and what would help
    │   └── RequestError     one request asks for something impossible     (HTTP 400)
    ├── WeightReadError      weights on disk became unreadable while running
    ├── QueueFullError       try again later                               (HTTP 429)
    ├── EngineClosedError    draining or closed                            (HTTP 503)
    └── EngineDeadError      the engine failed; carries the reason         (HTTP 500)

`assert` stands for our own bugs and is never the answer to input.
"""

from __future__ import annotations


class SlServeError(Exception):
    """Root of the tree."""


class UserError(SlServeError):
    """Something the user can mend; printed without a traceback."""


class ModelError(UserError):
    """The model cannot be found, read or run."""


class CheckpointError(ModelError):
    """A model file is truncated, inconsistent or of an unknown kind."""


class MemoryBudgetError(UserError):
    """What is asked for does not fit into memory."""


class RequestError(UserError):
    """A request that can never be served as it stands. `param` names the field."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class WeightReadError(SlServeError):
    """A file that holds layers ends too early, or its disk fails. Which, where, and what to do."""


class QueueFullError(SlServeError):
    """The waiting queue is full; `retry_after_s` estimates when it will not be."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineClosedError(SlServeError):
    """The engine is draining or closed and takes no new requests."""


class EngineDeadError(SlServeError):
    """The engine thread failed; every present and later request gets this with the reason."""
