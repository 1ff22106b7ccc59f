"""The requests under way, by id: who is told what, and when an id is free again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection

from sl_serve.core import FinishReason, Request, TokenOut
from sl_serve.delivery import Delivery
from sl_serve.errors import RequestError
from sl_serve.logits import RowResult

logger = logging.getLogger(__name__)


class Deliveries:
    """Any thread may add, remove and abort; the engine thread takes out what is aborted, feeds and
    ends. `changed` guards what both touch, and is notified of each end."""

    def __init__(self, changed: threading.Condition, release: Callable[[Request], None]) -> None:
        """`release` gives back the memory of a request; called before its owner hears of its end,
        so that an owner who does finds id and memory free."""
        self._changed = changed
        self._release = release
        self._by_id: dict[str, Delivery] = {}
        self._aborted: set[str] = set()
        self._is_telling_last = False  # to an owner whose request has left `_by_id`

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def all_heard(self) -> bool:
        """Every request has ended, and every owner has heard of it."""
        return not self._by_id and not self._is_telling_last

    # Called from any thread.

    def add(self, new: Collection[Delivery]) -> None:
        """All or none. Raises RequestError where an id is under way or given twice."""
        by_id = {delivery.request.request_id: delivery for delivery in new}
        with self._changed:
            taken = self._by_id.keys() & by_id.keys()
            if taken or len(by_id) < len(new):
                raise RequestError(f"request id {taken or 'given twice'} is in use", "request_id")
            self._by_id |= by_id

    def remove(self, untold: Collection[Delivery]) -> None:
        """Of requests that never came as far as the queue."""
        with self._changed:
            for delivery in untold:
                del self._by_id[delivery.request.request_id]

    def abort(self, request_id: str) -> None:
        """Unknown ids are ignored."""
        with self._changed:
            if request_id in self._by_id:
                self._aborted.add(request_id)
                self._changed.notify_all()

    # Called from the engine thread.

    def take_aborted(self) -> list[Request]:
        """Those aborted since the last time; `end` is yet to be called for each."""
        with self._changed:
            aborted = [self._by_id[request_id].request for request_id in self._aborted]
            self._aborted.clear()
        return aborted

    def feed(self, result: RowResult) -> None:
        """Tell the owner what a step had for one row."""
        request = result.work.request
        delivery = self._by_id[request.request_id]
        try:
            news = delivery.feed(result)
        except Exception as error:  # its constraint's or its detokenizer's: the others go on
            logger.exception("request %s: its output failed", request.request_id)
            news = delivery.end(FinishReason.ERROR, f"{type(error).__name__}: {error}")
        if news is not None and news.finish_reason is not None:
            self._tell_last(request, news)
        elif news is not None and not _is_heard(request, news):
            self._forget(request)

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        self._tell_last(request, self._by_id[request.request_id].end(reason, error))

    def end_all(self, error: str) -> None:
        for delivery in list(self._by_id.values()):
            self.end(delivery.request, FinishReason.ERROR, error)

    def _tell_last(self, request: Request, news: TokenOut) -> None:
        self._is_telling_last = True
        self._forget(request)
        _is_heard(request, news)
        with self._changed:
            self._is_telling_last = False
            self._changed.notify_all()

    def _forget(self, request: Request) -> None:
        self._release(request)
        with self._changed:
            del self._by_id[request.request_id]
            self._aborted.discard(request.request_id)  # the next request of this id is another
            self._changed.notify_all()


def _is_heard(request: Request, news: TokenOut) -> bool:
    try:
        request.on_output(news)
    except Exception:
        logger.exception("request %s: its receiver failed", request.request_id)
        return False
    return True
