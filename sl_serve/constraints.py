"""The seam between sampling and whatever says which tokens an output may go on with."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

PackedMask = npt.NDArray[np.int32]


class Constraint(Protocol):
    """What one output may be. Its state follows from the tokens that were accepted, in order, and
    from nothing else: a request that was parked goes on where it stopped."""

    def mask(self) -> PackedMask | None:
        """The tokens that may come next, (vocabulary / 32, rounded up): bit i % 32 of word i // 32
        is token i's. None: any may. Waits until it is known; never raises."""
        ...

    def accept(self, token_id: int) -> None:
        """Once for every token of the output."""
        ...

    @property
    def is_done(self) -> bool:
        """Nothing but the end can follow."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the output cannot be constrained any longer."""
        ...


def allowed_ids(mask: PackedMask, vocab_size: int) -> npt.NDArray[np.bool_]:
    """(vocabulary,): the mask, one boolean a token."""
    bits = np.unpackbits(mask.astype("<i4", copy=False).view(np.uint8), bitorder="little")
    return bits[:vocab_size].view(np.bool_)
