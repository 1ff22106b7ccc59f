"""Tiny checkpoints written by the formats' own libraries, for comparison with what we read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.weights.blocks import random_rows


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def write_tiny_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    kinds: Mapping[str, gguf.GGMLQuantizationType] = MappingProxyType({}),
    settings: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Writes `model` as llama.cpp's converter does, q and k permuted. Returns what was stored,
    dequantised, by GGUF name and still permuted. A setting of None leaves one out. `kinds`: of some
    matrices, by GGUF name; those that the package cannot write are random instead."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    keys = {
        "llama.vocab_size": config.vocab_size,  # read by transformers, not by us
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.eos_token_id": 7,
    }
    for key, value in (keys | (settings or {})).items():
        add_setting(writer, key, value)
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, kind = name.rsplit(".", 1)
        array = tensor.numpy()
        if ".q_proj" in name:
            array = permuted(array, config.num_attention_heads)
        if ".k_proj" in name:
            array = permuted(array, config.num_key_value_heads)
        stored[f"{name_map.get_name(stem)}.{kind}"] = array
    stored |= tensors or {}
    for name in without:
        del stored[name]
    for name, array in stored.items():
        is_matrix = array.ndim == 2
        used = kinds.get(name, quantisation) if is_matrix else gguf.GGMLQuantizationType.F32
        is_random = used.name.endswith("_K")
        packed = random_rows(used, *array.shape) if is_random else gguf.quantize(array, used)
        writer.add_tensor(name, packed, raw_dtype=used)
        stored[name] = gguf.dequantize(packed, used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def add_setting(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def permuted(array: np.ndarray, n_heads: int) -> np.ndarray:
    """Element by element, as an independent statement of the row order in the file."""
    head_dim = array.shape[0] // n_heads
    rows = [
        head * head_dim + half * (head_dim // 2) + pair
        for head in range(n_heads)
        for pair in range(head_dim // 2)
        for half in range(2)
    ]
    return array[rows]
