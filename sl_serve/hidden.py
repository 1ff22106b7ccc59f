"""Hidden states of a step's tokens between its layers: on the device, or swapped through it.

A sub-batch's stay in one layer is a visit: number layer * n + sub-batch of n. The visits of a last
round, one more than there are layers, are the head's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch

from sl_serve.core import SubBatchPlan
from sl_serve.device import Device, Event, Stream

Embed = Callable[[SubBatchPlan], torch.Tensor]  # what enters the first layer, (T, hidden)


def n_hidden_buffers(look_ahead: int) -> int:
    """Of a sub-batch each, where hidden states are swapped: one is filled while another is computed
    with."""
    return min(look_ahead, 1) + 1


class HiddenStates(Protocol):
    stay: bool  # all of a step are there at a time: a visit may be opened before the last is closed

    @property
    def n_bytes_down(self) -> int:
        """Brought to the device so far."""

    @property
    def n_bytes_up(self) -> int:
        """Brought to the host so far."""

    def begin(self, sub_batches: Sequence[SubBatchPlan], embed: Embed) -> None:
        """Take in the step's sub-batches."""

    def open(self, visit: int) -> torch.Tensor:
        """(T, hidden) for the compute stream, to be changed in place; until the visit is closed.
        Visits are opened in order."""

    def close(self, visit: int) -> None:
        """The layer has been queued for these tokens."""

    def results(self) -> Iterable[torch.Tensor]:
        """After the last layer, sub-batch by sub-batch; each is used up before the next is taken,
        and all are taken."""

    def restart(self) -> None:
        """After a step that failed, of which nothing is under way: forget it."""


class ResidentHidden:
    """All of them stay where they are computed with."""

    stay = True
    n_bytes_down = n_bytes_up = 0

    def __init__(self) -> None:
        self._states: list[torch.Tensor] = []

    def begin(self, sub_batches: Sequence[SubBatchPlan], embed: Embed) -> None:
        self._states = [embed(s) for s in sub_batches]

    def open(self, visit: int) -> torch.Tensor:
        return self._states[visit % len(self._states)]

    def close(self, visit: int) -> None:
        pass

    def results(self) -> Iterable[torch.Tensor]:
        states, self._states = self._states, []
        return states

    def restart(self) -> None:
        self._states = []


class SwappedHidden:
    """In host memory, a line per token of the step, and buffers on the device, two with look-ahead,
    else one, for the sub-batches that pass through. For attention by the device: nothing else may
    run between the halves of a visit.

    Order. Visit v uses buffer v mod n_buffers. It is filled by its copy down, in the first round by
    the embedding; that waits for `free`, the event after what read the buffer last: the copy up of
    visit v - n_buffers, or the head's reading. The copy down also waits for `arrived`, the event
    after the copy up of the same sub-batch's visit before, v - n. Compute waits for `loaded`, and
    the copy up for compute. With look-ahead the copy of v + 1 is queued when v is opened: both
    visits that it waits for are closed by then if there are two sub-batches or more. One alone has
    to wait for itself.
    """

    stay = False

    def __init__(
        self,
        device: Device,
        dtype: torch.dtype,
        width: int,
        n_layers: int,
        max_tokens: int,
        max_step_tokens: int,
        look_ahead: int,
    ) -> None:
        """`max_tokens`: of a sub-batch."""
        self._device, self._dtype, self._width, self._n_layers = device, dtype, width, n_layers
        self._look_ahead = min(look_ahead, 1)
        line_bytes = width * dtype.itemsize
        self._host = device.host_empty(max_step_tokens * line_bytes)
        n_buffers = n_hidden_buffers(look_ahead)
        self._buffers = [device.empty(max_tokens * line_bytes) for _ in range(n_buffers)]
        self._free: list[Event | None] = [None] * n_buffers
        self._loaded: list[Event | None] = [None] * n_buffers
        self._sub_batches: Sequence[SubBatchPlan] = ()
        self._embed: Embed | None = None
        self._lines: list[torch.Tensor] = []  # uint8: of each sub-batch, on the host
        self._arrived: list[Event | None] = []  # of each sub-batch
        self._next_fetch = 0
        self.n_bytes_down = 0
        self.n_bytes_up = 0

    def begin(self, sub_batches: Sequence[SubBatchPlan], embed: Embed) -> None:
        self._sub_batches, self._embed = sub_batches, embed
        sizes = [s.n_tokens * self._width * self._dtype.itemsize for s in sub_batches]
        self._lines = list(torch.split_with_sizes(self._host[: sum(sizes)], sizes))
        self._arrived = [None] * len(sub_batches)
        self._next_fetch = len(sub_batches)

    def open(self, visit: int) -> torch.Tensor:
        n = len(self._sub_batches)
        states = self._in_buffer(visit).view(self._dtype).view(-1, self._width)
        if visit < n:
            self._enter(visit, states)
        else:
            self._fetch_to(visit)
            loaded = self._loaded[visit % len(self._buffers)]
            assert loaded is not None
            self._device.wait(Stream.COMPUTE, loaded)
        if n > 1:
            self._fetch_to(visit + self._look_ahead)
        return states

    def close(self, visit: int) -> None:
        index, part = visit % len(self._buffers), visit % len(self._lines)
        device, lines = self._device, self._lines[part]
        device.computed(0.0, (self._buffers[index],), "layer")
        device.wait(Stream.STORE, device.record(Stream.COMPUTE))
        device.copy(Stream.STORE, lines, self._in_buffer(visit), "hidden states")
        self._free[index] = self._arrived[part] = device.record(Stream.STORE)
        self.n_bytes_up += lines.nbytes

    def results(self) -> Iterator[torch.Tensor]:
        n = len(self._sub_batches)
        for visit in range(self._n_layers * n, (self._n_layers + 1) * n):
            yield self.open(visit)
            index = visit % len(self._buffers)
            self._device.computed(0.0, (self._buffers[index],), "head")
            self._free[index] = self._device.record(Stream.COMPUTE)

    def restart(self) -> None:
        """`begin` starts anew, and what its copies will wait for has happened."""

    def _in_buffer(self, visit: int) -> torch.Tensor:
        """The visit's bytes on the device."""
        n_bytes = self._lines[visit % len(self._lines)].nbytes
        return self._buffers[visit % len(self._buffers)][:n_bytes]

    def _enter(self, visit: int, states: torch.Tensor) -> None:
        assert self._embed is not None
        free = self._free[visit % len(self._buffers)]
        if free is not None:
            self._device.wait(Stream.COMPUTE, free)
        states.copy_(self._embed(self._sub_batches[visit]))

    def _fetch_to(self, visit: int) -> None:
        """Queue the copies down up to this visit's."""
        last = (self._n_layers + 1) * len(self._lines) - 1
        while self._next_fetch <= min(visit, last):
            self._fetch(self._next_fetch)
            self._next_fetch += 1

    def _fetch(self, visit: int) -> None:
        index, part = visit % len(self._buffers), visit % len(self._lines)
        for event in (self._free[index], self._arrived[part]):
            if event is not None:
                self._device.wait(Stream.LOAD, event)
        lines = self._lines[part]
        self._device.copy(Stream.LOAD, self._in_buffer(visit), lines, "hidden states")
        self._loaded[index] = self._device.record(Stream.LOAD)
        self.n_bytes_down += lines.nbytes
