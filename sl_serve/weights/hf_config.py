"""config.json of a Hugging Face model folder -> ModelConfig, by the model's family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.models import GENERIC, Family, load_family, supported_families
from sl_serve.weights.fields import Fields


def model_config_from_hf(
    raw: Mapping[str, Any], generation: Mapping[str, Any], source: str
) -> ModelConfig:
    """`raw` is config.json, `generation` generation_config.json (or empty); `source` is named in
    messages. Raises ModelError for anything that would change the arithmetic unnoticed."""
    fields = Fields(raw, source)
    reader = _family(fields.text("model_type"), source)
    found = reader.model_config(fields, Fields(generation, "generation_config.json"))
    if not 0 <= found.experts_per_token <= found.n_experts:
        raise ModelError(
            f"{source}: a token asks {found.experts_per_token} experts, and there are "
            f"{found.n_experts}"
        )
    return found


def _family(name: str, source: str) -> Family:
    if name in supported_families():
        return load_family(name)
    try:
        return load_family(GENERIC)
    except ImportError as error:  # it is made for version 5
        raise ModelError(
            f"{source}: model type {name[:80]!r} has no family here, and to run it through "
            f"transformers' own modules this transformers is too old ({error}); there are: "
            + ", ".join(supported_families())
        ) from None
