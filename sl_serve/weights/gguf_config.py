"""Settings and tensor names of a GGUF file -> ModelConfig and Hugging Face names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sl_serve.config import ModelConfig, RopeConfig
from sl_serve.errors import ModelError
from sl_serve.weights.families import check_family, check_heads
from sl_serve.weights.fields import MAX_LAYERS, Fields
from sl_serve.weights.gguf_header import GgufHeader

ROPE_FACTORS = "rope_freqs.weight"  # what llama3's scaling divides each frequency by

_FAMILIES = {"llama": "llama"}  # general.architecture -> Hugging Face model_type
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.(\w+)\.(weight|bias)")
_TOP_TENSOR = re.compile(r"(\w+)\.(weight|bias)")


def hugging_face_names(header: GgufHeader, path: Path) -> dict[str, str]:
    """Hugging Face name -> the file's name. A tensor without a place in the architecture raises
    ModelError: leaving it out would change the results unnoticed."""
    names = {}
    for name in header.tensors:
        if name == ROPE_FACTORS:
            continue
        translated = _translate(name)
        if translated is None:
            raise ModelError(f"{path}: tensor {name[:120]!r} has no place in a llama model")
        names[translated] = name
    return names


def _translate(name: str) -> str | None:
    if match := _LAYER_TENSOR.fullmatch(name):
        layer, part, kind = match.groups()
        known = _LAYER_NAMES.get(part)
        return known and f"model.layers.{layer}.{known}.{kind}"
    if match := _TOP_TENSOR.fullmatch(name):
        known = _TOP_NAMES.get(match[1])
        return known and f"{known}.{match[2]}"
    return None


def model_config_from_gguf(
    header: GgufHeader, rope_factors: np.ndarray[Any, Any] | None, path: Path
) -> ModelConfig:
    """`rope_factors` is the content of ROPE_FACTORS, where the file has it."""
    general = Fields(header.settings, str(path))
    architecture = general.text("general.architecture")
    check_family(_FAMILIES.get(architecture, architecture), _FAMILIES.values(), str(path))
    if general.integer("split.count", 1, low=0) > 1:
        raise ModelError(f"{path}: one part of several; join them with gguf-split --merge first")
    fields = Fields(header.settings, str(path), prefix=f"{architecture}.")
    fields.only("expert_count", 0)
    n_heads = fields.integer("attention.head_count")
    n_kv_heads = fields.integer("attention.head_count_kv", n_heads)
    hidden_size = fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden_size // n_heads)
    fields.only("attention.value_length", head_dim)
    fields.only("rope.dimension_count", head_dim)
    check_heads(n_heads, n_kv_heads, head_dim, str(path))
    vocab_size = _vocab_size(header, path)
    names = header.tensors.keys()
    return ModelConfig(
        family=_FAMILIES[architecture],
        n_layers=fields.integer("block_count", high=MAX_LAYERS),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_positions=fields.integer("context_length"),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        ropes=(_rope(fields, head_dim, rope_factors),),
        tie_embeddings="output.weight" not in names,
        attention_bias=_any_bias(names, "attn_"),
        mlp_bias=_any_bias(names, "ffn_"),
        dtype="float32",
        eos_token_ids=_eos_token_ids(general, vocab_size),
        bos_token_id=_token_id(general, "bos_token_id", vocab_size),
    )


def _vocab_size(header: GgufHeader, path: Path) -> int:
    embeddings = header.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise ModelError(f"{path}: no embeddings (token_embd.weight)")
    return embeddings.shape[0]


def _any_bias(names: Collection[str], part: str) -> bool:
    return any(name.endswith(".bias") and f".{part}" in name for name in names)


def _eos_token_ids(general: Fields, vocab_size: int) -> tuple[int, ...]:
    """End of text, and where they are named apart, end of turn and end of message."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = {_token_id(general, key, vocab_size) for key in keys}
    return tuple(sorted(token_id for token_id in ids if token_id is not None))


def _token_id(general: Fields, key: str, vocab_size: int) -> int | None:
    key = f"tokenizer.ggml.{key}"
    token_id = general.integer(key, low=0) if key in general else vocab_size
    return token_id if token_id < vocab_size else None


def _rope(fields: Fields, head_dim: int, factors: np.ndarray[Any, Any] | None) -> RopeConfig:
    theta = fields.number("rope.freq_base", 10000.0)
    kind = fields.text("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ModelError(f"{fields.source}: rotary scaling {kind[:40]!r} is not supported")
    if factors is None:
        factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
        is_linear = kind == "linear" and factor != 1
        return RopeConfig(theta, "linear", factor) if is_linear else RopeConfig(theta)
    if kind == "none" and (rope := _recognise_llama3(theta, head_dim, factors)):
        return rope
    raise ModelError(
        f"{fields.source}: the rotary factors in {ROPE_FACTORS} are not those of Llama 3's scaling"
    )


def _recognise_llama3(
    theta: float, head_dim: int, factors: np.ndarray[Any, Any]
) -> RopeConfig | None:
    """The file holds only the result of Llama 3's formula, a factor per frequency. Its largest is
    the formula's `factor`; the other parameters are the same in all Llama 3 models, so they are
    assumed and the formula's result compared."""
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all():
        return None
    if factors.min() < 0.999:  # the formula only slows rotations
        return None
    candidate = RopeConfig(theta, "llama3", round(float(factors.max()), 4), 1.0, 4.0, 8192)
    expected = llama3_rope_factors(candidate, head_dim)
    return candidate if np.allclose(factors, expected, rtol=1e-4, atol=0) else None


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
