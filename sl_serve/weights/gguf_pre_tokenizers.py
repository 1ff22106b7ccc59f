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
_DEEPSEEK_SCRIPTS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_SCRIPTS)
_DEEPSEEK_LETTERS = (
    r"A-Za-z\x{b5}\x{c0}-\x{d6}\x{d8}-\x{f6}\x{f8}-\x{1ba}\x{1bc}-\x{1bf}\x{1c4}-\x{293}"
    r"\x{295}-\x{2af}\x{370}-\x{373}\x{376}\x{377}\x{37b}-\x{37d}\x{37f}\x{386}\x{388}-\x{38a}"
    r"\x{38c}\x{38e}-\x{3a1}\x{3a3}-\x{3f5}\x{3f7}-\x{481}\x{48a}-\x{52f}\x{531}-\x{556}"
    r"\x{10a0}-\x{10c5}\x{13a0}-\x{13f5}\x{13f8}-\x{13fd}\x{1c90}-\x{1cba}\x{1cbd}-\x{1cbf}"
    r"\x{1d00}-\x{1d2b}\x{1d6b}-\x{1d77}\x{1d79}-\x{1d9a}\x{1e00}-\x{1f15}\x{1f18}-\x{1f1d}"
    r"\x{1f20}-\x{1f45}\x{1f48}-\x{1f4d}\x{1f50}-\x{1f57}\x{1f59}\x{1f5b}\x{1f5d}"
    r"\x{1f5f}-\x{1f7d}\x{1f80}-\x{1fb4}\x{1fb6}-\x{1fbc}\x{1fbe}\x{1fc2}-\x{1fc4}"
    r"\x{1fc6}-\x{1fcc}\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}\x{1fe0}-\x{1fec}\x{1ff2}-\x{1ff4}"
    r"\x{1ff6}-\x{1ffc}\x{2102}\x{2107}\x{210a}-\x{2113}\x{2115}\x{2119}-\x{211d}\x{2124}"
    r"\x{2126}\x{2128}\x{212a}-\x{212d}\x{212f}-\x{2134}\x{2139}\x{213c}-\x{213f}"
    r"\x{2145}-\x{2149}\x{214e}\x{2183}\x{2184}\x{2c00}-\x{2c7b}\x{2c7e}-\x{2ce4}"
    r"\x{2ceb}-\x{2cee}\x{2cf2}\x{2cf3}\x{a640}-\x{a66d}\x{a680}-\x{a69b}\x{a722}-\x{a76f}"
    r"\x{a771}-\x{a787}\x{a78b}-\x{a78e}\x{ab70}-\x{abbf}\x{fb00}-\x{fb06}\x{fb13}-\x{fb17}"
    r"\x{ff21}-\x{ff3a}\x{ff41}-\x{ff5a}\x{10400}-\x{1044f}\x{104b0}-\x{104d3}"
    r"\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}\x{118a0}-\x{118df}"
    r"\x{1e900}-\x{1e943}"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
    r"\s+$",
    _DEEPSEEK_SCRIPTS,
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


def _split_and_digits(*expressions: str) -> tuple[PreTokenizer, ...]:
    *cuts, to_bytes = _split(*expressions)
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
    ("deepseek-coder",): Cut(_split_and_digits(*_DEEPSEEK_CODER)),
    ("deepseek-llm",): Cut(_split_and_digits(*_DEEPSEEK_LLM)),
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
