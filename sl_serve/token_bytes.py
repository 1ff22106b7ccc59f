"""The exact bytes every token stands for, read off a tokenizer's decoder.

Bytes add up where strings do not: a character may be spread over several tokens, so texts are
joined as bytes and decoded once, or incrementally.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from sl_serve.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 characters stand for themselves, the others for 256, 257, ... in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}


class TokenBytes:
    """Token id -> bytes, for byte-level vocabularies and for pieces with byte fallback.

    Raises ModelError when the decoder works in another way (WordPiece and the like).
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.strips_leading_space = False  # of a whole text
        self._byte_level = False
        self._byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        self._read_decoder()
        self._alphabet = byte_alphabet() if self._byte_level else {}
        self._known: dict[int, bytes] = {}
        self._shown: dict[int, bytes] = dict.fromkeys(self.special_ids, b"")

    def of(self, token_id: int) -> bytes:
        """Empty for an id the tokenizer does not know: a model's vocabulary may be padded."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._compute(token_id)
        return found

    def shown(self, token_id: int) -> bytes:
        """As `of`, but empty for special tokens."""
        found = self._shown.get(token_id)
        if found is None:
            found = self._shown[token_id] = self.of(token_id)
        return found

    def _compute(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        piece = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if piece is None:
            return b""
        if self._byte_level and all(char in self._alphabet for char in piece):
            return bytes(self._alphabet[char] for char in piece)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(match[1])
        for pattern, content in self._replacements:
            piece = piece.replace(pattern, content)
        return piece.encode()

    def _read_decoder(self) -> None:
        decoder = self._backend.decoder
        spec: dict[str, Any] = (
            {"type": "none"} if decoder is None else json.loads(decoder.__getstate__())
        )
        steps: list[dict[str, Any]] = spec["decoders"] if spec["type"] == "Sequence" else [spec]
        fused = False
        for step in steps:
            if step["type"] == "ByteLevel":
                self._byte_level = True
            elif step["type"] == "ByteFallback":
                self._byte_fallback = True
            elif step["type"] == "Fuse":
                fused = True
            elif step["type"] == "Replace" and "String" in step["pattern"]:
                self._replacements.append((step["pattern"]["String"], step["content"]))
            elif step["type"] == "Metaspace":
                self._replacements.append((step["replacement"], " "))
                self.strips_leading_space = step.get("prepend_scheme") != "never"
            elif fused and _strips_one_space(step):
                self.strips_leading_space = True
            else:
                raise ModelError(f"a tokenizer with the decoder {step['type']} is not supported")


def _strips_one_space(step: dict[str, Any]) -> bool:
    return step == {"type": "Strip", "content": " ", "start": 1, "stop": 0}
