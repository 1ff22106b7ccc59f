"""Settings of well-known models, in the words of their config.json: what random weights need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _opt(n_layers: int, hidden: int, n_heads: int, **others: Any) -> Mapping[str, Any]:
    """arXiv 2205.01068, table 1."""
    return {
        "model_type": "opt",
        "num_hidden_layers": n_layers,
        "hidden_size": hidden,
        "num_attention_heads": n_heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "dtype": "float16",
        **others,
    }


def _llama(
    n_layers: int, hidden: int, inner: int, n_heads: int, n_kv_heads: int, **others: Any
) -> Mapping[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": n_layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        **others,
    }


def _llama3(
    n_layers: int, hidden: int, inner: int, n_heads: int, **others: Any
) -> Mapping[str, Any]:
    settings = {
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        **others,
    }
    return _llama(n_layers, hidden, inner, n_heads, 8, **settings)


def _llama31(n_layers: int, hidden: int, inner: int, n_heads: int) -> Mapping[str, Any]:
    return _llama3(
        n_layers, hidden, inner, n_heads, rope_scaling=_LLAMA31_ROPE, max_position_embeddings=131072
    )


_MIXTRAL: Mapping[str, Any] = {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_QWEN3_MOE: Mapping[str, Any] = {
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def _gpt_oss(n_layers: int, n_experts: int) -> Mapping[str, Any]:
    return {
        "model_type": "gpt_oss",
        "num_hidden_layers": n_layers,
        "num_local_experts": n_experts,
        "num_experts_per_tok": 4,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "eos_token_id": 200002,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "opt-125m": _opt(12, 768, 12),
    "opt-350m": _opt(24, 1024, 16, do_layer_norm_before=False, word_embed_proj_dim=512),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "opt-175b": _opt(96, 12288, 96),
    "tinyllama-1.1b": _llama(22, 2048, 5632, 32, 4, max_position_embeddings=2048),
    "llama-2-7b": _llama(32, 4096, 11008, 32, 32),
    "llama-2-13b": _llama(40, 5120, 13824, 40, 40),
    "llama-2-70b": _llama(80, 8192, 28672, 64, 8),
    "llama-3-8b": _llama3(32, 4096, 14336, 32),
    "llama-3-70b": _llama3(80, 8192, 28672, 64),
    "llama-3.1-8b": _llama31(32, 4096, 14336, 32),
    "llama-3.1-70b": _llama31(80, 8192, 28672, 64),
    "llama-3.1-405b": _llama31(126, 16384, 53248, 128),
    "mixtral-8x7b": _llama(
        32, 4096, 14336, 32, 8, max_position_embeddings=32768, rope_theta=1000000.0, **_MIXTRAL
    ),
    "qwen3-30b-a3b": _llama(48, 2048, 6144, 32, 4, **_QWEN3_MOE),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
}
