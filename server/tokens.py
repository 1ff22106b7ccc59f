"""/tokenize, /detokenize and /tokenizer_info: the tokenizer, for clients that have none."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.bodies.tokens import DetokenizeBody, TokenizeBody
from server.context import ServerContext
from server.errors import JsonResponse
from server.openapi import takes
from sl_serve.admission import check_vocabulary
from sl_serve.errors import RequestError


def token_routes(context: ServerContext) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", openapi_extra=takes(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        raw = await request.body()
        return JsonResponse(await context.off_loop(_tokenize, context, raw))

    @router.post("/detokenize", openapi_extra=takes(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        raw = await request.body()
        return JsonResponse(await context.off_loop(_detokenize, context, raw))

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        tokenizer = context.engine.tokenizer
        return JsonResponse(
            {
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": context.engine.max_model_len,
                "bos_token": tokenizer.bos_token,
                "eos_token": tokenizer.eos_token,
                "pad_token": tokenizer.pad_token,
                "chat_template": tokenizer.chat_template,
            }
        )

    return router


def _tokenize(context: ServerContext, raw: bytes) -> dict[str, Any]:
    body = context.parse(TokenizeBody, raw)
    context.model_name(body.model)
    tokenizer = context.engine.tokenizer
    if (body.prompt is None) == (not body.messages):
        raise RequestError("Give either 'prompt' or 'messages'.", "prompt")
    text, special = body.prompt, body.add_special_tokens is not False
    if body.messages:
        text = tokenizer.render_chat(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt,
            settings=body.chat_template_kwargs,
        )
        special = body.add_special_tokens is True
    ids = tokenizer.encode(text or "", add_special_tokens=special)
    answer = {"count": len(ids), "max_model_len": context.engine.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.token_text(i) for i in ids]
    return answer


def _detokenize(context: ServerContext, raw: bytes) -> dict[str, Any]:
    body = context.parse(DetokenizeBody, raw)
    context.model_name(body.model)
    check_vocabulary(body.tokens, context.engine.vocab_size, "tokens")
    return {"prompt": context.engine.tokenizer.decode(body.tokens, skip_special_tokens=False)}
