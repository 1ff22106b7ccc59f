"""What llama.cpp's converter does for each family, beside what it does for all."""

from __future__ import annotations

from collections.abc import Mapping

import gguf
import numpy as np
from transformers import PretrainedConfig

from tests.families.gguf_writer import (
    Converter,
    Writer,
    by_kind,
    for_rotated_neighbours,
    with_one_more,
)

Arch = gguf.MODEL_ARCH


def phi3(writer: Writer, config: PretrainedConfig) -> None:
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(config.sliding_window or 0)
    rope = config.rope_parameters
    if rope["rope_type"] == "longrope":
        share = config.max_position_embeddings / config.original_max_position_embeddings
        amplitude = np.sqrt(1 + np.log(share) / np.log(config.original_max_position_embeddings))
        writer.add_rope_scaling_attn_factors(amplitude if share > 1 else 1.0)
        for length in ("long", "short"):
            factors = np.array(rope[f"{length}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)


def granite(writer: Writer, config: PretrainedConfig) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def gemma2(writer: Writer, config: PretrainedConfig) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def gemma3(writer: Writer, config: PretrainedConfig) -> None:
    rope = config.rope_parameters["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_sliding_window(config.sliding_window)
    local = config.rope_parameters["sliding_attention"]["rope_theta"]
    if local != 10000:
        writer.add_rope_freq_base_swa(local)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def cohere(writer: Writer, config: PretrainedConfig) -> None:
    writer.add_logit_scale(config.logit_scale)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    if hasattr(config, "sliding_window"):
        writer.add_sliding_window(config.sliding_window)


def olmo(writer: Writer, config: PretrainedConfig) -> None:
    writer.add_layer_norm_eps(1e-5)
    if config.clip_qkv is not None:
        writer.add_clamp_kqv(config.clip_qkv)


def nemotron(writer: Writer, config: PretrainedConfig) -> None:
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def gpt2(writer: Writer, config: PretrainedConfig) -> None:
    writer.add_head_count_kv(1 if getattr(config, "multi_query", False) else config.n_head)


def stored_out_in(name: str, array: np.ndarray, _config: PretrainedConfig) -> np.ndarray:
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return np.ascontiguousarray(array.T) if name.endswith(ends) else array


def stablelm(writer: Writer, config: PretrainedConfig) -> None:
    writer.add_parallel_residual(config.use_parallel_residual)


def experts(writer: Writer, config: PretrainedConfig) -> None:
    counts = (getattr(config, name, None) for name in ("num_local_experts", "num_experts"))
    writer.add_expert_count(next(n for n in counts if n is not None))
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def gpt_oss(writer: Writer, config: PretrainedConfig) -> None:
    experts(writer, config)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_sliding_window(config.sliding_window)


def gpt_neox(writer: Writer, config: PretrainedConfig) -> None:
    writer.add_parallel_residual(config.use_parallel_residual)


def falcon(writer: Writer, config: PretrainedConfig) -> None:
    writer.add_tensor_data_layout("jploski")
    multi_query = config.multi_query and not config.new_decoder_architecture
    writer.add_head_count_kv(1 if multi_query else config.num_kv_heads)


CONVERTERS: Mapping[str, Converter] = {
    "llama": Converter(Arch.LLAMA, change=for_rotated_neighbours),
    "mistral": Converter(Arch.LLAMA, change=for_rotated_neighbours),
    "mixtral": Converter(Arch.LLAMA, experts, for_rotated_neighbours),
    "qwen3_moe": Converter(Arch.QWEN3MOE, experts),
    "gpt_oss": Converter(Arch.GPT_OSS, gpt_oss),
    "qwen2": Converter(Arch.QWEN2),
    "qwen3": Converter(Arch.QWEN3),
    "phi3": Converter(Arch.PHI3, phi3),
    "olmo2": Converter(Arch.OLMO2),
    "granite": Converter(Arch.GRANITE, granite, for_rotated_neighbours),
    "olmo": Converter(Arch.OLMO, olmo, for_rotated_neighbours),
    "arcee": Converter(Arch.ARCEE, change=for_rotated_neighbours),
    "glm4": Converter(Arch.GLM4),
    "nemotron": Converter(Arch.NEMOTRON, nemotron, with_one_more),
    "seed_oss": Converter(Arch.SEED_OSS),
    "stablelm": Converter(Arch.STABLELM, stablelm),
    "starcoder2": Converter(Arch.STARCODER2),
    "cohere": Converter(Arch.COMMAND_R, cohere),
    "cohere2": Converter(Arch.COHERE2, cohere),
    "smollm3": Converter(Arch.SMOLLM3, change=for_rotated_neighbours),
    "gemma": Converter(Arch.GEMMA, change=with_one_more),
    "gemma2": Converter(Arch.GEMMA2, gemma2, with_one_more),
    "gemma3_text": Converter(Arch.GEMMA3, gemma3, with_one_more),
    "gpt_neox": Converter(Arch.GPTNEOX, gpt_neox, by_kind),
    "phi": Converter(Arch.PHI2),
    "bloom": Converter(Arch.BLOOM, gpt2, by_kind),
    "gpt2": Converter(Arch.GPT2, gpt2, stored_out_in),
    "gpt_bigcode": Converter(Arch.STARCODER, gpt2),
    "falcon": Converter(Arch.FALCON, falcon, by_kind),
}
