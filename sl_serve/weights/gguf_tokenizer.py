"""The tokenizer in a GGUF file's settings -> Tokenizer.

Vocabularies come in two models: `gpt2`, byte-level BPE with merges and a pre-tokenizer known by
name only, and `llama`, SentencePiece's BPE with a score per piece and byte fallback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from sl_serve.config import ModelConfig
from sl_serve.errors import CheckpointError, ModelError
from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.fields import Fields
from sl_serve.weights.gguf_pre_tokenizers import Cut, cut_by_name

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types
_SPACE = "\u2581"  # SentencePiece's visible space


def load_gguf_tokenizer(settings: Mapping[str, Any], config: ModelConfig, source: str) -> Tokenizer:
    """Raises ModelError for a tokenizer of an unknown kind, CheckpointError for a damaged one."""
    fields = Fields(settings, source, prefix="tokenizer.ggml.")
    tokens = _tokens(fields)
    model = fields.text("model")
    starts_with_bos = True
    if model == "gpt2":
        cut = cut_by_name(fields.text("pre"), source)
        backend, starts_with_bos = _byte_level(fields, tokens, cut), cut.starts_with_bos
    elif model == "llama":
        backend = _sentencepiece(fields, tokens)
    else:
        raise ModelError(f"{source}: tokenizer {model[:40]!r} is not supported (gpt2, llama)")
    _add_marked_tokens(backend, fields, tokens)
    special = _special_tokens(fields, tokens)
    _set_added_ends(backend, fields, special, starts_with_bos)
    return Tokenizer(
        backend,
        eos_token_ids=config.eos_token_ids,
        bos_token_id=config.bos_token_id,
        special_tokens=special,
        chat_templates=_chat_templates(settings),
    )


def _tokens(fields: Fields) -> list[str]:
    tokens = _texts(fields, "tokens")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{fields.source}: the token list repeats a token")
    return tokens


def _texts(fields: Fields, key: str) -> list[str]:
    value = fields.get(key)
    if not isinstance(value, list) or not value:  # the header gives lists of texts only
        raise CheckpointError(
            f"{fields.source}: tokenizer.ggml.{key} is missing or no list of texts"
        )
    return value


def _numbers(fields: Fields, key: str, count: int) -> list[Any]:
    value = fields.get(key)
    if not isinstance(value, np.ndarray) or len(value) != count:
        raise CheckpointError(f"{fields.source}: tokenizer.ggml.{key} needs {count} numbers")
    numbers: list[Any] = value.tolist()
    return numbers


def _byte_level(fields: Fields, tokens: Sequence[str], cut: Cut) -> Backend:
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    written = _texts(fields, "merges")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in written)]
    backend = _backend(fields, vocab=vocab, merges=merges, ignore_merges=cut.whole_words)
    if cut.composes:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(cut.steps))
    backend.decoder = decoders.ByteLevel()
    return backend


def _backend(fields: Fields, **options: Any) -> Backend:
    try:
        return Backend(models.BPE(**options))
    except Exception as error:  # the package raises nothing narrower
        raise CheckpointError(f"{fields.source}: vocabulary: {str(error)[:160]!r}") from None


def _sentencepiece(fields: Fields, tokens: Sequence[str]) -> Backend:
    scores = _numbers(fields, "scores", len(tokens))
    kinds = _numbers(fields, "token_type", len(tokens))
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    unknown = tokens[kinds.index(_UNKNOWN)] if _UNKNOWN in kinds else None
    merges = _merges_by_score(vocab, scores, kinds)
    backend = _backend(
        fields, vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    pieces = [normalizers.Replace(" ", _SPACE)]
    bytes_to_text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.boolean("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), *pieces])
        backend.decoder = decoders.Sequence([*bytes_to_text, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = normalizers.Sequence(pieces)
        backend.decoder = decoders.Sequence(bytes_to_text)
    return backend


def _merges_by_score(
    vocab: Mapping[str, int], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose join has the best score; here as a list of pairs,
    best first."""
    pairs = []
    for piece, token_id in vocab.items():
        if kinds[token_id] != _NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                pairs.append((-scores[token_id], token_id, left, right))
    pairs.sort(key=lambda pair: pair[:2])
    return [(left, right) for _, _, left, right in pairs]


def _add_marked_tokens(backend: Backend, fields: Fields, tokens: Sequence[str]) -> None:
    """Tokens that are matched in the text as a whole: control tokens (special, not shown) and
    user-defined ones (shown)."""
    kinds = _numbers(fields, "token_type", len(tokens))
    marked = zip(tokens, kinds, strict=True)
    special = {_CONTROL: True, _USER_DEFINED: False}
    backend.add_tokens(
        [
            AddedToken(token, special=special[kind], normalized=False)
            for token, kind in marked
            if kind in special and token
        ]
    )


def _special_tokens(fields: Fields, tokens: Sequence[str]) -> dict[str, str]:
    """The names that chat templates use -> text."""
    keys = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {
        name: fields.integer(f"{key}_token_id", len(tokens), low=0) for key, name in keys.items()
    }
    return {name: tokens[token_id] for name, token_id in ids.items() if token_id < len(tokens)}


def _set_added_ends(
    backend: Backend, fields: Fields, special: Mapping[str, str], starts_with_bos: bool
) -> None:
    """What `encode` puts around a text when asked for special tokens."""
    bos, eos = special.get("bos_token"), special.get("eos_token")
    first = [bos] if bos and fields.boolean("add_bos_token", starts_with_bos) else []
    last = [eos] if eos and fields.boolean("add_eos_token", False) else []
    backend.post_processor = TemplateProcessing(
        single=[*first, "$A", *last],
        special_tokens=[(text, backend.token_to_id(text)) for text in {*first, *last}],
    )


def _chat_templates(settings: Mapping[str, Any]) -> dict[str, str]:
    """`tokenizer.chat_template` is the default one, `tokenizer.chat_template.NAME` another."""
    key = "tokenizer.chat_template"
    named = {
        name.removeprefix(f"{key}."): text
        for name, text in settings.items()
        if name.startswith(f"{key}.") and isinstance(text, str)
    }
    default = settings.get(key)
    return {**named, "default": default} if isinstance(default, str) else named
