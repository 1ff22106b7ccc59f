"""The process that compiles grammars. What clients send is compiled by native code, which may take
for ever, take all memory or crash: here it can be ended without harm.

Started with the number of an open socket and a limit in seconds. Receives the vocabulary, answers
"ready", then answers each source with "+" and the compiled grammar or "-" and the reason. Ends
itself when a source takes too long, or when nobody is left to ask.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from tempfile import TemporaryFile

import numpy as np
import psutil
import xgrammar

from sl_serve.constraints import allowed_ids
from sl_serve.grammar.matcher import tokenizer_info
from sl_serve.grammar.vocabulary import Vocabulary

MAX_MEMORY_BYTES = 1 << 30  # beyond what the libraries take
MAX_COMPILED_BYTES = 64 << 20
N_THREADS = 2
WALK_TOKENS = 48
MAX_WALK_STEP_S = 1.0  # of processor time; a mask takes well under a millisecond
NICENESS = 10


class UnusableGrammarError(Exception):
    """It compiles, and yet no output can follow it."""


def main(connection: Connection, max_compile_s: float) -> None:
    vocabulary = Vocabulary.load(connection.recv_bytes())
    compiler = xgrammar.GrammarCompiler(
        tokenizer_info(vocabulary), max_threads=N_THREADS, cache_enabled=False
    )
    limit_bytes = psutil.Process().memory_info().vms + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    os.nice(NICENESS)
    connection.send_bytes(b"ready")
    while True:
        try:
            source = connection.recv_bytes()
        except EOFError:
            return
        # Processor time. Nobody handles the signal: it ends the process, native code or not.
        signal.setitimer(signal.ITIMER_PROF, max_compile_s)
        answer = compiled(compiler, vocabulary, source.decode())
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(answer)


def compiled(compiler: xgrammar.GrammarCompiler, vocabulary: Vocabulary, source: str) -> bytes:
    try:
        with no_warnings():
            grammar = compiler.compile_structural_tag(source)
        if grammar.memory_size_bytes > MAX_COMPILED_BYTES:
            raise UnusableGrammarError(f"it takes more than {MAX_COMPILED_BYTES >> 20} MiB")
        walk(grammar, vocabulary)
        return b"+" + str(grammar.serialize_json()).encode()
    except MemoryError:
        return b"-it takes too much memory"
    except Exception as error:  # whatever is wrong with it, the client is told
        return b"-" + reason_of(error).encode()


@contextmanager
def no_warnings() -> Iterator[None]:
    """The compiler warns, on the standard error stream, of what it leaves out: that is an error."""
    with TemporaryFile() as written, _standard_error_to(written.fileno()):
        yield
        written.seek(0)
        for line in written.read().decode(errors="replace").splitlines():
            if "Warning: " in line:
                raise UnusableGrammarError(line.partition("Warning: ")[2])


@contextmanager
def _standard_error_to(file: int) -> Iterator[None]:
    before = os.dup(2)
    os.dup2(file, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def walk(grammar: xgrammar.CompiledGrammar, vocabulary: Vocabulary) -> None:
    """Some random output, as far as it goes: a grammar without a beginning or with slow masks
    shows here, and not in the engine."""
    matcher = xgrammar.GrammarMatcher(grammar)
    rng = random.Random(0)
    for i in range(WALK_TOKENS):
        mask = np.full((1, vocabulary.n_words), -1, np.int32)
        started_s = time.thread_time()
        matcher.fill_next_token_bitmask(mask)
        if time.thread_time() - started_s > MAX_WALK_STEP_S:
            raise UnusableGrammarError("it is too ambiguous: finding the next tokens takes seconds")
        ids = np.flatnonzero(allowed_ids(mask[0], len(vocabulary.tokens)))
        if not len(ids) and i == 0:
            raise UnusableGrammarError("no text of this model's tokens follows it")
        if not len(ids):
            return
        matcher.accept_token(int(rng.choice(ids)))
        if matcher.is_terminated():
            return


def reason_of(error: Exception) -> str:
    """The first line, without the place in native code where it was found."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line[line.rfind("] ") + 1 :].strip()[:300]


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), float(sys.argv[2]))
