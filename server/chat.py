"""POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from server.bodies.chat import ChatBody
from server.context import ServerContext
from server.engine_port import TokenizerPort
from server.generation import Renderer, is_visible
from server.logprobs import chat_logprobs
from server.params import Prompt, Work, check_limits, check_logprobs, plan_work, sampling_params
from server.structured import asked_form
from server.tools import CallTexts, ToolUse, tool_use
from sl_serve.core import TokenOut
from sl_serve.errors import RequestError
from sl_serve.grammar.forms import Form, one_of


class ChatCompletions:
    chunk_object = "chat.completion.chunk"

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    def convert(self, raw: bytes) -> Work:
        body = self._context.parse(ChatBody, raw)
        model = self._context.model_name(body.model)
        engine = self._context.engine
        self._check(body)
        logprobs = body.top_logprobs if body.logprobs else None
        sampling = sampling_params(body, engine.vocab_size, logprobs=logprobs)
        parser, template = self._context.settings.tool_parser, engine.tokenizer.tool_template
        tools = tool_use(body, parser, template)
        if tools is not None:  # what marks a call may be a special token
            sampling = replace(sampling, skip_special_tokens=False)
        grammar = self._context.wanted(_form(asked_form(body), tools, engine.tokenizer))
        text = engine.tokenizer.render_chat(
            [message.for_template() for message in body.messages],
            tools=None if tools is None else tools.for_template(),
            settings=body.template_settings(),
        )
        # the template writes the special tokens itself
        prompt = Prompt(engine.tokenizer.encode(text, add_special_tokens=False))
        newer = body.max_completion_tokens
        return plan_work(
            "chatcmpl",
            model,
            body,
            [prompt],
            sampling,
            max_tokens=body.max_tokens if newer is None else newer,
            default_max_tokens=None,
            max_model_len=engine.max_model_len,
            grammar=grammar,
            tools=tools,
        )

    def _check(self, body: ChatBody) -> None:
        check_limits(body, self._context.settings, n_prompts=1)
        check_logprobs("top_logprobs", body.top_logprobs, self._context.settings)
        if body.top_logprobs and not body.logprobs:
            raise RequestError("'top_logprobs' needs 'logprobs': true.", "top_logprobs")

    def renderer(self, work: Work) -> Renderer:
        choices = [_Choice(self, work, index) for index in range(len(work.choices))]
        return lambda index, out: choices[index].render(out)

    def collect(self, work: Work, outs: list[TokenOut]) -> dict[str, Any]:
        choices = [_Choice(self, work, index).whole(out) for index, out in enumerate(outs)]
        answer = work.envelope("chat.completion") | {"choices": choices}
        if work.body.return_token_ids:
            answer["prompt_token_ids"] = work.choices[0][0].ids
        return answer

    def details(self, work: Work, out: TokenOut) -> dict[str, Any]:
        assert isinstance(work.body, ChatBody)
        details: dict[str, Any] = {
            "logprobs": None,
            "finish_reason": out.finish_reason,
            "stop_reason": out.stop_reason,
        }
        if work.body.logprobs:
            details["logprobs"] = chat_logprobs(self._context.engine.tokenizer, out.logprobs)
        if work.body.return_token_ids:
            details["token_ids"] = out.token_ids
        return details


class _Choice:
    """One choice, in one piece or in many."""

    def __init__(self, dialect: ChatCompletions, work: Work, index: int) -> None:
        self._dialect = dialect
        self._work = work
        self._index = index
        self._calls = None if work.tools is None else CallTexts(work.tools)
        self._begun = False

    def render(self, out: TokenOut) -> list[dict[str, Any]]:
        body = self._work.body
        if not is_visible(out, body):
            return []
        chunks = [] if self._begun else [self._first()]
        self._begun = True
        deltas = self._deltas(out)
        chunks += [_chunk(self._index, delta) for delta in deltas[:-1]]
        if deltas or out.logprobs or out.finish_reason or body.return_token_ids:
            delta = deltas[-1] if deltas else {}
            chunks.append(_chunk(self._index, delta) | self._details(out))
        return chunks

    def whole(self, out: TokenOut) -> dict[str, Any]:
        said = {"content": out.text} if self._calls is None else self._calls.message(out.text)
        message = {"role": "assistant", "refusal": None, **said}
        return {"index": self._index, "message": message, **self._details(out)}

    def _first(self) -> dict[str, Any]:
        content = "" if self._calls is None else None  # an answer of calls alone has no content
        chunk = _chunk(self._index, {"role": "assistant", "content": content})
        if self._work.body.return_token_ids:
            chunk["prompt_token_ids"] = self._work.choices[self._index][0].ids
        return chunk

    def _deltas(self, out: TokenOut) -> list[dict[str, Any]]:
        if self._calls is not None:
            return self._calls.deltas(out.text, is_last=out.finish_reason is not None)
        return [{"content": out.text}] if out.text else []

    def _details(self, out: TokenOut) -> dict[str, Any]:
        details = self._dialect.details(self._work, out)
        if self._calls is not None:
            details["finish_reason"] = self._calls.finish_reason(out.finish_reason)
        return details


def _form(
    asked: tuple[Form, str] | None, tools: ToolUse | None, tokenizer: TokenizerPort
) -> tuple[Form, str] | None:
    """What the answer must follow: a form, calls, or one of both."""
    if tools is None or (asked is None and not tools.forced):
        return asked
    calls = tools.form(tokenizer)
    if tools.forced or asked is None:
        return calls, "tools"
    return one_of([asked[0], calls]), asked[1]


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
