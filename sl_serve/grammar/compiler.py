"""From a form that a client asks for to a grammar the engine can follow, remembered."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from sl_serve.constraints import PackedMask
from sl_serve.errors import RequestError, SlServeError
from sl_serve.grammar.forms import is_json
from sl_serve.grammar.mask_threads import MaskThreads
from sl_serve.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from xgrammar import TokenizerInfo

    from sl_serve.grammar.matcher import Grammar

MAX_COMPILE_S = 10.0  # of processor time
START_TIMEOUT_S = 120.0  # libraries are loaded, perhaps from a slow disk
ANSWER_TIMEOUT_S = 60.0  # the worker ends itself long before, unless the machine is overloaded
CACHE_BYTES = 256 << 20
# Line ends may stand between the parts of a JSON text. The others are nowhere allowed, but the
# compiler lets them into texts of limited length.
CONTROL = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]")
MAX_REMEMBERED = 1024  # grammars, and refusals


class CompilerProcess:
    """One worker. Raises SlServeError where it cannot be started."""

    def __init__(self, vocabulary: Vocabulary, max_compile_s: float) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [str(theirs.fileno()), str(max_compile_s)]
            self._process = subprocess.Popen(
                # -P: nothing is imported from wherever the server was started
                [sys.executable, "-P", "-m", "sl_serve.grammar.worker", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is for the server
            )
        self._connection = Connection(ours.detach())
        if self._exchange(vocabulary.dump(), START_TIMEOUT_S) is None:
            self.close()
            raise SlServeError("the process that compiles grammars does not start")

    def compile(self, source: str) -> bytes | None:
        """The worker's answer; None: it is no more."""
        return self._exchange(source.encode(), ANSWER_TIMEOUT_S)

    def end(self) -> None:
        """From any thread; whoever waits for an answer gets none."""
        self._process.kill()

    def close(self) -> None:
        self.end()
        self._process.wait()
        self._connection.close()

    def _exchange(self, message: bytes, timeout_s: float) -> bytes | None:
        try:
            self._connection.send_bytes(message)
            if self._connection.poll(timeout_s):
                return self._connection.recv_bytes()
        except (EOFError, OSError):
            pass
        return None


class Grammars:
    """All grammars for one vocabulary. `compile` may be called from any thread, and blocks.

    One source is compiled at a time, in a process that starts with the first one and again after
    it had to be ended. `read_vocabulary` is called then, too.
    """

    def __init__(
        self,
        read_vocabulary: Callable[[], Vocabulary],
        max_compile_s: float = MAX_COMPILE_S,
    ) -> None:
        self._read_vocabulary = read_vocabulary
        self._max_compile_s = max_compile_s
        self._compiled: OrderedDict[bytes, Grammar] = OrderedDict()
        self._refused: OrderedDict[bytes, str] = OrderedDict()
        self._memory = threading.Lock()  # guards what is remembered
        self._compiling = threading.Lock()  # guards what follows
        self._process: CompilerProcess | None = None
        self._vocabulary: Vocabulary | None = None
        self._info: TokenizerInfo | None = None
        self._without_controls: PackedMask | None = None
        self._threads: MaskThreads | None = None

    def compile(self, source: str, param: str) -> Grammar:
        """`source`: of `forms`. RequestError names `param` where it cannot be followed."""
        key = _key(source)
        grammar = self._remembered(key, param)
        if grammar is not None:
            return grammar
        with self._compiling:
            grammar = self._remembered(key, param)  # while this one waited
            if grammar is None:
                answer = self._ask(source)
                if answer[:1] == b"-":
                    self._refuse(key, answer[1:].decode())
                else:
                    self._remember(key, self._read(answer[1:].decode(), is_json(source)))
                grammar = self._remembered(key, param)
        assert grammar is not None, "what was just remembered is the last to be forgotten"
        return grammar

    def knows(self, source: str) -> bool:
        """Whether `compile` would take no time."""
        key = _key(source)
        with self._memory:
            return key in self._compiled or key in self._refused

    def close(self) -> None:
        process = self._process
        if process is not None:
            process.end()
        with self._compiling:
            if self._process is not None:
                self._process.close()
                self._process = None
            if self._threads is not None:
                self._threads.close()
                self._threads = None

    def _ask(self, source: str) -> bytes:
        if self._vocabulary is None:
            self._vocabulary = self._read_vocabulary()
        if self._process is None:
            self._process = CompilerProcess(self._vocabulary, self._max_compile_s)
        answer = self._process.compile(source)
        if answer is None:
            self._process.close()
            self._process = None
            limit_s = f"{self._max_compile_s:g} s"
            return f"-compiling it takes more than {limit_s} or too much memory".encode()
        return answer

    def _read(self, answer: str, is_json: bool) -> Grammar:
        from xgrammar import CompiledGrammar

        from sl_serve.grammar.matcher import Grammar, tokenizer_info

        assert self._vocabulary is not None
        if self._threads is None:
            self._threads = MaskThreads()
        if self._info is None:
            self._info = tokenizer_info(self._vocabulary)
            self._without_controls = ~self._vocabulary.ids_where(CONTROL.search)
        compiled = CompiledGrammar.deserialize_json(answer, self._info)
        only = self._without_controls if is_json else None
        return Grammar(compiled, self._vocabulary, self._threads, only)

    def _remembered(self, key: bytes, param: str) -> Grammar | None:
        with self._memory:
            grammar = self._compiled.get(key)
            reason = self._refused.get(key) if grammar is None else grammar.failure
            if reason is not None:
                raise RequestError(f"'{param}' cannot be followed: {reason}.", param)
            if grammar is not None:
                self._compiled.move_to_end(key)
            return grammar

    def _remember(self, key: bytes, grammar: Grammar) -> None:
        with self._memory:
            self._compiled[key] = grammar
            while len(self._compiled) > 1 and (
                len(self._compiled) > MAX_REMEMBERED
                or sum(g.size_bytes for g in self._compiled.values()) > CACHE_BYTES
            ):
                self._compiled.popitem(last=False)

    def _refuse(self, key: bytes, reason: str) -> None:
        with self._memory:
            self._refused[key] = reason
            if len(self._refused) > MAX_REMEMBERED:
                self._refused.popitem(last=False)


def _key(source: str) -> bytes:
    return sha256(source.encode()).digest()


class Wanted:
    """A grammar by its source, compiled when it is first needed and then held."""

    def __init__(self, grammars: Grammars, source: str, param: str) -> None:
        self._grammars = grammars
        self._source = source
        self._param = param
        self._grammar: Grammar | None = None

    @property
    def is_ready(self) -> bool:
        return self._grammar is not None or self._grammars.knows(self._source)

    def grammar(self) -> Grammar:
        """Blocks; RequestError where it cannot be followed."""
        if self._grammar is None:
            self._grammar = self._grammars.compile(self._source, self._param)
        return self._grammar
