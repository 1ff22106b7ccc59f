"""The order of a step's halves, as data."""

from __future__ import annotations

from itertools import product

import pytest

from sl_serve.halves import halves


def written(n_layers: int, is_beside: list[bool]) -> str:
    """A and B with the number of the sub-batch; / where a layer has ended."""
    names = (
        ("A" if h.is_first else "B") + str(h.part) + "/" * h.ends_layer
        for h in halves(n_layers, is_beside)
    )
    return " ".join(names)


def test_the_device_attends() -> None:
    assert written(2, [False] * 3) == "A0 B0 A1 B1 A2 B2/ A0 B0 A1 B1 A2 B2/"


def test_the_processor_attends_a_layer_behind() -> None:
    assert written(2, [True] * 3) == "A0 A1 A2 B0 A0 B1 A1 B2/ A2 B0 B1 B2/"


def test_one_sub_batch_waits() -> None:
    assert written(3, [True]) == "A0 B0/ A0 B0/ A0 B0/"


def test_both_kinds() -> None:
    assert written(2, [False, True, False]) == "A0 B0 A1 A2 B2 A0 B0 B1/ A1 A2 B2 B1/"


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_order_can_be_computed(n: int) -> None:
    """Halves of a sub-batch alternate, layer by layer; at most two layers are in use."""
    n_layers = 4
    for is_beside in product([False, True], repeat=n):
        done = [0] * n  # halves of each sub-batch
        begun = ended = 0
        for half in halves(n_layers, is_beside):
            assert divmod(done[half.part], 2) == (half.layer, 0 if half.is_first else 1)
            done[half.part] += 1
            begun = max(begun, half.layer + 1)
            ended += half.ends_layer
            assert begun - ended <= 2
            if half.ends_layer:
                assert half.layer == ended - 1 and min(done) >= 2 * ended
        assert done == [2 * n_layers] * n and ended == n_layers
