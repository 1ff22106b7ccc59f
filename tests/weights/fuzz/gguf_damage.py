"""Damage to the settings and the tensor table of a GGUF file, put together again afterwards."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from tests.weights.fuzz.byte_damage import BYTE_DAMAGE, NUMBERS
from tests.weights.fuzz.sample import GgufParts


def _text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _array(kind: int, count: int, content: bytes) -> bytes:
    return struct.pack("<IIQ", 9, kind, count) + content


# Type and value; types are those of the format, and some that it does not have.
_VALUES = (
    *(struct.pack("<IB", 0, 255), struct.pack("<Ib", 1, -1), struct.pack("<IB", 7, 2)),
    *(struct.pack("<IH", 2, 65535), struct.pack("<Ih", 3, -1), struct.pack("<Ii", 5, -1)),
    *(struct.pack("<II", 4, n) for n in NUMBERS if n < 2**32),
    *(struct.pack("<IQ", 10, n) for n in NUMBERS if n >= 2**31),
    struct.pack("<Iq", 11, -(2**63)),
    *(struct.pack("<If", 6, x) for x in (0.0, -1.0, 1e-45, 3e38, float("nan"), float("inf"))),
    *(struct.pack("<Id", 12, x) for x in (1e308, 5e-324, float("nan"))),
    *(struct.pack("<I", 8) + _text(x) for x in (b"", b"\xff\xfe", b"a\nb", b"\0", b"llama")),
    *(struct.pack("<I", 8) + _text(x) for x in (b"gpt2", b"linear", b"qwen2", b"llama-bpe")),
    struct.pack("<I", 8) + _text(b"{{" * 20_000),
    *(struct.pack("<IQ", 8, n) for n in (2**20, 2**62, 2**63, 2**64 - 1)),
    *(_array(kind, 0, b"") for kind in (0, 4, 8, 9, 13)),
    *(_array(kind, 2**60, bytes(8)) for kind in (0, 4, 8, 9)),
    *(_array(4, 3, bytes(12)), _array(6, 2, b"\xff" * 8), _array(7, 6, b"\x02" * 6)),
    *(_array(5, 6, b"\xff" * 24), _array(5, 8, bytes(32)), _array(6, 8, b"\x7f" * 32)),
    *(_array(8, 2, _text(x) * 2) for x in (b"", b"a", b" ", b"a b c", b"\xc3\x28")),
    _array(8, 3, _text(b"a\nb") + _text(b"b") + _text(b"\xe2\x96\x81")),
    _array(8, 6, b"".join(_text(x) for x in (b"", b" ", b"a", b"<0x0A>", b"<0xZZ>", b"\n"))),
    _array(8, 6, b"".join(_text(x) for x in (b"$A", b"$", b"a:1", b"$B:9", b"$0", b":"))),
    _array(8, 6, b"".join(_text(x * 9000) for x in (b"a", b"b", b"ab", b"c", b"d", b"ac"))),
    *(_array(9, 1, _array(9, 1, b"")[4:] * 3), struct.pack("<I", 13), struct.pack("<I", 2**32 - 1)),
)


def damage_gguf(random: Random, parts: GgufParts) -> bytes:
    """One part changed."""
    changed = random.choice((_setting, _setting, _tensor, _tensor, _table, _data))(random, parts)
    return replace(changed, alignment=random.choice((32,) * 20 + (1, 64))).joined()


def _setting(random: Random, parts: GgufParts) -> GgufParts:
    i = random.randrange(len(parts.settings))
    key, _ = _halves(parts.settings[i])
    _, other = _halves(random.choice(parts.settings))
    if random.random() < 0.2:
        key = _text(random.choice((b"", b"\xff", b"k" * 70_000, b"general.alignment", key[8:-1])))
    new = random.choice((other, random.choice(_VALUES), random.choice(_VALUES)))
    return replace(parts, settings=_with(parts.settings, i, key + new))


def _tensor(random: Random, parts: GgufParts) -> GgufParts:
    """A number of one entry, a name, or all numbers of another entry."""
    i = random.randrange(len(parts.tensors))
    name, numbers = _halves(parts.tensors[i])
    other_name, others = _halves(random.choice(parts.tensors))
    if random.random() < 0.15:
        numbers = others
    elif random.random() < 0.2:
        hostile = (b"", b"\xff", b"a\nb", b"blk.0.x.weight", b"rope_freqs.weight", other_name[8:])
        name = _text(random.choice((*hostile, b"blk.99999.attn_q.weight", b"output.weight")))
    else:
        numbers = _one_number_changed(random, numbers)
    return replace(parts, tensors=_with(parts.tensors, i, name + numbers))


def _one_number_changed(random: Random, raw: bytes) -> bytes:
    n_dims = int.from_bytes(raw[:4], "little")
    form = f"<I{n_dims}QIQ"
    numbers = list(struct.unpack(form, raw))
    i = random.randrange(len(numbers))
    near = (numbers[i] + 1, numbers[i] - 1, 2 * numbers[i], numbers[i] // 2, numbers[i] + 32)
    kind = random.randrange(45)  # of the types that there are, and some that there are not
    size = 32 if i in (0, len(numbers) - 2) else 64
    numbers[i] = random.choice((*near, kind, *random.choices(NUMBERS, k=4))) % (1 << size)
    return struct.pack(form, *numbers)


def _table(random: Random, parts: GgufParts) -> GgufParts:
    """An entry of either table missing, there twice, or in another place."""
    field = random.choice(("settings", "tensors"))
    entries = list(getattr(parts, field))
    entry = entries.pop(random.randrange(len(entries)))
    for _ in range(random.choice((0, 1, 2))):
        entries.insert(random.randint(0, len(entries)), entry)
    return replace(parts, **{field: entries})


def _data(random: Random, parts: GgufParts) -> GgufParts:
    return replace(parts, data=random.choice(BYTE_DAMAGE)(random, parts.data))


def _halves(entry: bytes) -> tuple[bytes, bytes]:
    """The text in front, with its length, and the rest."""
    end = 8 + int.from_bytes(entry[:8], "little")
    return entry[:end], entry[end:]


def _with(entries: Sequence[bytes], i: int, entry: bytes) -> list[bytes]:
    return [*entries[:i], entry, *entries[i + 1 :]]
