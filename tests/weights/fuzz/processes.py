"""Judges many cases in child processes, and notices when one of them dies."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import NamedTuple

import psutil

BATCH_CASES = 500
PATIENCE = 6  # on a machine that has other work too


class Verdict(NamedTuple):
    number: int
    accepted: bool
    failure: str = ""  # what should not have happened, in full


Judge = Callable[[int], Verdict]


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one case."""

    time_s: float = 10.0  # of processor time, or PATIENCE times as long
    memory_bytes: int = 1 << 30  # of addresses, beside those of a process that has done nothing


def verdicts(
    judge: Judge, numbers: range, n_processes: int, limits: Limits | None = None
) -> Iterator[Verdict]:
    """One for each number, as they come. A case that ends its process has failed; the cases after
    it go to another process. `judge` is pickled."""
    limits = limits or Limits()
    waiting = deque(numbers[i : i + BATCH_CASES] for i in range(0, len(numbers), BATCH_CASES))
    running: dict[Connection, _Batch] = {}
    try:
        while waiting or running:
            while waiting and len(running) < n_processes:
                batch = _Batch.start(judge, waiting.popleft(), limits)
                running[batch.receiver] = batch
            for receiver in wait(list(running)):
                assert isinstance(receiver, Connection)
                batch = running[receiver]
                verdict = batch.next_verdict()
                if verdict is not None:
                    yield verdict
                    continue
                del running[receiver]
                if batch.left:
                    yield Verdict(batch.left[0], False, batch.cause_of_death(limits))
                    if rest := batch.left[1:]:
                        waiting.appendleft(rest)
    finally:
        for batch in running.values():
            batch.process.kill()


@dataclass
class _Batch:
    process: ForkServerProcess
    receiver: Connection
    left: range

    @classmethod
    def start(cls, judge: Judge, numbers: range, limits: Limits) -> _Batch:
        # Forked from a process that has imported all this and has one thread.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sl_serve.stored_model"])
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(judge, numbers, limits, sender), daemon=True)
        process.start()
        sender.close()  # so that the pipe ends when the process does
        return cls(process, receiver, numbers)

    def next_verdict(self) -> Verdict | None:
        """None: the process has ended."""
        try:
            verdict: Verdict = self.receiver.recv()
        except EOFError:
            self.receiver.close()
            self.process.join()
            return None
        self.left = self.left[1:]
        return verdict

    def cause_of_death(self, limits: Limits) -> str:
        code = self.process.exitcode
        if code in (-signal.SIGPROF, -signal.SIGALRM):
            return f"not done within {limits.time_s} s"
        if code is not None and code < 0:
            return f"the process was ended by {signal.Signals(-code).name}"
        return f"the process ended with exit code {code}"


def _work(judge: Judge, numbers: range, limits: Limits, sender: Connection) -> None:
    n_bytes = psutil.Process().memory_info().vms + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        signal.setitimer(signal.ITIMER_PROF, limits.time_s)  # their signals end the process
        signal.setitimer(signal.ITIMER_REAL, PATIENCE * limits.time_s)
        sender.send(judge(number))
