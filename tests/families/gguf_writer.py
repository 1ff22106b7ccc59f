"""Writes GGUF files as llama.cpp's convert_hf_to_gguf.py does, restated from there: names and keys
are the gguf package's, rows and numbers are changed element by element."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import PretrainedConfig, PreTrainedModel

from tests.models import BOS, EOS
from tests.weights.tiny_models import permuted

Kind = gguf.GGMLQuantizationType
Writer = gguf.GGUFWriter


def no_more(_writer: Writer, _config: PretrainedConfig) -> None:
    pass


def unchanged(_name: str, array: np.ndarray, _config: PretrainedConfig) -> np.ndarray:
    return array


@dataclass(frozen=True)
class Converter:
    """What is done for one architecture. `settings`: beside those of all."""

    arch: gguf.MODEL_ARCH
    settings: Callable[[Writer, PretrainedConfig], None] = no_more
    change: Callable[[str, np.ndarray, PretrainedConfig], np.ndarray] = unchanged
    # The end of a tensor's name -> the setting that lists those of all layers.
    numbers: Mapping[str, str] = field(default_factory=dict)
    # A tensor's name where the package has none any more.
    old_name: Callable[[str], str | None] = lambda _name: None


def for_rotated_neighbours(name: str, array: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    if "q_proj" in name:
        return permuted(array, config.num_attention_heads)
    return permuted(array, config.num_key_value_heads) if "k_proj" in name else array


def by_kind(name: str, array: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """All queries, all keys, all values, of a fused projection that has them by key head."""
    if "query_key_value" not in name:
        return array
    n_heads = config.num_attention_heads
    n_kv_heads = getattr(config, "num_kv_heads", None) or n_heads
    if getattr(config, "multi_query", False) and not config.new_decoder_architecture:
        n_kv_heads = 1
    dim, per_group = config.hidden_size // n_heads, n_heads // n_kv_heads
    rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    for row in range(len(array)):
        place = row // dim % (per_group + 2)
        rows["q" if place < per_group else "k" if place == per_group else "v"].append(row)
    return array[rows["q"] + rows["k"] + rows["v"]]


def with_one_more(name: str, array: np.ndarray, _config: PretrainedConfig) -> np.ndarray:
    return array + 1 if name.endswith("norm.weight") else array


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    how: Converter,
    kind: Kind = Kind.F32,
    part_tensors: int = 0,
    tensors: Mapping[str, torch.Tensor] | None = None,
    expert_kind: Kind | None = None,
) -> None:
    """`kind`: of matrices. `part_tensors`: at most so many in each of several files; 0: one
    file. `tensors`: by their published names, where the model has others. `expert_kind`: of
    experts' matrices, where not `kind`."""
    writer = gguf.GGUFWriter(
        str(path), gguf.MODEL_ARCH_NAMES[how.arch], split_max_tensors=part_tensors
    )
    write_common_settings(writer, model.config)
    how.settings(writer, model.config)
    write_tokenizer(writer, model.config.vocab_size)
    names = gguf.get_tensor_name_map(how.arch, model.config.num_hidden_layers)
    numbers: dict[str, list[float]] = {}
    for name, tensor in (tensors or model.state_dict()).items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if (setting := how.numbers.get(name.rpartition(".")[2])) is not None:
            numbers.setdefault(setting, []).append(tensor.item())
            continue
        there = name.replace("correction_bias", "correction.bias")
        stored = how.old_name(name)
        stored = stored or names.get_name(there.removeprefix("transformer."), (".weight", ".bias"))
        stored = stored or names.get_name(there, (".weight", ".bias"))
        assert stored is not None, name
        array = how.change(name, tensor.float().numpy(), model.config)
        used = (expert_kind or kind) if "_exps." in stored else kind
        divides = array.shape[-1] % gguf.GGML_QUANT_SIZES[used][0] == 0
        if array.ndim == 1 or stored.endswith(".bias") or not divides:
            used = Kind.F32
        writer.add_tensor(stored, gguf.quantize(array, used), raw_dtype=used)
    for setting, of_layers in numbers.items():
        writer.add_array(setting, of_layers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def with_stacked_experts(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, each matrix of all experts of a layer as one."""
    found = load_file(folder / "model.safetensors")
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name in [name for name in found if ".experts." in name]:
        before, after = name.split(".experts.")
        number, rest = after.split(".", 1)
        stacks.setdefault(f"{before}.experts.{rest}", {})[int(number)] = found.pop(name)
    return found | {n: torch.stack([s[i] for i in range(len(s))]) for n, s in stacks.items()}


def with_joined_projections(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries, keys and values of a layer in one matrix, as the first files of GLM have them."""
    kinds = ("q_proj", "k_proj", "v_proj")
    joined = {}
    for name, tensor in found.items():
        if kinds[0] in name:
            parts = [found[name.replace(kinds[0], kind)] for kind in kinds]
            joined[name.replace(kinds[0], "qkv_proj")] = torch.cat(parts)
        elif not any(kind in name for kind in kinds):
            joined[name] = tensor
    return joined


def with_gates_apart(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a gpt-oss: of its experts' (experts, out, in), gates and what they let pass,
    which are outputs by turns, each in one of its own."""
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".experts." not in name:
            found[f"{name}.weight" if name.endswith("sinks") else name] = tensor
            continue
        module = name.removesuffix("_bias")
        end = ".weight" if name == module else ".bias"
        outputs_first = tensor.transpose(1, -1)  # vectors have no other dimension
        turns = ("gate_proj", "up_proj") if "gate_up_proj" in name else ("down_proj",)
        for turn, part in enumerate(turns):
            outputs = outputs_first[:, turn :: len(turns)].contiguous()
            found[f"{module.rpartition('.')[0]}.{part}{end}"] = outputs
    return found


def write_common_settings(writer: Writer, config: PretrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(getattr(config, "max_position_embeddings", 2048))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(inner_size(config))
    writer.add_head_count(config.num_attention_heads)
    if hasattr(config, "num_key_value_heads"):
        writer.add_head_count_kv(config.num_key_value_heads)
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if hasattr(config, name):
            writer.add_layer_norm_eps(getattr(config, name))
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        write_rope(writer, config, rope)


def inner_size(config: PretrainedConfig) -> int:
    """Older families have other names for it, whatever else tests give them."""
    for name in ("ffn_hidden_size", "n_inner"):
        if hasattr(config, name):
            return getattr(config, name) or 4 * config.hidden_size
    return config.intermediate_size


def write_rope(writer: Writer, config: PretrainedConfig, rope: Mapping[str, Any]) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if rope.get("attention_factor") is not None:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1) * head_dim))


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """What each frequency is divided by: nothing short of `high_freq_factor` turns in the original
    context, `factor` beyond `low_freq_factor`, between them a blend."""
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def write_tokenizer(writer: Writer, vocab_size: int) -> None:
    """As tests.models writes it, with one merge, without which there is no BPE."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), EOS, BOS, "ab"]
    n_padding = vocab_size - len(tokens)
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in range(n_padding))])
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * n_padding])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(257)
