"""A model quantised with calibration, for as long as it is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import Progress

from sl_serve.config import EngineConfig
from sl_serve.llm import open_model
from sl_serve.quantising.run import quantise_model
from sl_serve.quantising.text import calibration_windows

N_TOKENS = 32_768  # as `sl-serve quantise` has it


@contextmanager
def calibrated(model: str, progress: Progress) -> Iterator[Path]:
    """A folder in int4, calibrated with what the model writes: never with the text that is read."""
    checkpoint = open_model(model)
    with tempfile.TemporaryDirectory(prefix="sl-serve-quality-") as place:
        try:
            writing = progress.add_task("writing calibration text", total=N_TOKENS)
            windows = calibration_windows(
                model,
                checkpoint,
                None,
                N_TOKENS,
                EngineConfig(),
                lambda n: progress.advance(writing, n),
            )
            task = progress.add_task("calibrating", total=checkpoint.config.n_layers)
            folder = Path(place) / "model"
            quantise_model(checkpoint, "int4", windows, folder, lambda: progress.advance(task))
        finally:
            checkpoint.close()
        yield folder
