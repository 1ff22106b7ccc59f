"""ModelConfig -> config.json, for models whose files have none."""

from __future__ import annotations

from typing import Any

from sl_serve.config import ModelConfig, RopeConfig


def hf_settings(config: ModelConfig) -> dict[str, Any]:
    """Of a llama: no other family comes from GGUF files."""
    assert config.family == "llama" and len(config.ropes) == 1
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": config.family,
        "hidden_act": "silu",
        "num_hidden_layers": config.n_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.ropes[0].theta,
        "rope_scaling": _rope_scaling(config.ropes[0]),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "eos_token_id": list(config.eos_token_ids),
        "bos_token_id": config.bos_token_id,
        "dtype": config.dtype,
    }


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    scaling = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "linear":
        return scaling
    return scaling | {
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }
