"""What the config.json of most decoders says in the same words."""

from __future__ import annotations

import math
from typing import Any

from sl_serve.config import DTypeName, RopeConfig
from sl_serve.errors import ModelError
from sl_serve.weights.families import check_heads
from sl_serve.weights.fields import MAX_LAYERS, Fields, shown

_STORED_DTYPES: dict[str, DTypeName] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}


def decoder_fields(fields: Fields, generation: Fields) -> dict[str, Any]:
    """Arguments of a ModelConfig: sizes, norm, rotary positions, vocabulary. What else a family has
    is its own to read."""
    n_heads = fields.integer("num_attention_heads")
    n_kv_heads = fields.integer("num_key_value_heads", n_heads)
    hidden_size = fields.integer("hidden_size")
    vocab_size = fields.integer("vocab_size")
    max_positions = fields.integer("max_position_embeddings", 2048)
    head_dim = fields.integer("head_dim", hidden_size // n_heads)
    check_heads(n_heads, n_kv_heads, head_dim, fields.source)
    return {
        "family": fields.text("model_type"),
        "n_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_positions": max_positions,
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "ropes": (rope_config(fields, max_positions, head_dim),),
        "tie_embeddings": fields.boolean("tie_word_embeddings", False),
        "dtype": stored_dtype(fields),
        "eos_token_ids": eos_token_ids(fields, generation, vocab_size),
        "bos_token_id": bos_token_id(fields, vocab_size),
    }


def rope_config(fields: Fields, max_positions: int, head_dim: int) -> RopeConfig:
    """transformers 4 writes rope_theta and rope_scaling, 5 joins them in rope_parameters."""
    raw = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
        raise ModelError(f"{fields.source}: rotary parameters per layer type are not supported")
    return scaled_rope(fields, raw, max_positions, head_dim)


def refuse_partial_rotation(fields: Fields) -> None:
    """For families whose heads turn as a whole."""
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling")
    for holder in (fields.values, parameters):
        if isinstance(holder, dict):
            Fields(holder, fields.source).only("partial_rotary_factor", 1.0)


def scaled_rope(
    fields: Fields, raw: dict[str, Any], max_positions: int, head_dim: int
) -> RopeConfig:
    """`raw`: the parameters of one kind of rotation; what they lack stands in `fields`."""
    scaling = Fields(raw, f"{fields.source}: rotary parameters")
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10000.0))
    share = scaling.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    n_dims = None if share == 1 else int(head_dim * share)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind in ("default", "mrope") and not raw.get("mrope_section"):
        return RopeConfig(theta, n_dims=n_dims)
    if kind == "linear":
        return RopeConfig(theta, "linear", scaling.number("factor"), n_dims=n_dims)
    original = scaling.integer(
        "original_max_position_embeddings",
        fields.integer("original_max_position_embeddings", max_positions),
    )
    if kind == "llama3":
        return RopeConfig(
            theta,
            "llama3",
            scaling.number("factor"),
            scaling.number("low_freq_factor"),
            scaling.number("high_freq_factor"),
            original,
            n_dims,
        )
    if kind == "yarn":
        return _yarn(scaling, theta, max_positions, original, n_dims)
    if kind in ("longrope", "su"):
        return _longrope(scaling, theta, max_positions, original, n_dims, head_dim)
    raise ModelError(
        f"{fields.source}: rotary scaling {kind[:40]!r} is not supported "
        "(default, linear, llama3, yarn, longrope)"
    )


def _yarn(
    scaling: Fields, theta: float, max_positions: int, original: int, n_dims: int | None
) -> RopeConfig:
    factor = scaling.number("factor", max_positions / original)
    if "attention_factor" in scaling:
        amplitude = scaling.number("attention_factor")
    elif "mscale" in scaling and "mscale_all_dim" in scaling:
        amplitude = yarn_amplitude(factor, scaling.number("mscale")) / yarn_amplitude(
            factor, scaling.number("mscale_all_dim")
        )
    else:
        amplitude = yarn_amplitude(factor, 1.0)
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original_max_positions=original,
        n_dims=n_dims,
        amplitude=amplitude,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.boolean("truncate", True),
    )


def yarn_amplitude(factor: float, scale: float) -> float:
    """YaRN, arXiv 2309.00071, equation 22."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(
    scaling: Fields,
    theta: float,
    max_positions: int,
    original: int,
    n_dims: int | None,
    head_dim: int,
) -> RopeConfig:
    factor = scaling.number("factor", max_positions / original)
    amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    n_pairs = (n_dims or head_dim) // 2
    return RopeConfig(
        theta,
        "longrope",
        factor,
        original_max_positions=original,
        n_dims=n_dims,
        amplitude=scaling.number("attention_factor", amplitude),
        short_factors=_factors(scaling, "short_factor", n_pairs),
        long_factors=_factors(scaling, "long_factor", n_pairs),
    )


def _factors(scaling: Fields, key: str, n: int) -> tuple[float, ...]:
    values = scaling.get(key)
    numbers = values if isinstance(values, list) else []
    usable = all(type(v) in (int, float) and 0 < v < 1e30 for v in numbers)
    if len(numbers) != n or not usable:
        raise ModelError(f"{scaling.source}: {key} must be {n} positive numbers")
    return tuple(float(v) for v in numbers)


def eos_token_ids(fields: Fields, generation: Fields, vocab_size: int) -> tuple[int, ...]:
    ids = _token_ids(fields, "eos_token_id", vocab_size)
    return tuple(sorted(ids | _token_ids(generation, "eos_token_id", vocab_size)))


def bos_token_id(fields: Fields, vocab_size: int) -> int | None:
    return min(_token_ids(fields, "bos_token_id", vocab_size), default=None)


def _token_ids(fields: Fields, key: str, vocab_size: int) -> set[int]:
    """One id, a list of ids or nothing. Ids outside the vocabulary can never be drawn."""
    value = fields.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int for item in ids):
        raise ModelError(f"{fields.source}: {key} must be token ids, not {shown(value)}")
    return {item for item in ids if 0 <= item < vocab_size}


def stored_dtype(fields: Fields) -> DTypeName:
    name = fields.text("dtype", fields.text("torch_dtype", "float32"))
    if name not in _STORED_DTYPES:
        known = ", ".join(_STORED_DTYPES)
        raise ModelError(f"{fields.source}: dtype {name[:40]!r} is not supported ({known})")
    return _STORED_DTYPES[name]
