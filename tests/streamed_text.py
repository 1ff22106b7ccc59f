"""Tokenizers trained on the spot, and texts of many scripts for them to say piece by piece."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sl_serve.tokenizer import Tokenizer

PHRASES = (
    "The quick brown fox, 12,345.67 times!",
    "def f(x):\n\treturn {'a': [x ** 2 for _ in range(10)]}  # ok\r\n",
    "Пока все спят, я читаю.",
    "東京で会いましょう。你好\uff0c世界\uff01",
    "안녕하세요 세계",
    "שלום עולם, מה שלומך?",
    "مرحبًا بالعالم، كيف حالك؟",
    "नमस्ते दुनिया, क्षत्रिय",
    "ภาษาไทยไม่มีช่องว่าง",
    "e\u0301a\u0308o\u0302 z\u0335\u0321\u034c",
    "👩🏽‍🚀👨‍👩‍👧‍👦🏳️‍🌈🇩🇪 1️⃣",
    "∑∫≠√ ½ ﬁ Ⅷ ①",
    "\u200b\u200f\u202b\ufeff",
    "a\u00a0b\u3000c   d\t\te",
    "▁ ▁▁ </s> <0x41> Ġ",
    "",
)
DECODE_PIECES = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    backend.train_from_iterator(PHRASES * 3, trainer)
    return backend


def pieces_of_merges() -> Backend:
    """As Llama 2's: the visible space comes in by normalising."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, limit_alphabet=60, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    backend.train_from_iterator(PHRASES * 3, trainer)
    backend.decoder = decoders.Sequence(DECODE_PIECES)
    return with_byte_fallback(backend)


def pieces_of_scores() -> Backend:
    """As SentencePiece's unigram models: the visible space comes in by cutting."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>", "<s>"], show_progress=False
    )
    backend.train_from_iterator(PHRASES[:3] * 3, trainer)
    backend.decoder = decoders.Sequence(DECODE_PIECES)
    return with_byte_fallback(backend)


def with_byte_fallback(backend: Backend) -> Backend:
    """What the vocabulary cannot spell becomes bytes."""
    spec = json.loads(backend.to_str())
    model, names = spec["model"], [f"<0x{byte:02X}>" for byte in range(256)]
    model["byte_fallback"] = True
    if isinstance(model["vocab"], list):
        model["vocab"] += [[name, -20.0] for name in names]
    else:
        model["vocab"] |= {name: len(model["vocab"]) + i for i, name in enumerate(names)}
    return Backend.from_str(json.dumps(spec))


KINDS: dict[str, Callable[[], Backend]] = {
    "byte-level": byte_level,
    "merges": pieces_of_merges,
    "scores": pieces_of_scores,
}


def random_texts(n: int, seed: int) -> Iterator[str]:
    """Of characters from all planes, most of them of no script that was trained on."""
    random = Random(seed)
    for _ in range(n):
        highest = random.choice((0x7F, 0x24F, 0xFFFF, 0x10FFFF))
        codes = (random.randrange(highest + 1) for _ in range(random.randrange(40)))
        yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def multilingual_texts(n: int, seed: int) -> Iterator[str]:
    """Phrases, cut anywhere, one after another."""
    random = Random(seed)
    for _ in range(n):
        phrases = random.choices(PHRASES, k=random.randrange(1, 5))
        yield "".join(phrase[random.randrange(len(phrase) + 1) :] for phrase in phrases)


def check(tokenizer: Tokenizer, backend: Backend, text: str) -> int:
    """Number of tokens. What the whole text is, the tokenizers package says."""
    ids = tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer()
    streamed = "".join([detokenizer.feed(i).text for i in ids]) + detokenizer.flush()
    assert streamed == backend.decode(ids) == tokenizer.decode(ids), (text, ids)
    return len(ids)
