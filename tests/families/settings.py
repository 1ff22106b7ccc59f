"""What a family reads from a config.json."""

from __future__ import annotations

from typing import Any

from sl_serve.config import ModelConfig
from sl_serve.weights.hf_config import model_config_from_hf
from tests.families.harness import COMMON, Tiny


def config_of(tiny: Tiny, **changes: Any) -> ModelConfig:
    """Of the tiny model as transformers writes it; "absent" takes a key away."""
    raw = tiny.config(**{**COMMON, **tiny.settings}).to_dict() | changes
    raw = {
        key: value for key, value in raw.items() if not isinstance(value, str) or value != "absent"
    }
    return model_config_from_hf(raw, {}, "config.json")
