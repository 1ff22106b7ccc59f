"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from server.context import ServerContext
from server.generation import Renderer, is_visible
from server.logprobs import chat_logprobs
from server.params import Prompt, Work, check_limits, check_logprobs, plan_work, sampling_params
from server.schemas import ChatBody
from sl_serve.core import TokenOut
from sl_serve.errors import RequestError


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
        text = engine.tokenizer.render_chat([m.for_template() for m in body.messages])
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
        )

    def _check(self, body: ChatBody) -> None:
        check_limits(body, self._context.settings, n_prompts=1)
        check_logprobs("top_logprobs", body.top_logprobs, self._context.settings)
        if body.top_logprobs and not body.logprobs:
            raise RequestError("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        if body.response_format is not None and body.response_format.type != "text":
            raise _not_built_in("response_format", "a type other than 'text'")
        if body.tools:
            raise _not_built_in("tools", "calling tools")
        if body.tool_choice not in (None, "none", "auto"):
            raise _not_built_in("tool_choice", "forcing a tool call")

    def renderer(self, work: Work) -> Renderer:
        begun: set[int] = set()

        def render(index: int, out: TokenOut) -> list[dict[str, Any]]:
            if not is_visible(out, work.body):
                return []
            chunks = []
            if index not in begun:
                begun.add(index)
                chunks.append(_chunk(index, {"role": "assistant", "content": ""}))
                if work.body.return_token_ids:
                    chunks[0]["prompt_token_ids"] = work.choices[index][0].ids
            delta = {"content": out.text} if out.text else {}
            return [*chunks, _chunk(index, delta) | self._details(work, out)]

        return render

    def collect(self, work: Work, outs: list[TokenOut]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": out.text, "refusal": None},
                **self._details(work, out),
            }
            for index, out in enumerate(outs)
        ]
        answer = work.envelope("chat.completion") | {"choices": choices}
        if work.body.return_token_ids:
            answer["prompt_token_ids"] = work.choices[0][0].ids
        return answer

    def _details(self, work: Work, out: TokenOut) -> dict[str, Any]:
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


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _not_built_in(param: str, what: str) -> RequestError:
    return RequestError(
        f"'{param}' asks for {what}, which is not built in.", param, "not_supported"
    )
