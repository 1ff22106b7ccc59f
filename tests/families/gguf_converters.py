"""What llama.cpp's converter does for each family, beside what it does for all."""

from __future__ import annotations

import re
from collections.abc import Mapping

import gguf
import numpy as np
import torch
from transformers import PretrainedConfig

from tests.families.gguf_writer import (
    Converter,
    Writer,
    by_kind,
    for_rotated_neighbours,
    with_one_more,
    write_rope,
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


def qwen2_moe(writer: Writer, config: PretrainedConfig) -> None:
    experts(writer, config)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def gate_as_vector(name: str, array: np.ndarray, _config: PretrainedConfig) -> np.ndarray:
    return array.reshape(-1) if name.endswith("shared_expert_gate.weight") else array


def deepseek(writer: Writer, config: PretrainedConfig) -> None:
    older_deepseek(writer, config)
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    if config.model_type == "deepseek_v2":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    if config.n_group is not None:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def older_deepseek(writer: Writer, config: PretrainedConfig) -> None:
    """Groups of experts were left out, and so was the softmax of the second generation."""
    writer.add_key_length(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length(config.v_head_dim)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    if config.model_type == "deepseek_v3":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config.rope_parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_yarn_log_mul(0.1 * config.rope_parameters["mscale_all_dim"])


def with_kv_b_apart(
    tensors: Mapping[str, torch.Tensor], config: PretrainedConfig
) -> dict[str, torch.Tensor]:
    """What newer files have instead of attention's kv_b."""
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith("kv_b_proj.weight")]:
        k_b, v_b = [], []
        for head in found.pop(name).chunk(config.num_attention_heads):
            k_b.append(head[: config.qk_nope_head_dim].t())
            v_b.append(head[config.qk_nope_head_dim :])
        found[name.replace("kv_b", "k_b")] = torch.stack(k_b)
        found[name.replace("kv_b", "v_b")] = torch.stack(v_b)
    return found


def falcon(writer: Writer, config: PretrainedConfig) -> None:
    writer.add_tensor_data_layout("jploski")
    multi_query = config.multi_query and not config.new_decoder_architecture
    writer.add_head_count_kv(1 if multi_query else config.num_kv_heads)


def windows(writer: Writer, config: PretrainedConfig) -> None:
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in config.layer_types])


def olmo3(writer: Writer, config: PretrainedConfig) -> None:
    windows(writer, config)
    ropes = config.rope_parameters
    write_rope(writer, config, ropes["full_attention"])
    writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])


def mpt(writer: Writer, config: PretrainedConfig) -> None:
    writer.add_feed_forward_length(4 * config.d_model)
    writer.add_head_count_kv(config.n_heads)  # not written, and the same as if it were
    writer.add_max_alibi_bias(config.attn_config.alibi_bias_max)
    if config.attn_config.clip_qkv is not None:
        writer.add_clamp_kqv(config.attn_config.clip_qkv)


def expert_by_itself(name: str) -> str | None:
    """As before experts were stacked."""
    pattern = r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight"
    match = re.fullmatch(pattern, name)
    if match is None:
        return None
    layer, expert, matrix = match.groups()
    kind = {"w1": "gate", "w2": "down", "w3": "up"}[matrix]
    return f"blk.{layer}.ffn_{kind}.{expert}.weight"


CONVERTERS: Mapping[str, Converter] = {
    "llama": Converter(Arch.LLAMA, change=for_rotated_neighbours),
    "mistral": Converter(Arch.LLAMA, change=for_rotated_neighbours),
    "mixtral": Converter(Arch.LLAMA, experts, for_rotated_neighbours),
    "qwen3_moe": Converter(Arch.QWEN3MOE, experts),
    "qwen2_moe": Converter(Arch.QWEN2MOE, qwen2_moe, gate_as_vector),
    "deepseek_v2": Converter(Arch.DEEPSEEK2, deepseek),
    "deepseek_v3": Converter(Arch.DEEPSEEK2, deepseek),
    "gpt_oss": Converter(Arch.GPT_OSS, gpt_oss),
    "qwen2": Converter(Arch.QWEN2),
    "qwen3": Converter(Arch.QWEN3),
    "phi3": Converter(Arch.PHI3, phi3),
    "olmo2": Converter(Arch.OLMO2),
    "granite": Converter(Arch.GRANITE, granite, for_rotated_neighbours),
    "olmo": Converter(Arch.OLMO, olmo, for_rotated_neighbours),
    "arcee": Converter(Arch.ARCEE, change=for_rotated_neighbours),
    "glm": Converter(Arch.CHATGLM),
    "glm4": Converter(Arch.GLM4),
    "olmo3": Converter(Arch.OLMO2, olmo3),
    "exaone4": Converter(Arch.EXAONE4, windows),
    "mpt": Converter(Arch.MPT, mpt),
    "apertus": Converter(
        Arch.APERTUS,
        numbers={name: f"xielu.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")},
    ),
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
