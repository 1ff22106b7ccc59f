"""Damage to bytes, whatever they mean. `random` decides everything, so a case can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Damage = Callable[[Random, bytes], bytes]

# Where programs that read sizes and offsets go wrong.
NUMBERS = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 127, 128, 255, 256, 4096, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
    *(2**64 - 8, 2**64 - 32, 2**32 - 2, 10**6, 10**9, 10**12),
)


def flip_bits(random: Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = _position(random, data)
        damaged[at : at + 1] = bytes(byte ^ 1 << random.randrange(8) for byte in damaged[at:][:1])
    return bytes(damaged)


def set_bytes(random: Random, data: bytes) -> bytes:
    at = _position(random, data)
    new = bytes(random.choice((0, 9, 10, 34, 44, 92, 125, 127, 128, 255)) for _ in range(2))
    return data[:at] + new[: random.randint(1, 2)] + data[at + 2 :]


def set_number(random: Random, data: bytes) -> bytes:
    at, size = _position(random, data), random.choice((1, 2, 4, 8))
    number = random.choice(NUMBERS) % (1 << 8 * size)
    return data[:at] + number.to_bytes(size, "little") + data[at + size :]


def truncate(random: Random, data: bytes) -> bytes:
    return data[: _position(random, data)]


def delete_range(random: Random, data: bytes) -> bytes:
    at, size = _position(random, data), random.choice((1, 4, 8, 64, 1024))
    return data[:at] + data[at + size :]


def repeat_range(random: Random, data: bytes) -> bytes:
    at, size = _position(random, data), random.choice((1, 4, 8, 64, 1024))
    return data[: at + size] + data[at:]


def move_range(random: Random, data: bytes) -> bytes:
    """Bytes of one place over those of another: plausible, but wrong."""
    at, to, size = _position(random, data), _position(random, data), random.choice((4, 8, 16, 64))
    return data[:to] + data[at : at + size] + data[to + size :]


def append_bytes(random: Random, data: bytes) -> bytes:
    return data + random.randbytes(random.choice((1, 8, 32, 4096)))


BYTE_DAMAGE: tuple[Damage, ...] = (
    flip_bits,
    set_bytes,
    set_number,
    truncate,
    delete_range,
    repeat_range,
    move_range,
    append_bytes,
)


def _position(random: Random, data: bytes) -> int:
    """Early ones are likelier: headers stand in front."""
    return random.randrange(max(1, min(len(data), random.choice((32, 256, 2048, 1 << 30)))))
