"""The nouns of the engine. No torch here: these objects cross threads and, one day, processes.

A request becomes a `Request`; each step the packer turns the running ones into a `StepPlan`
(sub-batches of rows); the sampler's choices leave the engine as `TokenOut`.

Lengths, always in tokens:

    |<- prompt_ids ->|<- output_ids ->|
    |<------- n_tokens -------------->|
    |<- n_cached ->|<- to be computed ->|     n_cached < n_tokens while the request lives
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from sl_serve.constraints import Constraint


class FinishReason(StrEnum):
    STOP = "stop"  # eos, a stop id or a stop string
    LENGTH = "length"  # max_tokens or the context is used up
    ABORT = "abort"  # the client went away or asked for it
    ERROR = "error"  # the engine failed; TokenOut.error says why


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one continuation is drawn. `temperature == 0` is greedy and exact (lowest id wins ties).

    Penalties follow OpenAI (presence, frequency: over generated tokens) and CTRL (repetition:
    over prompt and generated tokens, arXiv 1909.05858). Order: the request's constraint,
    logit_bias, penalties, temperature, top_k, top_p, min_p. Log probabilities are those of the
    model, before all that.
    """

    max_tokens: int | None = None  # None: until the context is full; 0: only look at the prompt
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None  # None: drawn once at submission
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True  # they have no text
    logprobs: int | None = None  # None: off; k: the chosen token and the k most likely
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of `token_id`, and the most likely alternatives, best first.

    `logprob` of the token and its entry in `top` are the same float, bit for bit.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TokenOut:
    """One step's news about one request, in order; the last one has `finish_reason` set.

    `text` is what may be shown now: characters that could still become a stop string, and bytes
    of an unfinished character, are held back until the next news. `token_ids` is empty or one id
    (a request with max_tokens == 0 ends with none). `prompt_logprobs` comes once, with the first
    news, one entry per prompt token; the first is None.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or id that ended it
    error: str | None = None
    usage: Usage = Usage(0, 0)


# A request of this priority or a worse one is in nobody's way: it does not count against the
# waiting queue's limits, and its row is parked when a better one needs it.
BACKGROUND_PRIORITY = 1

OnOutput = Callable[[TokenOut], None]  # called on the engine thread; must not block or raise


@dataclass(slots=True, eq=False)
class Request:
    """What a client asks for, and how far the engine has come with it.

    The front fills the first block; the engine thread alone changes the second.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    on_output: OnOutput
    priority: int = 0  # lower runs first
    arrival_s: float = 0.0  # time.monotonic() at submission
    constraint: Constraint | None = None  # of this output alone
    most_tokens: int = 0  # that prompt and output may come to
    repeatable: bool = False  # drawn by a seed of its owner's: the same bits in any company

    output_ids: list[int] = field(default_factory=list)
    n_cached: int = 0  # tokens whose K and V lie in the slab
    sequence_no: int = 0  # order of admission among equals

    @property
    def is_background(self) -> bool:
        return self.priority >= BACKGROUND_PRIORITY

    @property
    def n_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and output together, without joining the two lists."""
        n = len(self.prompt_ids)
        if stop <= n:
            return self.prompt_ids[start:stop]
        if start >= n:
            return self.output_ids[start - n : stop - n]
        return self.prompt_ids[start:] + self.output_ids[: stop - n]


@dataclass(frozen=True, slots=True)
class RowWork:
    """One row of a sub-batch in one step: tokens [start, start + n_new) of its request."""

    request: Request
    slab: int  # slab id
    row: int  # row inside the slab
    start: int  # tokens already cached before this step
    n_new: int  # 1 for decode, a chunk of the prompt for prefill
    samples: bool  # the last of these tokens gives the next one

    @property
    def stop(self) -> int:
        return self.start + self.n_new


@dataclass(frozen=True, slots=True)
class SubBatchPlan:
    """Rows that pass through a layer together. No padding: n_tokens is the matmul's row count."""

    rows: tuple[RowWork, ...]

    @property
    def n_tokens(self) -> int:
        return sum(r.n_new for r in self.rows)


@dataclass(frozen=True, slots=True)
class StepPlan:
    sub_batches: tuple[SubBatchPlan, ...]

    @property
    def n_tokens(self) -> int:
        return sum(s.n_tokens for s in self.sub_batches)

    @property
    def n_rows(self) -> int:
        return sum(len(s.rows) for s in self.sub_batches)

    @property
    def repeatable(self) -> bool:
        """Whether a row is."""
        return any(r.request.repeatable for s in self.sub_batches for r in s.rows)
