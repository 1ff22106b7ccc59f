"""Settings of a GGUF file -> fields of config.json, which the model's family reads."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sl_serve.errors import ModelError
from sl_serve.models import load_family, supported_families
from sl_serve.weights.fields import Fields, shown
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.gguf_header import GgufTensor
from sl_serve.weights.gguf_names import predicting_layers
from sl_serve.weights.gguf_rope import ROPE_SETTINGS, Factors, rope_fields

_SIZES = {  # integers that every model has
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_NAMES = _SIZES | {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
}
_READ_APART = ROPE_SETTINGS | {
    "attention.key_length",
    "attention.value_length",
    "expert_count",
    "expert_used_count",
    "nextn_predict_layers",  # the names of tensors say it
    "rope.dimension_count",
    "tensor_data_layout",  # how the tensors once lay elsewhere
    "vocab_size",  # the embeddings have one
}
_MAX_EXPERTS = 1024  # of a layer; twice as many as any model has


def find_dialect(
    architecture: str, settings: Mapping[str, Any], tensors: Collection[str], path: Path
) -> tuple[str, GgufDialect]:
    """The family and its statement. Raises ModelError, naming the architectures there are."""
    fields = Fields(settings, str(path), prefix=f"{architecture}.")
    has_experts = fields.integer("expert_count", 0, low=0, high=_MAX_EXPERTS) > 0
    wanted = (architecture, has_experts)
    dialects = {name: getattr(load_family(name), "GGUF", None) for name in supported_families()}
    for family, dialect in dialects.items():
        if dialect is None or (dialect.architecture, dialect.has_experts) != wanted:
            continue
        if dialect.belongs(settings, tensors):
            return family, dialect
    known = ", ".join(sorted({d.architecture for d in dialects.values() if d is not None}))
    what = f"architecture {architecture[:80]!r}{' with experts' if has_experts else ''}"
    gating = fields.get("expert_gating_func")
    what += "" if gating is None else f" and expert_gating_func {shown(gating)}"
    raise ModelError(f"{path}: GGUF files of {what} are not supported; supported: {known}")


def config_fields(
    family: str,
    dialect: GgufDialect,
    settings: Mapping[str, Any],
    tensors: Mapping[str, GgufTensor],
    factors: Factors,
    path: Path,
) -> dict[str, Any]:
    """`factors`: the content of ROPE_TENSORS. Raises ModelError for a setting that has no meaning
    here: to leave it out could change the results unnoticed."""
    fields = Fields(settings, str(path), prefix=f"{dialect.architecture}.")
    names = {**_NAMES, **dialect.settings}
    _check_known(fields, {*names, *dialect.read_apart})
    if not dialect.has_experts:
        fields.only("expert_used_count", 0)
    sizes = {names[key]: fields.integer(key) for key in _SIZES}
    sizes["num_hidden_layers"] = min([sizes["num_hidden_layers"], *predicting_layers(tensors)])
    hidden_size, n_heads = (fields.integer(k) for k in ("embedding_length", "attention.head_count"))
    head_dim = fields.integer("attention.key_length", max(1, hidden_size // n_heads))
    if "attention.value_length" not in dialect.read_apart:
        fields.only("attention.value_length", head_dim)
    if dialect.rotary_share is None and "rope.dimension_count" not in dialect.read_apart:
        fields.only("rope.dimension_count", head_dim)
    n_dims = fields.integer("rope.dimension_count", head_dim, high=head_dim)
    found = {
        "model_type": family,
        "dtype": "float32",
        "vocab_size": _vocab_size(tensors, path),
        "head_dim": head_dim,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": _any_bias(tensors, "attn_"),
        "mlp_bias": _any_bias(tensors, "ffn_"),
        **_tokens(Fields(settings, str(path), prefix="tokenizer.ggml.")),
        **rope_fields(fields, head_dim, n_dims, factors),
        **_renamed(fields, names),
        **sizes,
    }
    if dialect.rotary_share is not None:
        # just above, so that it times a head is never rounded down
        found[dialect.rotary_share] = math.nextafter(n_dims / head_dim, 1.0)
    found |= dialect.read(fields, found)
    return {**found, **dialect.derived(found, tensors.keys())}


def _check_known(fields: Fields, names: Collection[str]) -> None:
    for key in fields.values:
        name = key.removeprefix(fields.prefix)
        if name != key and name not in names and name not in _READ_APART:
            raise ModelError(f"{fields.source}: the setting {key[:120]!r} is not supported")


def _vocab_size(tensors: Mapping[str, GgufTensor], path: Path) -> int:
    embeddings = tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise ModelError(f"{path}: no embeddings (token_embd.weight)")
    return embeddings.shape[0]


def _any_bias(names: Collection[str], part: str) -> bool:
    """On a product; norms have biases of their own."""
    biases = (name for name in names if name.endswith(".bias") and "norm" not in name)
    return any(f".{part}" in name for name in biases)


def _tokens(fields: Fields) -> dict[str, Any]:
    """End of text, and where they are named apart, end of turn and end of message."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = {fields.integer(key, low=0) for key in keys if key in fields}
    found: dict[str, Any] = {"eos_token_id": sorted(ids)}
    if "bos_token_id" in fields:
        found["bos_token_id"] = fields.integer("bos_token_id", low=0)
    return found


def _renamed(fields: Fields, names: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for key, name in names.items():
        value = fields.get(key)
        is_absent = value is None or (name == "sliding_window" and not np.any(value))
        if not is_absent:  # no window is written as one of no tokens
            found[name] = value.tolist() if isinstance(value, np.ndarray) else value
    return found
