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
_CASED_LETTERS = (  # of DeepSeek's first tokenizers: most that there are
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376-\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183-\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2-\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_EASTERN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _EASTERN,
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EASTERN)
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


def _split_and_each_digit(*expressions: str) -> tuple[PreTokenizer, ...]:
    *cuts, to_bytes = _split(*expressions)
    return (*cuts, _each_digit(), to_bytes)


_CUTS = {
    ("gpt-2", "default", "phi-2", "jais", "trillion", "exaone4"): Cut(_gpt2_words()),
    ("mpt", "olmo"): Cut(_gpt2_words(), composes=True),
    ("smollm", "starcoder", "refact", "codeshell"): Cut(_gpt2_words(_each_digit())),
    ("command-r",): Cut(_gpt2_words(_each_digit()), composes=True),
    ("llama-bpe", "llama3", "llama-v3", "falcon3"): Cut(
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
    ("deepseek-llm",): Cut(_split_and_each_digit(*_DEEPSEEK_LLM)),
    ("deepseek-coder",): Cut(_split_and_each_digit(*_DEEPSEEK_CODER)),
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
