"""How large a step may be after memory ran short in one."""

from __future__ import annotations

import sys

GOOD_STEPS = 32  # before twice as much is tried: a step in vain costs a thirtieth of the time


class StepLimit:
    """Half the tokens of the step that failed; half of that if it fails too. Doubled after every
    GOOD_STEPS that succeed, and gone once a step of the size that failed may be tried again."""

    def __init__(self) -> None:
        self._failed_tokens = 0  # of the largest step that failed since there was no limit
        self._n_good = 0
        self.tokens = sys.maxsize

    def halve(self, n_tokens: int) -> None:
        """A step of n_tokens, at least two, failed."""
        self._failed_tokens = max(self._failed_tokens, n_tokens)
        self._n_good = 0
        self.tokens = n_tokens // 2

    def passed(self) -> None:
        """A step succeeded."""
        if self.tokens == sys.maxsize:
            return
        self._n_good += 1
        if self._n_good == GOOD_STEPS:
            self._n_good = 0
            self.tokens *= 2
        if self.tokens >= self._failed_tokens:
            self.lift()

    def lift(self) -> None:
        """What made steps fail is gone."""
        self._failed_tokens = self._n_good = 0
        self.tokens = sys.maxsize
