"""Which layers of a model see only the last tokens, as its config.json says it."""

from __future__ import annotations

from collections.abc import Callable

from sl_serve.errors import ModelError
from sl_serve.weights.fields import MAX_LAYERS, Fields, shown

FULL, SLIDING = "full_attention", "sliding_attention"

Windows = tuple[int | None, ...]  # of each layer, in tokens, the newest included; None: all


def sliding_window(fields: Fields, absent: int | None = None) -> int | None:
    """Null means none; `absent`: what it is where the key is not there at all."""
    if "sliding_window" in fields:
        return fields.integer("sliding_window")
    return None if fields.prefix + "sliding_window" in fields.values else absent


def layer_windows(fields: Fields, window: int | None, slides: Callable[[int], bool]) -> Windows:
    """`window` for the layers that `layer_types` calls sliding; where that is absent, for those
    that `slides` says."""
    types = layer_types(fields, lambda layer: window is not None and slides(layer))
    if window is None and SLIDING in types:
        raise ModelError(
            f"{fields.source}: layer_types has {SLIDING!r}, but sliding_window is not set"
        )
    return tuple(window if kind == SLIDING else None for kind in types)


def layer_types(fields: Fields, slides: Callable[[int], bool]) -> tuple[str, ...]:
    """FULL or SLIDING for each layer."""
    n_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    types = fields.get("layer_types")
    if types is None:
        return tuple(SLIDING if slides(layer) else FULL for layer in range(n_layers))
    known = isinstance(types, list) and all(kind in (FULL, SLIDING) for kind in types)
    if not known or len(types) != n_layers:
        raise ModelError(
            f"{fields.source}: layer_types must be {n_layers} times {FULL!r} or {SLIDING!r}, "
            f"not {shown(types)}"
        )
    return tuple(types)
