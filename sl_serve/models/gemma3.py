"""Gemma 3 with eyes: its text part alone, which knows no images."""

from __future__ import annotations

from dataclasses import replace

from sl_serve.errors import ModelError
from sl_serve.models import StaticTensors, gemma3_text
from sl_serve.models.gemma2 import Gemma2Config
from sl_serve.weights.fields import Fields, shown
from sl_serve.weights.layout import Param

# What stands beside the settings of the text part.
SHARED = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id")

block, hidden_states = gemma3_text.block, gemma3_text.hidden_states
head_input = gemma3_text.head_input


def model_config(fields: Fields, generation: Fields) -> Gemma2Config:
    text = fields.get("text_config")
    if not isinstance(text, dict):
        raise ModelError(f"{fields.source}: text_config must be an object, not {shown(text)}")
    shared = {key: fields.get(key) for key in SHARED}
    shared["tie_word_embeddings"] = fields.boolean("tie_word_embeddings", True)
    of_text = Fields(shared, f"{fields.source}: text_config").or_else(text)
    of_text.only("model_type", "gemma3_text")
    config = gemma3_text.model_config(of_text.or_else({"model_type": "gemma3_text"}), generation)
    return replace(config, family=fields.text("model_type"))


def layer_params(config: Gemma2Config) -> tuple[Param, ...]:
    return tuple(
        replace(param, sources=tuple(map(_nested, param.sources)))
        for param in gemma3_text.layer_params(config)
    )


def static_tensors(config: Gemma2Config) -> StaticTensors:
    tensors = gemma3_text.static_tensors(config)
    return {ours: (_nested(name), shape) for ours, (name, shape) in tensors.items()}


def _nested(name: str) -> str:
    is_inner = name.startswith("model.")
    return "model.language_model." + name.removeprefix("model.") if is_inner else name
