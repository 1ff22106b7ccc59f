"""Which models can be run: those of a family with a file in `sl_serve/models`."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec

from sl_serve.errors import ModelError


def has_model_code(family: str) -> bool:
    return family.isidentifier() and find_spec(f"sl_serve.models.{family}") is not None


def check_family(family: str, convertible: Collection[str], source: str) -> None:
    """Raises ModelError unless `family` is among those whose settings can be converted
    (`convertible`) and its arithmetic exists."""
    if family in convertible and has_model_code(family):
        return
    supported = ", ".join(sorted(filter(has_model_code, convertible))) or "none"
    raise ModelError(
        f"{source}: architecture {family[:80]!r} is not supported; supported: {supported}"
    )


def check_heads(n_heads: int, n_kv_heads: int, head_dim: int, source: str) -> None:
    """Heads share key and value heads evenly, and rotary positions turn pairs of elements."""
    if n_heads % n_kv_heads:
        raise ModelError(f"{source}: {n_heads} heads cannot share {n_kv_heads} key and value heads")
    if head_dim % 2:
        raise ModelError(f"{source}: heads of {head_dim} elements cannot be rotated in pairs")
