"""From a valid body to what the engine is asked: limits of model and settings, then Work.

Everything is checked here, before anything is allocated per choice or reaches the engine.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

from server.bodies.generation import GenerationBody
from server.engine_port import EnginePort
from server.settings import ServerSettings
from server.tools import ToolUse
from sl_serve import __version__
from sl_serve.admission import check_sampling, check_vocabulary
from sl_serve.constraints import Constraint
from sl_serve.core import SamplingParams
from sl_serve.errors import RequestError
from sl_serve.grammar.compiler import Wanted

MAX_STOP_IDS = 1024


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: list[int]
    text: str | None = None  # None: given as token ids


@dataclass(frozen=True, slots=True)
class Work:
    """One HTTP request, checked. Choice p * n + i is the i-th continuation of prompt p."""

    answer_id: str
    model: str
    created: int  # unix seconds
    body: GenerationBody
    choices: tuple[tuple[Prompt, SamplingParams], ...]
    # What every choice must follow. Compiling takes time: `context.compile` does it off the loop.
    grammar: Wanted | None = None
    tools: ToolUse | None = None

    def constraint(self) -> Constraint | None:
        """For the request of one choice; every choice needs its own. Compiles, and raises
        RequestError, where nobody has done so before."""
        return None if self.grammar is None else self.grammar.grammar().start()

    @property
    def n_prompt_tokens(self) -> int:
        """Each prompt once, however many continuations it has."""
        return sum(len(prompt.ids) for prompt, _ in self.choices[:: self.body.n])

    def envelope(self, kind: str) -> dict[str, Any]:
        """The fields that are the same on the answer and on every chunk of it."""
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"sl-serve-{__version__}",
        }

    def usage(self, n_completion_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.n_prompt_tokens,
            "completion_tokens": n_completion_tokens,
            "total_tokens": self.n_prompt_tokens + n_completion_tokens,
        }


def check_limits(body: GenerationBody, settings: ServerSettings, n_prompts: int) -> None:
    _at_most("n", body.n, settings.max_n)
    n_choices = body.n * n_prompts
    if n_choices > settings.max_choices:
        raise RequestError(
            f"{n_prompts} prompts with n = {body.n} ask for {n_choices} choices; one request may "
            f"ask for {settings.max_choices}. Send fewer prompts at a time.",
            "n",
        )
    _at_most("stop", len(body.stop), settings.max_stop, " strings")
    _at_most("stop", max(map(len, body.stop), default=0), settings.max_stop_chars, " characters")
    _at_most("stop_token_ids", len(body.stop_token_ids), MAX_STOP_IDS, " ids")
    if body.stream_options is not None and not body.stream:
        raise RequestError(
            "'stream_options' is only allowed with 'stream': true.", "stream_options"
        )


def check_logprobs(param: str, asked: int, settings: ServerSettings) -> None:
    _at_most(param, asked, settings.max_logprobs)


def _at_most(param: str, value: int, limit: int, unit: str = "") -> None:
    if value > limit:
        has = "has" if unit else "is"
        raise RequestError(f"'{param}' {has} {value}{unit}; the limit is {limit}{unit}.", param)


def encode(engine: EnginePort, prompt: str | list[int], add_special_tokens: bool) -> Prompt:
    if not prompt:
        raise RequestError("'prompt' is empty; give at least one token.", "prompt")
    if isinstance(prompt, list):
        check_vocabulary(prompt, engine.vocab_size, "prompt")
        return Prompt(prompt)
    return Prompt(engine.tokenizer.encode(prompt, add_special_tokens), prompt)


def sampling_params(
    body: GenerationBody, vocab_size: int, *, logprobs: int | None, echo: bool = False
) -> SamplingParams:
    """All but max_tokens, which depends on the prompt."""
    sampling = SamplingParams(
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=min(max(body.top_k, 0), vocab_size),  # -1 and 0: off
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias),
        seed=body.seed,
        stop=tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        include_stop_str_in_output=body.include_stop_str_in_output,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
    )
    check_sampling(sampling, vocab_size)
    return sampling


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    for key in bias:
        if not (key.isascii() and key.isdecimal() and len(key) < 19):
            raise RequestError(
                f"'logit_bias' has the key {key[:40]!r}; keys are token ids.", "logit_bias"
            )
    return {int(key): float(value) for key, value in bias.items()}


def plan_work(
    prefix: str,
    model: str,
    body: GenerationBody,
    prompts: list[Prompt],
    sampling: SamplingParams,
    *,
    max_tokens: int | None,
    default_max_tokens: int | None,
    max_model_len: int,
    grammar: Wanted | None = None,
    tools: ToolUse | None = None,
) -> Work:
    """`default_max_tokens` None: until the context is full."""
    choices = []
    for prompt in prompts:
        limit = _room(len(prompt.ids), max_tokens, default_max_tokens, max_model_len)
        _check_min_tokens(body.min_tokens, max_model_len if limit is None else limit)
        own = replace(sampling, max_tokens=limit)
        choices += [(prompt, replace(own, seed=_nth_seed(own.seed, i))) for i in range(body.n)]
    answer_id = f"{prefix}-{uuid.uuid4().hex}"
    return Work(answer_id, model, int(time.time()), body, tuple(choices), grammar, tools)


def _room(n_prompt: int, asked: int | None, default: int | None, max_len: int) -> int | None:
    """How many tokens may follow the prompt."""
    rest = max_len - n_prompt
    if n_prompt == 0:
        raise RequestError("The prompt has no tokens; give at least one.", "prompt")
    if rest < 0 or (rest == 0 and asked != 0):
        raise RequestError(
            f"The prompt has {n_prompt} tokens and the context holds {max_len}, prompt and output "
            "together; shorten the prompt.",
            "prompt",
            "context_length_exceeded",
        )
    if asked is None:
        return None if default is None else min(default, rest)
    if asked > rest:
        raise RequestError(
            f"max_tokens is {asked} and the prompt has {n_prompt} tokens; the context holds "
            f"{max_len}, so ask for at most {rest}.",
            "max_tokens",
            "context_length_exceeded",
        )
    return asked


def _check_min_tokens(asked: int, limit: int) -> None:
    if asked > limit:
        raise RequestError(
            f"min_tokens is {asked}, but at most {limit} tokens may be generated; lower it or "
            "raise max_tokens.",
            "min_tokens",
        )


def _nth_seed(seed: int | None, index: int) -> int | None:
    """seed + index, staying a signed 64-bit number."""
    return None if seed is None else (seed + index + 2**63) % 2**64 - 2**63
