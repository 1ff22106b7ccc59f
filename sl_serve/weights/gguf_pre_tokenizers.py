"""How text is cut before merging: a GGUF file gives only a name. What it stands for are the
expressions in the tokenizer.json of the models that the names come from."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from sl_serve.errors import ModelError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"

_LLAMA3 = _CONTRACTIONS + _WORD + r"|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORD + r"|\p{N}" + _REST
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = _CONTRACTIONS + _WORD + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED % ("", "") + r"|\p{N}" + _REST_WITH_SLASHES
_GPT_4O = _CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}" + _REST_WITH_SLASHES
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
)
_BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"


class Cut(NamedTuple):
    steps: tuple[PreTokenizer, ...]  # each cuts what the one before it left
    composes: bool = False  # text is brought into Unicode's form C first
    whole_words: bool = False  # a word that is a token stays so, whatever the merges would make
    starts_with_bos: bool = False  # where the file does not say


def _gpt2_words(*before: PreTokenizer) -> tuple[PreTokenizer, ...]:
    return (*before, pre_tokenizers.ByteLevel(add_prefix_space=False))


def _split(*expressions: str) -> tuple[PreTokenizer, ...]:
    cuts = (pre_tokenizers.Split(Regex(e), "isolated") for e in expressions)
    return (*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


def _each_digit() -> PreTokenizer:
    return pre_tokenizers.Digits(individual_digits=True)


def _falcon() -> tuple[PreTokenizer, ...]:
    return (
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    )


def _deepseek_coder() -> tuple[PreTokenizer, ...]:
    *cuts, to_bytes = _split(*_DEEPSEEK_CODER)
    return (*cuts, _each_digit(), to_bytes)


_CUTS = {
    ("gpt-2", "default", "phi-2", "jais", "trillion", "exaone4"): Cut(_gpt2_words()),
    ("mpt", "olmo"): Cut(_gpt2_words(), composes=True),
    ("smollm", "starcoder", "refact", "codeshell"): Cut(_gpt2_words(_each_digit())),
    ("command-r",): Cut(_gpt2_words(_each_digit()), composes=True),
    ("llama-bpe", "llama3", "llama-v3"): Cut(
        _split(_LLAMA3), whole_words=True, starts_with_bos=True
    ),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): Cut(_split(_LLAMA3)),
    ("qwen2", "deepseek-r1-qwen", "megrez"): Cut(_split(_QWEN2), composes=True),
    ("stablelm2", "grok-2"): Cut(_split(_QWEN2)),
    ("qwen35",): Cut(_split(_QWEN35), composes=True),
    ("seed-coder",): Cut(_split(_SEED)),
    ("tekken",): Cut(_split(_TEKKEN), whole_words=True, starts_with_bos=True),
    ("gpt-4o", "llama4"): Cut(_split(_GPT_4O)),
    ("deepseek-v3",): Cut(_split(*_DEEPSEEK3)),
    ("deepseek-coder",): Cut(_deepseek_coder()),
    ("falcon",): Cut(_falcon()),
    ("bloom", "poro-chat", "gpt3-finnish"): Cut(_split(_BLOOM)),
}
_BY_NAME = {name: cut for names, cut in _CUTS.items() for name in names}


def cut_by_name(name: str, source: str) -> Cut:
    """`name`: tokenizer.ggml.pre. Raises ModelError for one that is not known."""
    if name not in _BY_NAME:
        raise ModelError(
            f"{source}: pre-tokenizer {name[:40]!r} is not supported ({', '.join(_BY_NAME)})"
        )
    return _BY_NAME[name]
