"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

from server.bodies.generation import CompletionBody
from server.context import ServerContext
from server.generation import Renderer, is_visible
from server.logprobs import CompletionLogprobs, joined
from server.params import Work, check_limits, check_logprobs, encode, plan_work, sampling_params
from server.structured import asked_form
from sl_serve.core import TokenOut
from sl_serve.errors import RequestError

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class Completions:
    chunk_object = "text_completion"

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    def convert(self, raw: bytes) -> Work:
        body = self._context.parse(CompletionBody, raw)
        model = self._context.model_name(body.model)
        engine = self._context.engine
        self._check(body)
        sampling = sampling_params(body, engine.vocab_size, logprobs=body.logprobs, echo=body.echo)
        grammar = self._context.wanted(asked_form(body))
        prompts = [encode(engine, prompt, body.add_special_tokens) for prompt in body.prompt]
        return plan_work(
            "cmpl",
            model,
            body,
            prompts,
            sampling,
            max_tokens=body.max_tokens,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            max_model_len=engine.max_model_len,
            grammar=grammar,
        )

    def _check(self, body: CompletionBody) -> None:
        check_limits(body, self._context.settings, len(body.prompt))
        check_logprobs("logprobs", body.logprobs or 0, self._context.settings)
        if body.suffix:
            raise RequestError("'suffix' is not built in; leave it out.", "suffix", "not_supported")
        if body.best_of not in (None, body.n):
            raise RequestError(
                f"'best_of' is {body.best_of} and 'n' is {body.n}; only equal values are built in.",
                "best_of",
                "not_supported",
            )

    def renderer(self, work: Work) -> Renderer:
        choices = [_Choice(self._context, work, index) for index in range(len(work.choices))]
        return lambda index, out: choices[index].render(out)

    def collect(self, work: Work, outs: list[TokenOut]) -> dict[str, Any]:
        render = self.renderer(work)
        choices = [choice for index, out in enumerate(outs) for choice in render(index, out)]
        return work.envelope(self.chunk_object) | {"choices": choices}


class _Choice:
    """One choice, in one piece or in many: both have the same shape here."""

    def __init__(self, context: ServerContext, work: Work, index: int) -> None:
        assert isinstance(work.body, CompletionBody)
        self._body = work.body
        self._prompt, _ = work.choices[index]
        self._index = index
        self._tokenizer = context.engine.tokenizer
        self._logprobs = CompletionLogprobs(self._tokenizer)
        self._begun = False

    def render(self, out: TokenOut) -> list[dict[str, Any]]:
        if not is_visible(out, self._body):
            return []
        first, self._begun = not self._begun, True
        echo = self._echo() if first and self._body.echo else ""
        choice = {
            "index": self._index,
            "text": echo + out.text,
            "logprobs": self._render_logprobs(out, echo),
            "finish_reason": out.finish_reason,
            "stop_reason": out.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = out.token_ids
            if first:
                choice["prompt_token_ids"] = self._prompt.ids
        return [choice]

    def _echo(self) -> str:
        if self._prompt.text is not None:
            return self._prompt.text
        return self._tokenizer.decode(self._prompt.ids, skip_special_tokens=False)

    def _render_logprobs(self, out: TokenOut, echo: str) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        parts = []
        if out.prompt_logprobs is not None:
            parts.append(self._logprobs.prompt(self._prompt.ids, out.prompt_logprobs, echo))
        parts.append(self._logprobs.output(out.logprobs))
        return joined(parts)
