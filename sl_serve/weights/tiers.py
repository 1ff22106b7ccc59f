"""Which layer lies on which tier, and how it gets there while loading."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from sl_serve.errors import MemoryBudgetError, UserError
from sl_serve.host_memory import Allocate, host_empty
from sl_serve.plan.budget import gib
from sl_serve.weights.checkpoint import Checkpoint
from sl_serve.weights.direct_file import DirectFile
from sl_serve.weights.disk import DiskRing, slot_bytes
from sl_serve.weights.extents import Extent
from sl_serve.weights.host import host_images, host_images_of, load_image
from sl_serve.weights.layout import LayerLayout
from sl_serve.weights.readers import Readers
from sl_serve.weights.store import LayerStore

OnLayer = Callable[[], None]


def spread(n: int, n_chosen: int) -> list[int]:
    """Some of 0 to n - 1, as even as can be: while layers of one tier are computed, those of a
    slower one come."""
    return [i for i in range(n) if (i + 1) * n_chosen // n > i * n_chosen // n]


def served_by_files(checkpoint: Checkpoint, layout: LayerLayout, n_layers: int) -> bool:
    """Whether the checkpoint's own files hold every layer's bytes just as images do."""
    places = (
        (checkpoint.location(segment.source(i, layer)), segment.format)
        for layer in range(n_layers)
        for segment in layout.segments(layer)
        for i in segment.sources
    )
    return all(found is not None and found.dtype == f.dtype for found, f in places)


def open_store(
    checkpoint: Checkpoint,
    layout: LayerLayout,
    layers: Sequence[int],
    n_disk_layers: int,
    n_ring_slots: int,
    disk_dir: Path | None,
    readers: Readers,
    on_layer: OnLayer,
    allocate: Allocate = host_empty,
) -> LayerStore:
    """Load `layers` into the host tier and open the disk tier for some. `on_layer` hears of each
    as it is ready. `allocate` gives memory to use layers in, or to copy them to a device from."""
    on_disk = [layers[i] for i in spread(len(layers), n_disk_layers)]
    images = host_images(layout, [i for i in layers if i not in set(on_disk)], allocate)
    if not on_disk:
        _load(checkpoint, layout, images, on_layer)
        return LayerStore(layout, images)
    if served_by_files(checkpoint, layout, checkpoint.config.n_layers):
        extents = _extents_of_checkpoint(checkpoint, layout, on_disk)
    else:
        extents = _spool(checkpoint, layout, on_disk, disk_dir, on_layer)
    _load(checkpoint, layout, images, on_layer)
    slots = host_images_of(slot_bytes(layout.image_bytes), range(n_ring_slots), allocate)
    ring = DiskRing(on_disk, extents, list(slots.values()), readers, layout)
    return LayerStore(layout, images, ring, len(on_disk))


def _load(
    checkpoint: Checkpoint,
    layout: LayerLayout,
    images: Mapping[int, torch.Tensor],
    on_layer: OnLayer,
) -> None:
    for layer, image in images.items():
        load_image(checkpoint, layout, layer, image)
        on_layer()


def _extents_of_checkpoint(
    checkpoint: Checkpoint, layout: LayerLayout, layers: Sequence[int]
) -> list[list[Extent]]:
    """Where the checkpoint's files hold the pieces of each image."""
    files: dict[Path, DirectFile] = {}
    extents = []
    for layer in layers:
        of_layer = []
        for segment in layout.segments(layer):
            end = segment.offset_bytes
            for i in segment.sources:
                found = checkpoint.location(segment.source(i, layer))
                assert found is not None
                if found.path not in files:
                    files[found.path] = DirectFile(found.path)
                file = files[found.path]
                of_layer.append(Extent(file, found.offset_bytes, found.size_bytes, end))
                end += found.size_bytes
        extents.append(of_layer)
    return extents


def _spool(
    checkpoint: Checkpoint,
    layout: LayerLayout,
    layers: Sequence[int],
    disk_dir: Path | None,
    on_layer: OnLayer,
) -> list[list[Extent]]:
    """Write images to a file in `disk_dir`. It has no name: nothing is left when we end, however
    that comes about. Raises UserError when the folder cannot take it."""
    if disk_dir is None:
        raise MemoryBudgetError(
            f"{len(layers)} layers do not fit into memory, and {checkpoint.path} does not hold "
            f"them as they are computed with; give --disk-dir a folder with "
            f"{gib(len(layers) * layout.image_bytes)} free"
        )
    descriptor = _nameless_file(disk_dir, len(layers) * layout.image_bytes)
    image = host_empty(layout.image_bytes)
    try:
        for layer in layers:
            load_image(checkpoint, layout, layer, image)
            _write(descriptor, image.numpy().data)
            on_layer()
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"--disk-dir {disk_dir}: cannot be written ({error.strerror})") from None
    except BaseException:
        os.close(descriptor)
        raise
    file = DirectFile.adopt(descriptor, disk_dir)
    n = layout.image_bytes
    return [[Extent(file, i * n, n, 0)] for i in range(len(layers))]


def _nameless_file(folder: Path, n_bytes: int) -> int:
    """An open file of that size, its space taken. Raises UserError."""
    try:
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < n_bytes:
            raise UserError(
                f"--disk-dir {folder}: {gib(n_bytes)} are needed for layers, {gib(free_bytes)} are "
                "free; choose another folder, or raise --host-memory"
            )
        descriptor, path = tempfile.mkstemp(prefix="sl-serve-layers-", dir=folder)
        os.unlink(path)
    except OSError as error:
        raise UserError(
            f"--disk-dir {folder}: no file can be made there ({error.strerror})"
        ) from None
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # it is only a promise of space
            os.close(descriptor)
            raise UserError(
                f"--disk-dir {folder}: {gib(n_bytes)} cannot be taken ({error.strerror})"
            ) from None
    return descriptor


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
