"""The order of a step: cells cut in two at their attention, as one flat sequence.

    attended to by the device          A0 B0 A1 B1 A2 B2 | A0 B0 A1 ...
    beside it, by the processor        A0 A1 A2 | B0 A0 B1 A1 B2 A2 | B0 A0 ... | B0 B1 B2

A is what comes before attention, B what comes after, the number is the sub-batch, | a new layer.
In the second order the processor has a layer's time for each sub-batch, and the device always the
others to go on with. With one sub-batch both are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Half(NamedTuple):
    layer: int
    part: int  # which sub-batch
    is_first: bool  # up to attention
    ends_layer: bool  # no other half needs the layer after this one


def halves(n_layers: int, is_beside: Sequence[bool]) -> Iterator[Half]:
    """`is_beside`: of each sub-batch, whether its attention runs beside the device's cells.

    A layer is begun when at most the one before it has not ended.
    """
    n = len(is_beside)
    last = max((part for part in range(n) if is_beside[part]), default=n - 1)
    for layer in range(n_layers):
        for part in range(n):
            if is_beside[part] and layer:
                yield Half(layer - 1, part, False, part == last)
            yield Half(layer, part, True, False)
            if not is_beside[part]:
                yield Half(layer, part, False, part == last)
    for part in range(n):
        if is_beside[part]:
            yield Half(n_layers - 1, part, False, part == last)
