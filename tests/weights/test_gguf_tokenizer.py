from __future__ import annotations

import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    CohereTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    Qwen2Tokenizer,
    Qwen3_5Tokenizer,
)

from sl_serve.config import ModelConfig
from sl_serve.errors import CheckpointError, ModelError
from sl_serve.token_bytes import byte_alphabet
from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.gguf_tokenizer import load_gguf_tokenizer

CONFIG = ModelConfig("llama", 1, 8, 8, 1, 1, 8, 512, 64, eos_token_ids=(1,), bos_token_id=0)
CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SUFFIX"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SUFFIX"
)
CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "Hello world's 12345 a1b2, it'LL do",
    "tabs\t\tand  spaces   \n\n lines\r\n  end ",
    "naïve café 你好 мир ½²③ 👩‍🚀!?...",
    "x=3.14159;--> \n[END]",
]


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def byte_level_settings(pre: str, **changes: Any) -> dict[str, Any]:
    """Two special tokens, a user-defined one, all bytes, and three tokens made by merging. A
    change to None leaves a setting out."""
    alphabet = {byte: char for char, byte in byte_alphabet().items()}
    tokens = ["<s>", "</s>", "<think>", *alphabet.values()]
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": np.array([3, 3, 4] + [1] * 256, dtype=np.int32),
        "merges": ["h e", "l l", "he ll"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    keys["tokens"] = [*tokens, "he", "ll", "hell"]
    keys["token_type"] = np.append(keys["token_type"], [1, 1, 1])
    values = {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items()}
    return {key: value for key, value in values.items() if value is not None}


def load(settings: dict[str, Any]) -> Tokenizer:
    return load_gguf_tokenizer(settings, CONFIG, "test.gguf")


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    pieces = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:stop] for _, (start, stop) in pieces]


# As llama.cpp has them: each expression cuts what the one before it left.
IN_TURN = {
    "dbrx": [LLAMA3_SPLIT],
    "glm4": [LLAMA3_SPLIT],
    "stablelm2": [LLAMA3_SPLIT.replace("{1,3}", "")],
    "qwen35": [
        LLAMA3_SPLIT.replace("{1,3}", "")
        .replace(r"?\p{L}+", r"?[\p{L}\p{M}]+")
        .replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
    ],
    "seed-coder": [
        LLAMA3_SPLIT.replace("{1,3}", "").replace(
            r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"
        )
    ],
    "tekken": [CASED.replace("SUFFIX", "") + r"|\p{N}" + CASED_REST],
    "gpt-4o": [CASED.replace("SUFFIX", f"{CONTRACTIONS}?") + r"|\p{N}{1,3}" + CASED_REST],
    "deepseek-v3": [r"\p{N}{1,3}", "[一-龥\u3040-ヿ]+", DEEPSEEK_WORDS],
    "deepseek-coder": [
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        "[一-龥\u0800-一가-\ud7ff]+",
        r"\p{N}",
    ],
    "deepseek-llm": [
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}--[\uA790-\uA7FF\u0560-\u0588]]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[一-龥\u0800-一가-\ud7ff]+",
        r"\p{N}",
    ],
    # Here, as in the published tokenizer, digits are looked for after bytes have become characters.
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"],
    "starcoder": [r"\p{N}", GPT2_SPLIT],
    "command-r": [r"\p{N}", GPT2_SPLIT],
    "olmo": [GPT2_SPLIT],
    "phi-2": [GPT2_SPLIT],
    "exaone4": [GPT2_SPLIT],
    "chatglm-bpe": [LLAMA3_SPLIT],
    "bloom": [" ?[^\\s|.,!?…。\uff0c、।\u06d4،()]+"],
}


def cut_in_turn(text: str, expressions: list[str]) -> list[str]:
    parts = [text]
    for expression in expressions:
        cuts = [regex.split(f"({expression})", part, flags=regex.V1) for part in parts]
        parts = [piece for cut in cuts for piece in cut if piece]
    return parts


@pytest.mark.parametrize("name", IN_TURN)
@pytest.mark.parametrize(
    "text", [*TEXTS, "ONE OneTwo/three\n\n(四五六)か 7890 שלום e\u0301a नमस्ते-x _y $z\n"]
)
def test_further_pre_tokenizers_cut_like_their_expressions(name: str, text: str) -> None:
    if name == "falcon":
        text = text.encode("ascii", "ignore").decode()
    assert words(load(byte_level_settings(name)), text) == cut_in_turn(text, IN_TURN[name])


# Of those with case: Armenian and Georgian ones, and what Unicode added later or apart.
NOT_DEEPSEEKS = (
    *(range(0x560, 0x590), range(0x10C6, 0x1100), range(0x1C80, 0x1C90), range(0x2D00, 0x2D30)),
    *(range(0xA78F, 0xAB70), range(0x10500, 0x10600), range(0x10D00, 0x11000)),
    *(range(0x16E00, 0x1E900),),
)


def test_deepseek_joins_letters_that_have_case() -> None:
    tokenizer = load(byte_level_settings("deepseek-llm"))
    letters = [c for c in range(0x80, 0x20000) if chr(c).isalpha()]
    for c in letters:
        has_case = unicodedata.category(chr(c)) in ("Lu", "Ll", "Lt")
        if c < 0x3000 or has_case:
            joins = has_case and not any(c in others for others in NOT_DEEPSEEKS)
            first = words(tokenizer, f"  {chr(c)}")[0]  # a word takes one space
            assert (first == " ") == joins, hex(c)


# Those that transformers has classes for.
CLASSES = {
    "gpt-2": GPT2Tokenizer,
    "olmo": GPTNeoXTokenizer,
    "command-r": CohereTokenizer,
    "qwen2": Qwen2Tokenizer,
    "qwen35": Qwen3_5Tokenizer,
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("text", [*TEXTS, "e\u0301a नमस्ते-x 7890 _y $z\n"])
def test_pre_tokenizers_cut_like_transformers_classes(name: str, text: str) -> None:
    values = byte_level_settings(name)
    vocab = {token: i for i, token in enumerate(values["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split()) for merge in values["tokenizer.ggml.merges"]]
    theirs = CLASSES[name](vocab=vocab, merges=merges).backend_tokenizer
    ours = load(values)._backend
    for backend in (theirs, ours):
        if backend.normalizer is not None:
            assert backend.normalizer.normalize_str("e\u0301") == "é"
    assert (ours.normalizer is None) == (theirs.normalizer is None)
    found, expected = (b.pre_tokenizer.pre_tokenize_str(text) for b in (ours, theirs))
    assert found == expected


def test_words_that_are_tokens_and_added_begins_by_name() -> None:
    for name in IN_TURN:
        tokenizer = load(byte_level_settings(name, merges=["h e", "l l"]))
        pieces = [tokenizer.token_text(i) for i in tokenizer.encode("hell")]
        assert pieces == (["<s>", "hell"] if name == "tekken" else ["he", "ll"])


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return open_checkpoint(smollm2_path).load_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_pre_tokenizers_cut_like_their_expressions(text: str) -> None:
    """Against the `regex` package: another engine running the published expressions."""
    for name in ("gpt-2", "default"):
        assert words(load(byte_level_settings(name)), text) == regex.findall(GPT2_SPLIT, text)
    for name in ("llama-bpe", "llama3", "falcon3"):
        assert words(load(byte_level_settings(name)), text) == regex.findall(LLAMA3_SPLIT, text)
    one_digit = LLAMA3_SPLIT.replace("{1,3}", "")
    assert words(load(byte_level_settings("qwen2")), text) == regex.findall(one_digit, text)
    by_digit = [part for part in regex.split(r"(\p{N})", text) if part]
    expected = [word for part in by_digit for word in regex.findall(GPT2_SPLIT, part)]
    assert words(load(byte_level_settings("smollm")), text) == expected


def test_smollm2_splits_every_digit(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("in 20245 or 7")
    texts = [smollm2.token_text(token_id) for token_id in ids]
    assert texts == ["in", " ", "2", "0", "2", "4", "5", " or", " ", "7"]


def test_smollm2_known_facts(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert (smollm2.eos_token, smollm2.bos_token) == ("<|im_end|>", "<|im_start|>")
    assert (smollm2.eos_token_ids, smollm2.bos_token_id) == ((2,), 1)
    assert smollm2.encode("<|im_start|>user\nHi<|im_end|>") == [1, 4093, 198, 26843, 2]
    assert smollm2.decode([1, 4093, 198, 26843, 2]) == "user\nHi"
    assert smollm2.decode([1, 4093], skip_special_tokens=False) == "<|im_start|>user"
    rendered = smollm2.render_chat([{"role": "user", "content": "Hi"}])
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_equals_transformers_where_it_can(smollm2: Tokenizer, smollm2_path: Path) -> None:
    """transformers ignores the name `smollm` and cuts by GPT-2's expression alone. This differs
    only where a space or a sign precedes digits that the vocabulary could join with it."""
    reference = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    for text in [*TEXTS[:2], "naïve café 你好 мир 👩‍🚀!?...", "<|im_start|>system\n"]:
        assert smollm2.encode(text) == reference(text).input_ids
    assert smollm2.encode(" ½") != reference(" ½").input_ids


# Six control characters and everything from U+40000 on need bytes this vocabulary lacks.
SPELT = st.characters(
    max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d"
)


@given(st.text(SPELT, max_size=60))
@settings(max_examples=300, deadline=None)
def test_smollm2_round_trip(smollm2: Tokenizer, text: str) -> None:
    ids = smollm2.encode(text)
    assert smollm2.decode(ids) == text
    assert b"".join(map(smollm2.token_bytes, ids)) == text.encode()


def test_marked_tokens_and_ends() -> None:
    tokenizer = load(byte_level_settings("gpt-2", add_bos_token=True, add_eos_token=True))
    ids = tokenizer.encode("<think>hell</s>")
    hell = tokenizer.encode("hell", add_special_tokens=False)
    assert ids == [0, 2, *hell, 1, 1]
    assert len(hell) == 1
    assert tokenizer.decode(ids) == "<think>hell"
    assert load(byte_level_settings("gpt-2")).encode("<s>") == [0]
    assert load(byte_level_settings("llama-bpe")).encode("") == [0]
    assert load(byte_level_settings("llama-bpe", add_bos_token=False)).encode("") == []


def test_llama3_takes_a_whole_word_that_is_a_token() -> None:
    """The merges alone would end at he + ll."""
    merges = ["h e", "l l"]
    for pre, expected in (("llama-bpe", ["hell"]), ("gpt-2", ["he", "ll"])):
        tokenizer = load(byte_level_settings(pre, merges=merges))
        ids = tokenizer.encode("hell", add_special_tokens=False)
        assert [tokenizer.token_text(token_id) for token_id in ids] == expected


def test_qwen2_normalises() -> None:
    decomposed = "e\u0301"
    assert load(byte_level_settings("qwen2")).encode(decomposed) == load(
        byte_level_settings("qwen2")
    ).encode("é")
    tokenizer = load(byte_level_settings("gpt-2"))
    assert tokenizer.decode(tokenizer.encode(decomposed)) == decomposed


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pre": "new-model"}, "new-model"),
        ({"pre": None}, "pre is missing"),
        ({"model": "bert"}, "bert"),
        ({"model": None}, "model is missing"),
        ({"add_bos_token": 1}, "add_bos_token must be true or false"),
    ],
)
def test_unknown_kinds_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        load(byte_level_settings(**({"pre": "gpt-2"} | changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": ["a", "a"]},
        {"tokens": array(1, 2)},
        {"tokens": None},
        {"merges": ["a nothing"]},
        {"merges": ["ab"]},
        {"merges": None},
        {"token_type": array(1)},
        {"token_type": 5},
    ],
)
def test_damaged_vocabularies_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        load(byte_level_settings("gpt-2", **changes))


def sentencepiece_settings(**changes: Any) -> dict[str, Any]:
    pieces = {"▁": -1.0, "h": -9.0, "e": -9.0, "l": -9.0, "o": -9.0}
    pieces |= {"ll": -2.0, "el": -3.0, "he": -4.0, "hell": -5.0, "▁hell": -6.0, "▁▁": -7.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "scores": array(*[0.0] * 259, *pieces.values()),
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces), dtype=np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items()}


def sentencepiece_reference(text: str, scores: dict[str, float]) -> list[str]:
    """The definition: join the neighbours with the best score, leftmost first, until none."""
    symbols = list(text.replace(" ", "▁"))
    while True:
        joins = [
            (-scores[left + right], place)
            for place, (left, right) in enumerate(pairwise(symbols))
            if left + right in scores
        ]
        if not joins:
            return symbols
        place = min(joins)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


@given(st.text(alphabet="helo ", max_size=24))
@settings(max_examples=300, deadline=None)
def test_sentencepiece_joins_by_score(text: str) -> None:
    values = sentencepiece_settings()
    tokens = values["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens[259:], values["tokenizer.ggml.scores"][259:].tolist(), strict=True))
    tokenizer = load(values)
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = sentencepiece_reference(f" {text}", scores) if text else []
    assert [tokens[token_id] for token_id in ids] == expected
    assert tokenizer.decode(ids) == text


@given(st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_sentencepiece_round_trip_by_bytes(text: str) -> None:
    for add_space in (True, False):
        tokenizer = load(sentencepiece_settings(add_space_prefix=add_space))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_sentencepiece_ends_and_bytes() -> None:
    tokenizer = load(sentencepiece_settings())
    assert tokenizer.encode("hell")[0] == 1
    assert tokenizer.token_bytes(3 + 0xE4) == b"\xe4"
    assert tokenizer.token_text(3 + 0xE4) == r"bytes:\xe4"
    assert tokenizer.token_text(3 + 0x41) == "A"
    assert tokenizer.decode(tokenizer.encode("</s> hell")) == " hell"
    with pytest.raises(CheckpointError, match="scores"):
        load(sentencepiece_settings(scores=array(1.0)))


def test_named_chat_templates() -> None:
    extra = {
        "tokenizer.chat_template": "{{ eos_token }}plain",
        "tokenizer.chat_template.tool_use": "tools: {{ tools | length }}",
    }
    tokenizer = load(byte_level_settings("gpt-2") | extra)
    assert tokenizer.chat_template == extra["tokenizer.chat_template"]
    assert tokenizer.render_chat([]) == "</s>plain"
    assert tokenizer.render_chat([], tools=[{}, {}]) == "tools: 2"
