"""A deterministic engine on a thread of its own, with handles to hold, fail and count."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from zlib import crc32

from sl_serve.core import FinishReason, Request, TokenLogprob, TokenOut, Usage
from sl_serve.errors import EngineClosedError, EngineDeadError, QueueFullError, RequestError
from sl_serve.stats import EngineSnapshot, EngineState, MemoryTier, StepStats, SubBatchFill

BOS, EOS, TWIN_A = 256, 257, 258  # TWIN_A has the text of the byte token "a"
VOCAB = 260


class ToyTokenizer:
    """One token per byte, a begin token in front, and a second token for "a"."""

    vocab_size = VOCAB
    bos_token: str | None = "<s>"
    eos_token: str | None = "</s>"
    pad_token: str | None = None
    chat_template: str | None = "toy"
    tool_template: str | None = "toy"
    eos_token_ids = (EOS,)

    def __init__(self) -> None:
        self.encode_s = 0.0  # how long encoding takes

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        time.sleep(self.encode_s)
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        shown = [i for i in ids if not (skip_special_tokens and i in (BOS, EOS))]
        return b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        raw = self.token_bytes(token_id)
        return raw.decode() if token_id > 255 or token_id < 128 else f"bytes:\\x{token_id:02x}"

    def token_bytes(self, token_id: int) -> bytes:
        special = {BOS: b"<s>", EOS: b"</s>", TWIN_A: b"a"}
        return bytes([token_id]) if token_id < 256 else special.get(token_id, b"")

    def shown_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in (BOS, EOS) else self.token_bytes(token_id)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> str:
        if messages[-1]["content"] == "refuse me":
            raise RequestError("the template refuses", "messages")
        text = "".join(f"[{m['role']}]{m['content']}" for m in messages)
        if tools is not None:
            text = f"[tools]{json.dumps(tools)}{text}"
        if settings:
            text = f"[settings]{json.dumps(settings)}{text}"
        return text + "[assistant]" * add_generation_prompt


def logprobs_after(ids: Sequence[int]) -> list[float]:
    """The toy model: a distribution over the vocabulary that depends on the last four tokens."""
    seed = crc32(repr(tuple(ids[-4:])).encode())
    scores = [(crc32(f"{seed},{i}".encode()) % 10007) / 1000 for i in range(VOCAB)]
    printable = {*range(97, 123), TWIN_A}
    scores = [s if i in printable else s - 20 for i, s in enumerate(scores)]
    norm = math.log(sum(map(math.exp, scores)))
    return [s - norm for s in scores]


def entry(ids: Sequence[int], token_id: int, k: int) -> TokenLogprob:
    logprobs = logprobs_after(ids)
    best = sorted(range(VOCAB), key=lambda i: -logprobs[i])[:k]
    return TokenLogprob(token_id, logprobs[token_id], tuple((i, logprobs[i]) for i in best))


def next_token(request: Request) -> int:
    ids = request.token_ids(max(0, request.n_tokens - 4), request.n_tokens)
    logprobs = logprobs_after(ids)
    ranked = sorted(allowed_tokens(request), key=lambda i: -logprobs[i])
    if request.sampling.temperature == 0:
        return ranked[0]
    seed = 0 if request.sampling.seed is None else request.sampling.seed
    return ranked[crc32(f"{seed},{request.n_tokens}".encode()) % min(5, len(ranked))]


def allowed_tokens(request: Request) -> list[int]:
    mask = None if request.constraint is None else request.constraint.mask()
    return [i for i in range(VOCAB) if mask is None or mask[i // 32] >> i % 32 & 1]


@dataclass
class FakeEngine:
    max_model_len: int = 4096
    max_queue: int = 10_000
    retry_after_s: int = 3600
    step_s: float = 0.0
    stuck: bool = False  # does nothing, not even aborts
    holds_text: bool = False  # shows text with the last token only
    script: bytes | None = None  # what every answer is
    vocab_size: int = VOCAB
    n_parameters: int = 1_234_567
    max_rows: int = 16
    n_sub_batches: int = 2
    memory_tiers: tuple[MemoryTier, ...] = (
        MemoryTier("host", (("layers", 600), ("KV cache", 100)), 1000),
        MemoryTier("disk", (("layers", 300),), None),
    )
    tokenizer: ToyTokenizer = field(default_factory=ToyTokenizer)
    submitted: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    active: dict[str, Request] = field(default_factory=dict)
    closed: bool = False

    def __post_init__(self) -> None:
        self.state = EngineState.RUNNING
        self.reason: str | None = None
        self.n_steps = 0
        self.since_progress_s = 0.0
        self.slow_step_s = 0.0
        self.gate = threading.Event()  # cleared: no step is done, aborts still are
        self.gate.set()
        self._failure: str | None = None
        self._gone: set[str] = set()
        self._observers: list[Callable[[StepStats], None]] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        with self._changed:
            if self.state is EngineState.DEAD:
                raise EngineDeadError(self.reason)
            if self.state is not EngineState.RUNNING:
                raise EngineClosedError("closed")
            if len(self.active) + len(requests) > self.max_queue:
                raise QueueFullError(f"the queue of {self.max_queue} is full", self.retry_after_s)
            self.submitted += requests
            self.active |= {r.request_id: r for r in requests}
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        with self._changed:
            self.aborted.append(request_id)
            self._gone.add(request_id)
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """The present requests end with an error at the next step."""
        with self._changed:
            self._failure = reason
            self._changed.notify_all()

    def die(self, reason: str) -> None:
        self.fail(reason)
        self.state, self.reason = EngineState.DEAD, reason

    def on_step(self, observer: Callable[[StepStats], None]) -> None:
        self._observers.append(observer)

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            state=self.state,
            reason=self.reason,
            n_running=len(self.active),
            n_waiting=2,
            n_waiting_requests=1,
            waiting_tokens=3,
            n_steps=self.n_steps,
            n_parked_total=4,
            prompt_tokens_total=5,
            generated_tokens_total=6,
            step_s_total=float(self.n_steps),
            last_step_s=1.0,
            since_progress_s=self.since_progress_s,
            weight_bytes_total=7,
            kv_used_bytes=25,
            kv_total_bytes=100,
            slow_step_s=self.slow_step_s,
        )

    def drain(self, timeout_s: float) -> bool:
        with self._changed:
            self.state = EngineState.DRAINING
            return self._changed.wait_for(lambda: not self.active, timeout_s)

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        self._thread.join()

    def wait_idle(self, timeout_s: float = 5.0) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self.active, timeout_s)

    def _run(self) -> None:
        while not self.closed:
            with self._changed:
                busy = self.active and (self.gate.is_set() or self._gone or self._failure)
                if self.stuck or not busy:
                    self._changed.wait(0.005)
                    continue
                self._end_some()
                rows = list(self.active.values()) if self.gate.is_set() else []
            if rows:
                self._step(rows)

    def _end_some(self) -> None:
        for request in list(self.active.values()):
            if self._failure is not None:
                failed = TokenOut("", finish_reason=FinishReason.ERROR, error=self._failure)
                self._end(request, failed)
            elif request.request_id in self._gone:
                self._end(request, TokenOut("", finish_reason=FinishReason.ABORT))
        self._failure = None
        self._gone.clear()

    def _end(self, request: Request, out: TokenOut) -> None:
        del self.active[request.request_id]
        request.on_output(out)
        self._changed.notify_all()

    def _step(self, rows: list[Request]) -> None:
        time.sleep(self.step_s)
        outs = [(request, self._advance(request)) for request in rows]
        self.n_steps += 1
        for observer in self._observers:
            fills = (SubBatchFill(len(rows), 28), SubBatchFill(0, 2))
            observer(StepStats(0.5, 2, len(rows), 10, 20, 1000, 100, 50, 0.25, sub_batches=fills))
        with self._changed:
            for request, out in outs:
                if out.finish_reason is not None:
                    self._end(request, out)
                else:
                    request.on_output(out)

    def _advance(self, request: Request) -> TokenOut:
        sampling = request.sampling
        prompt_logprobs = None
        if sampling.prompt_logprobs is not None and not request.output_ids:
            ids = request.prompt_ids
            tail = (entry(ids[:i], ids[i], sampling.prompt_logprobs) for i in range(1, len(ids)))
            prompt_logprobs = (None, *tail)
        if sampling.max_tokens == 0:
            usage = Usage(request.n_prompt, 0)
            reason = FinishReason.LENGTH
            return TokenOut("", (), "", (), prompt_logprobs, reason, usage=usage)
        n = len(request.output_ids)
        scripted = self.script[n : n + 1] if self.script is not None else b""
        token_id = scripted[0] if scripted else EOS if self.script else next_token(request)
        so_far = request.token_ids(0, request.n_tokens)
        logprobs = ()
        if sampling.logprobs is not None:
            logprobs = (entry(so_far, token_id, sampling.logprobs),)
        request.output_ids.append(token_id)
        limit = self.max_model_len - request.n_prompt
        if sampling.max_tokens is not None:
            limit = min(limit, sampling.max_tokens)
        text = self.tokenizer.token_text(token_id)
        reason, stop = None, None
        if request.constraint is not None:
            request.constraint.accept(token_id)
        if token_id == EOS or (request.constraint is not None and request.constraint.is_done):
            reason = FinishReason.STOP
            text = "" if token_id == EOS else text
        elif text in sampling.stop:
            reason, stop, text = FinishReason.STOP, text, ""
        elif len(request.output_ids) >= limit:
            reason = FinishReason.LENGTH
        if self.holds_text:
            text = self.tokenizer.decode(request.output_ids) if reason else ""
        usage = Usage(request.n_prompt, len(request.output_ids))
        return TokenOut(
            request.request_id,
            (token_id,),
            text,
            logprobs,
            prompt_logprobs,
            reason,
            stop,
            None,
            usage,
        )


def expected_output(prompt: str | list[int], n_tokens: int, seed: int = 0) -> list[int]:
    """What the toy model says after a prompt, worked out without engine or server."""
    ids = [BOS, *prompt.encode()] if isinstance(prompt, str) else list(prompt)
    for _ in range(n_tokens):
        logprobs = logprobs_after(ids)
        ranked = sorted(range(VOCAB), key=lambda i: -logprobs[i])
        ids.append(ranked[crc32(f"{seed},{len(ids)}".encode()) % 5])
    return ids[len(ids) - n_tokens :]
