"""config.json of a Hugging Face model folder -> ModelConfig, by the model's family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sl_serve.config import ModelConfig
from sl_serve.models import GENERIC, load_family, supported_families
from sl_serve.weights.fields import Fields


def model_config_from_hf(
    raw: Mapping[str, Any], generation: Mapping[str, Any], source: str
) -> ModelConfig:
    """`raw` is config.json, `generation` generation_config.json (or empty); `source` is named in
    messages. Raises ModelError for anything that would change the arithmetic unnoticed."""
    fields = Fields(raw, source)
    family = fields.text("model_type")
    reader = load_family(family if family in supported_families() else GENERIC)
    return reader.model_config(fields, Fields(generation, "generation_config.json"))
