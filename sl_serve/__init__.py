"""Batched language-model inference for models larger than the accelerator."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("sl-serve")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+source"
