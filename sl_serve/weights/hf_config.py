"""config.json of a Hugging Face model folder -> ModelConfig, one function per dialect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sl_serve.config import DTypeName, ModelConfig, RopeConfig
from sl_serve.errors import ModelError
from sl_serve.weights.families import check_family, check_heads
from sl_serve.weights.fields import MAX_LAYERS, Fields, shown

_STORED_DTYPES: dict[str, DTypeName] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}


def model_config_from_hf(
    raw: Mapping[str, Any], generation: Mapping[str, Any], source: str
) -> ModelConfig:
    """`raw` is config.json, `generation` generation_config.json (or empty); `source` is named in
    messages. Raises ModelError for anything that would change the arithmetic unnoticed."""
    fields = Fields(raw, source)
    family = fields.text("model_type")
    check_family(family, _DIALECTS, source)
    return _DIALECTS[family](fields, Fields(generation, "generation_config.json"))


def _llama(fields: Fields, generation: Fields) -> ModelConfig:
    fields.only("hidden_act", "silu")
    n_heads = fields.integer("num_attention_heads")
    n_kv_heads = fields.integer("num_key_value_heads", n_heads)
    hidden_size = fields.integer("hidden_size")
    vocab_size = fields.integer("vocab_size")
    max_positions = fields.integer("max_position_embeddings", 2048)
    head_dim = fields.integer("head_dim", hidden_size // n_heads)
    check_heads(n_heads, n_kv_heads, head_dim, fields.source)
    return ModelConfig(
        family=fields.text("model_type"),
        n_layers=fields.integer("num_hidden_layers", high=MAX_LAYERS),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_positions=max_positions,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, max_positions),
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
        dtype=_stored_dtype(fields),
        eos_token_ids=_eos_token_ids(fields, generation, vocab_size),
        bos_token_id=_bos_token_id(fields, vocab_size),
    )


def _opt(fields: Fields, generation: Fields) -> ModelConfig:
    fields.only("activation_function", "relu")
    fields.only("layer_norm_elementwise_affine", True)
    n_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    if hidden_size % n_heads:
        raise ModelError(f"{fields.source}: {n_heads} heads cannot share {hidden_size} elements")
    vocab_size = fields.integer("vocab_size")
    norm_first = fields.boolean("do_layer_norm_before", True)
    has_biases = fields.boolean("enable_bias", True)
    embed_size = fields.integer("word_embed_proj_dim", hidden_size)
    return ModelConfig(
        family=fields.text("model_type"),
        n_layers=fields.integer("num_hidden_layers", high=MAX_LAYERS),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("ffn_dim"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=hidden_size // n_heads,
        vocab_size=vocab_size,
        max_positions=fields.integer("max_position_embeddings", 2048),
        norm_eps=1e-5,  # the same in all of them, and not among the settings
        rope=None,
        tie_embeddings=fields.boolean("tie_word_embeddings", True),
        attention_bias=has_biases,
        mlp_bias=has_biases,
        norm_first=norm_first,
        final_norm=norm_first and not fields.boolean("_remove_final_layer_norm", False),
        embed_size=None if embed_size == hidden_size else embed_size,
        dtype=_stored_dtype(fields),
        eos_token_ids=_eos_token_ids(fields, generation, vocab_size),
        bos_token_id=_bos_token_id(fields, vocab_size),
    )


def _rope(fields: Fields, max_positions: int) -> RopeConfig:
    """transformers 4 writes rope_theta and rope_scaling, 5 joins them in rope_parameters."""
    raw = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
        raise ModelError(f"{fields.source}: rotary parameters per layer type are not supported")
    scaling = Fields(raw, f"{fields.source}: rotary parameters")
    for holder in (fields, scaling):
        holder.only("partial_rotary_factor", 1.0)
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10000.0))
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", scaling.number("factor"))
    if kind == "llama3":
        return RopeConfig(
            theta,
            "llama3",
            scaling.number("factor"),
            scaling.number("low_freq_factor"),
            scaling.number("high_freq_factor"),
            scaling.integer("original_max_position_embeddings", max_positions),
        )
    raise ModelError(
        f"{fields.source}: rotary scaling {kind[:40]!r} is not supported (default, linear, llama3)"
    )


def _eos_token_ids(fields: Fields, generation: Fields, vocab_size: int) -> tuple[int, ...]:
    ids = _token_ids(fields, "eos_token_id", vocab_size)
    return tuple(sorted(ids | _token_ids(generation, "eos_token_id", vocab_size)))


def _bos_token_id(fields: Fields, vocab_size: int) -> int | None:
    return min(_token_ids(fields, "bos_token_id", vocab_size), default=None)


def _token_ids(fields: Fields, key: str, vocab_size: int) -> set[int]:
    """One id, a list of ids or nothing. Ids outside the vocabulary can never be drawn."""
    value = fields.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int for item in ids):
        raise ModelError(f"{fields.source}: {key} must be token ids, not {shown(value)}")
    return {item for item in ids if 0 <= item < vocab_size}


def _stored_dtype(fields: Fields) -> DTypeName:
    name = fields.text("dtype", fields.text("torch_dtype", "float32"))
    if name not in _STORED_DTYPES:
        known = ", ".join(_STORED_DTYPES)
        raise ModelError(f"{fields.source}: dtype {name[:40]!r} is not supported ({known})")
    return _STORED_DTYPES[name]


_DIALECTS: dict[str, Callable[[Fields, Fields], ModelConfig]] = {"llama": _llama, "opt": _opt}
