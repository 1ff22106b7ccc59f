"""The two shapes in which OpenAI reports log probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from server.engine_port import TokenizerPort
from sl_serve.core import TokenLogprob

LOWEST = -9999.0  # JSON has no infinity


def label(tokenizer: TokenizerPort, token_id: int) -> str:
    """The token's text; a part of a character, which has none, shows its bytes."""
    text = tokenizer.token_text(token_id)
    if "\ufffd" not in text:
        return text
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionLogprobs:
    """Shape of /v1/completions; keeps the running text offset of one choice."""

    def __init__(self, tokenizer: TokenizerPort) -> None:
        self._tokenizer = tokenizer
        self._offset = 0  # characters

    def prompt(self, ids: list[int], entries: Iterable[TokenLogprob | None], text: str) -> Any:
        """`text` is the prompt as echoed. Special tokens put in front of it have no text there,
        so offsets are counted back from its end."""
        labels = [label(self._tokenizer, i) for i in ids]
        self._offset = len(text) - sum(map(len, labels))
        return self._render(labels, entries)

    def output(self, entries: tuple[TokenLogprob, ...]) -> Any:
        return self._render([label(self._tokenizer, e.token_id) for e in entries], entries)

    def _render(self, labels: list[str], entries: Iterable[TokenLogprob | None]) -> dict[str, Any]:
        entries = list(entries)
        offsets = []
        for text in labels:
            offsets.append(max(0, self._offset))
            self._offset += len(text)
        return {
            "tokens": labels,
            "token_logprobs": [None if e is None else max(e.logprob, LOWEST) for e in entries],
            "top_logprobs": [None if e is None else self._top(e) for e in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Text -> log probability. The chosen token always stands under its own text.

        Others of the same text: the likeliest is kept, next to the chosen one under its id. So
        the greatest value is the greatest of all, and equals the chosen one's only if that is it.
        """
        chosen = label(self._tokenizer, entry.token_id)
        top = {chosen: max(entry.logprob, LOWEST)}
        for token_id, logprob in entry.top:  # best first
            text = label(self._tokenizer, token_id)
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
            "token": label(tokenizer, token_id),
            "logprob": max(logprob, LOWEST),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = [
        {**entry(e.token_id, e.logprob), "top_logprobs": [entry(*pair) for pair in e.top]}
        for e in entries
    ]
    return {"content": content, "refusal": None}
