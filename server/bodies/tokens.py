"""Texts to tokens and back."""

from __future__ import annotations

from pydantic import Field

from server.bodies.chat import Messages, TemplateSettings
from server.bodies.fields import Body, TokenIds


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Messages = Field(default_factory=list)
    add_special_tokens: bool | None = None  # true for a prompt, false for messages
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateSettings = Field(default_factory=dict)
    return_token_strs: bool = False


class DetokenizeBody(Body):
    model: str | None = None
    tokens: TokenIds
