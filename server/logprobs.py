"""The two shapes in which OpenAI reports log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.engine_port import TokenizerPort
from sl_serve.core import TokenLogprob

LOWEST = -9999.0  # JSON has no infinity


class CompletionLogprobs:
    """Shape of /v1/completions; keeps the running text offset of one choice."""

    def __init__(self, tokenizer: TokenizerPort) -> None:
        self._tokenizer = tokenizer
        self._offset = 0  # characters

    def prompt(
        self, ids: list[int], entries: Sequence[TokenLogprob | None], text: str
    ) -> dict[str, Any]:
        """`text` is the prompt as echoed. Special tokens put in front of it have no text there,
        so offsets are counted back from its end."""
        self._offset = len(text) - sum(map(self._n_chars, ids))
        return self._render(ids, entries)

    def output(self, entries: tuple[TokenLogprob, ...]) -> Any:
        return self._render([entry.token_id for entry in entries], entries)

    def _render(self, ids: list[int], entries: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        offsets = []
        for token_id in ids:
            offsets.append(max(0, self._offset))
            self._offset += self._n_chars(token_id)
        return {
            "tokens": [self._tokenizer.token_text(i) for i in ids],
            "token_logprobs": [None if e is None else max(e.logprob, LOWEST) for e in entries],
            "top_logprobs": [None if e is None else self._top(e) for e in entries],
            "text_offset": offsets,
        }

    def _n_chars(self, token_id: int) -> int:
        """Characters that begin in this token: its bytes but for UTF-8's continuations."""
        return sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(token_id))

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Text -> log probability. The chosen token always stands under its own text.

        Others of the same text: the likeliest is kept, next to the chosen one under its id. So
        the greatest value is the greatest of all, and equals the chosen one's only if that is it.
        """
        chosen = self._tokenizer.token_text(entry.token_id)
        top = {chosen: max(entry.logprob, LOWEST)}
        for token_id, logprob in entry.top:  # best first
            text = self._tokenizer.token_text(token_id)
            if token_id != entry.token_id and text == chosen:
                text = f"token_id:{token_id}"
            top.setdefault(text, max(logprob, LOWEST))
        return top


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Completion log probabilities of prompt and output as one."""
    return {key: [item for part in parts for item in part[key]] for key in parts[0]}


def chat_logprobs(tokenizer: TokenizerPort, entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """Shape of /v1/chat/completions."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": max(logprob, LOWEST),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = [
        {**entry(e.token_id, e.logprob), "top_logprobs": [entry(*pair) for pair in e.top]}
        for e in entries
    ]
    return {"content": content, "refusal": None}
