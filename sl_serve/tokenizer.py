"""Text <-> token ids, chats -> text. One object per model, shared by all threads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sl_serve.chat_template import ChatTemplate
from sl_serve.detokenizer import Detokenizer
from sl_serve.errors import RequestError
from sl_serve.token_bytes import TokenBytes


class Tokenizer:
    """`special_tokens` maps names such as eos_token to texts, `chat_templates` names to sources.

    Where the model's settings name no end-of-text or begin-of-text id, the special tokens do.
    Raises ModelError for a tokenizer whose decoder is of an unknown kind.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: tuple[int, ...] = (),
        bos_token_id: int | None = None,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self._backend = backend
        self._bytes = TokenBytes(backend)
        self._special_tokens = dict(special_tokens or {})
        self._templates = {
            name: ChatTemplate(source) for name, source in (chat_templates or {}).items()
        }
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = eos_token_ids or self._ids_of("eos_token")
        self.bos_token_id = bos_token_id
        if bos_token_id is None:
            self.bos_token_id = next(iter(self._ids_of("bos_token")), None)

    @property
    def eos_token(self) -> str | None:
        return self._special_tokens.get("eos_token")

    @property
    def bos_token(self) -> str | None:
        return self._special_tokens.get("bos_token")

    @property
    def pad_token(self) -> str | None:
        return self._special_tokens.get("pad_token")

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the template for requests without tools."""
        template = self._templates.get("default")
        return template.source if template else None

    @property
    def tool_template(self) -> str | None:
        """Jinja source of the template for requests with tools."""
        template = self._templates.get("tool_use")
        return template.source if template else self.chat_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Special tokens written out in `text` become their ids. Releases the GIL meanwhile."""
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError:  # the package's word for a str that has no UTF-8
            raise RequestError(
                "the text is not valid Unicode: it has half a surrogate pair", param="prompt"
            ) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The bytes of all tokens as UTF-8, with U+FFFD for what is none; unknown ids are empty."""
        piece = self._bytes.shown if skip_special_tokens else self._bytes.of
        text = b"".join(map(piece, ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._bytes.strips_leading_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """Exact; empty for an id that the tokenizer does not know."""
        return self._bytes.of(token_id)

    def shown_bytes(self, token_id: int) -> bytes:
        """As `token_bytes`, but empty for special tokens."""
        return self._bytes.shown(token_id)

    def token_text(self, token_id: int) -> str:
        r"""For log probabilities. Part of a character, having no text, is shown as bytes:\xNN."""
        raw = self._bytes.of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a chat, special tokens included: encode it with add_special_tokens=False.
        `settings`: what else the template may read, such as enable_thinking.

        Raises RequestError without a template or when the template refuses the messages."""
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise RequestError(
                "this model has no chat template; use /v1/completions", param="messages"
            )
        return self._templates[name].render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            others={**self._special_tokens, **(settings or {})},
        )

    def detokenizer(
        self,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> Detokenizer:
        return Detokenizer(self._bytes, prompt_ids, stop, include_stop, skip_special_tokens)

    def save(self, folder: Path) -> None:
        """The files of a Hugging Face folder that `weights/hf_tokenizer.py` reads this from."""
        self._backend.save(str(folder / "tokenizer.json"))
        templates = [{"name": n, "template": t.source} for n, t in self._templates.items()]
        settings = {**self._special_tokens, "chat_template": templates}
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(settings, ensure_ascii=False) + "\n", encoding="utf-8")

    def _ids_of(self, name: str) -> tuple[int, ...]:
        text = self._special_tokens.get(name)
        token_id = self._backend.token_to_id(text) if text is not None else None
        return () if token_id is None else (token_id,)
