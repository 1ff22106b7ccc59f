"""Reads of a file that leave the page cache alone.

With O_DIRECT the device writes straight into our memory, but offset, length and address must be
multiples of a block. Where file and memory lie alike within a block, only the blocks that a piece
shares with its neighbours pass through an aligned buffer, all in one call; elsewhere the whole
piece does. Where the file system refuses O_DIRECT (network mounts, some overlays), reads are
buffered and the kernel is told to drop each piece afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sl_serve.errors import WeightReadError
from sl_serve.host_memory import host_empty

BLOCK_BYTES = 4096  # a multiple of every common device's logical block
# One huge page: a read into 4 KiB pages is cut into requests of some hundred pieces of memory.
BOUNCE_BYTES = 2 << 20
# Of one read: enough for the device's full rate. A bounce holds it and the blocks its ends lie in.
PIECE_BYTES = BOUNCE_BYTES - 2 * BLOCK_BYTES


class DirectFile:
    """A file open for reading; safe to use from several threads, each with its own `Bounce`.

    `read_into` is the twin of `csrc/reader.cpp`, which reads from `descriptor`.
    """

    def __init__(self, path: Path) -> None:
        """Raises WeightReadError when it cannot be opened."""
        self.path = path
        try:
            self.descriptor, self.is_direct = _open(path)
        except OSError as error:
            raise WeightReadError(f"{path}: cannot be opened ({error.strerror})") from None

    @classmethod
    def adopt(cls, descriptor: int, path: Path) -> DirectFile:
        """An open file without a name; `path` says where it was, for messages."""
        file = cls.__new__(cls)
        file.path, file.descriptor, file.is_direct = path, descriptor, _make_direct(descriptor)
        return file

    def read_into(self, address: int, offset: int, n_bytes: int, bounce: Bounce) -> None:
        """Fill memory at `address` with n_bytes <= PIECE_BYTES from `offset`.

        Raises WeightReadError when the file is shorter or the device fails.
        """
        assert n_bytes <= PIECE_BYTES
        if not self.is_direct:
            self._read([_memory(address, n_bytes)], offset, n_bytes)
            with suppress(OSError):
                os.posix_fadvise(self.descriptor, offset, n_bytes, os.POSIX_FADV_DONTNEED)
            return
        inner_start = -(-offset // BLOCK_BYTES) * BLOCK_BYTES
        inner_stop = (offset + n_bytes) // BLOCK_BYTES * BLOCK_BYTES
        if (address - offset) % BLOCK_BYTES or inner_stop <= inner_start:
            self._read_through(bounce, address, offset, n_bytes)
        else:
            self._read_around(bounce, address, offset, n_bytes, inner_start, inner_stop)

    def _read_through(self, bounce: Bounce, address: int, offset: int, n_bytes: int) -> None:
        """All of it into the buffer and from there."""
        start = offset // BLOCK_BYTES * BLOCK_BYTES
        stop = -(-(offset + n_bytes) // BLOCK_BYTES) * BLOCK_BYTES
        self._read([bounce.view[: stop - start]], start, offset + n_bytes - start)
        ctypes.memmove(address, bounce.address + offset - start, n_bytes)

    def _read_around(
        self, bounce: Bounce, address: int, offset: int, n_bytes: int, start: int, stop: int
    ) -> None:
        """Blocks from `start` to `stop` straight to where they belong, the one before and the one
        after, of which a part is wanted, through the buffer."""
        n_before, n_after = start - offset, offset + n_bytes - stop
        before = bounce.view[: BLOCK_BYTES if n_before else 0]
        after = bounce.view[BLOCK_BYTES : 2 * BLOCK_BYTES if n_after else BLOCK_BYTES]
        inner = _memory(address + n_before, stop - start)
        first = start - len(before)
        self._read([before, inner, after], first, offset + n_bytes - first)
        ctypes.memmove(address, bounce.address + BLOCK_BYTES - n_before, n_before)
        ctypes.memmove(address + n_bytes - n_after, bounce.address + BLOCK_BYTES, n_after)

    def _read(self, into: Sequence[memoryview], offset: int, n_needed: int) -> None:
        """Fill `into`, one after another, from `offset`, or at least the first n_needed bytes of it
        where the file ends."""
        n_read = 0
        while n_read < n_needed:
            try:
                n = os.preadv(self.descriptor, _from(into, n_read), offset + n_read)
            except OSError as error:
                number = error.errno or errno.EIO
                raise read_error(self.path, offset + n_read, offset + n_needed, number) from None
            n_read += n
            # A direct read that ends within a block has met the file's end.
            if n == 0 or (self.is_direct and n % BLOCK_BYTES and n_read < n_needed):
                raise read_error(self.path, offset + n_read, offset + n_needed, 0)

    def close(self) -> None:
        os.close(self.descriptor)


class Bounce:
    """An aligned buffer for one thread's unaligned pieces."""

    def __init__(self) -> None:
        self._area = host_empty(2 * BOUNCE_BYTES)
        self.address = -(-self._area.data_ptr() // BOUNCE_BYTES) * BOUNCE_BYTES
        self.view = _memory(self.address, BOUNCE_BYTES)


def read_error(path: Path, at_byte: int, needed_bytes: int, number: int) -> WeightReadError:
    """Why reading up to byte `needed_bytes` ended at `at_byte`: an errno, 0 where the file ends."""
    if number:
        reason = f"reading at byte {at_byte} failed ({os.strerror(number)}); check the disk"
    else:
        reason = (
            f"ends at byte {at_byte}, bytes up to {needed_bytes} are needed; it was cut short "
            "while in use"
        )
    return WeightReadError(f"{path}: {reason}")


def _open(path: Path) -> tuple[int, bool]:
    if hasattr(os, "O_DIRECT"):
        with suppress(OSError):
            return os.open(path, os.O_RDONLY | os.O_DIRECT), True
    return os.open(path, os.O_RDONLY), False


def _make_direct(descriptor: int) -> bool:
    """Switch an open file to direct reads; False where the file system has none."""
    import fcntl

    try:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    except (OSError, AttributeError):
        return False
    return True


def _from(views: Sequence[memoryview], n_bytes: int) -> list[memoryview]:
    """What follows the first n_bytes of the views."""
    rest = []
    for view in views:
        if n_bytes < len(view):
            rest.append(view[n_bytes:])
        n_bytes = max(0, n_bytes - len(view))
    return rest


def _memory(address: int, n_bytes: int) -> memoryview:
    return memoryview((ctypes.c_char * n_bytes).from_address(address)).cast("B")
