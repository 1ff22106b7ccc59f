"""Rotary positions of a GGUF file -> fields of config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sl_serve.config import RopeConfig
from sl_serve.errors import ModelError
from sl_serve.weights.fields import Fields

LLAMA3_FACTORS = "rope_freqs.weight"  # what llama3's scaling divides each frequency by
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = frozenset({LLAMA3_FACTORS, LONG_FACTORS, SHORT_FACTORS})
ROPE_SETTINGS = frozenset(
    {
        "rope.freq_base",
        "rope.scale_linear",  # in old files
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
        "rope.scaling.original_context_length",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.finetuned",  # says how the model came to be
    }
)

Factors = Mapping[str, np.ndarray[Any, Any]]  # the file's tensors among ROPE_TENSORS


def rope_fields(fields: Fields, head_dim: int, n_dims: int, factors: Factors) -> dict[str, Any]:
    """`n_dims` elements of a head are rotated. Raises ModelError for what cannot be said in the
    words of config.json."""
    theta = fields.number("rope.freq_base", 10000.0)
    kind = fields.text("rope.scaling.type", "none")
    is_long = kind == "longrope" or bool(factors.keys() & {LONG_FACTORS, SHORT_FACTORS})
    if not is_long:
        fields.only("rope.scaling.attn_factor", 1.0)
    if LLAMA3_FACTORS in factors:
        scaling = _llama3(fields, kind, theta, head_dim, factors[LLAMA3_FACTORS])
    elif is_long:
        scaling = _longrope(fields, kind, n_dims, factors)
    elif kind == "yarn":
        scaling = _yarn(fields)
    elif kind == "linear":
        factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
        scaling = {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    elif kind == "none":
        scaling = {}
    else:
        raise ModelError(f"{fields.source}: rotary scaling {kind[:40]!r} is not supported")
    return {"rope_theta": theta} | ({"rope_scaling": scaling} if scaling else {})


def _yarn(fields: Fields) -> dict[str, Any]:
    fields.only("rope.scaling.yarn_ext_factor", 1.0)
    scaling = {
        "rope_type": "yarn",
        "factor": fields.number("rope.scaling.factor"),
        "original_max_position_embeddings": fields.integer("rope.scaling.original_context_length"),
    }
    for key in ("beta_fast", "beta_slow"):
        if f"rope.scaling.yarn_{key}" in fields:
            scaling[key] = fields.number(f"rope.scaling.yarn_{key}")
    if "rope.scaling.yarn_attn_factor" in fields:
        scaling["attention_factor"] = fields.number("rope.scaling.yarn_attn_factor")
    return scaling


def _longrope(fields: Fields, kind: str, n_dims: int, factors: Factors) -> dict[str, Any]:
    both = [factors.get(name) for name in (SHORT_FACTORS, LONG_FACTORS)]
    usable = all(f is not None and f.shape == (n_dims // 2,) for f in both)
    if kind not in ("none", "longrope") or not usable:
        raise ModelError(
            f"{fields.source}: long-RoPE needs {SHORT_FACTORS} and {LONG_FACTORS} "
            f"of {n_dims // 2} numbers each, and no other scaling"
        )
    short, long = (f.tolist() for f in both if f is not None)
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": fields.integer("rope.scaling.original_context_length"),
        "attention_factor": fields.number("rope.scaling.attn_factor", 1.0),
    }


def _llama3(
    fields: Fields, kind: str, theta: float, head_dim: int, factors: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """The file holds only the result of Llama 3's formula, a factor per frequency. Its largest is
    the formula's `factor`; the other parameters are the same in all Llama 3 models, so they are
    assumed and the formula's result compared."""
    usable = kind == "none" and factors.shape == (head_dim // 2,) and np.isfinite(factors).all()
    if usable and factors.min() > 0.999:  # the formula only slows rotations
        rope = RopeConfig(theta, "llama3", round(float(factors.max()), 4), 1.0, 4.0, 8192)
        if np.allclose(factors, llama3_rope_factors(rope, head_dim), rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": rope.factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_max_positions,
            }
    raise ModelError(
        f"{fields.source}: the rotary factors in {LLAMA3_FACTORS} are not those of Llama 3's "
        "scaling"
    )


def llama3_rope_factors(rope: RopeConfig, head_dim: int) -> Sequence[float]:
    """What each of head_dim / 2 frequencies is divided by: 1 for short waves, `factor` for long
    ones, blended between (Llama 3.1's reference implementation)."""
    factors = []
    for pair in range(head_dim // 2):
        wave = 2 * math.pi * rope.theta ** (2 * pair / head_dim)  # in positions
        turns = rope.original_max_positions / wave
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = min(1.0, max(0.0, blend))
        factors.append(1 / ((1 - blend) / rope.factor + blend))
    return factors
