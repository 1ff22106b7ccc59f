"""What a config.json leaves out means what transformers takes it to mean; what the arithmetic does
not do is refused by name."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from transformers import AutoConfig

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.models import load_family
from sl_serve.models.parts import PartlyRotatedConfig, WindowedConfig
from sl_serve.weights.fields import Fields

SIZES = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = (
    "apertus",
    "arcee",
    "cohere",
    "cohere2",
    "exaone4",
    "glm",
    "glm4",
    "granite",
    "llama",
    "ministral",
    "mistral",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)
FULL, SLIDING = "full_attention", "sliding_attention"
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps")


def ours(family: str, **settings: Any) -> ModelConfig:
    raw = {"model_type": family, **SIZES, **settings}
    return load_family(family).model_config(Fields(raw, "config.json"), Fields({}, ""))


def sliding_layers(config: Any) -> tuple[int | None, ...]:
    """As transformers' class has it."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or [SLIDING] * config.num_hidden_layers
    return tuple(window if kind == SLIDING else None for kind in types)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_absent_is_as_in_transformers(family: str) -> None:
    found = asdict(ours(family))
    expected = AutoConfig.for_model(family, **SIZES)
    not_compared = {"dtype", "bos_token_id"}
    for name in (found.keys() & vars(expected).keys()) - not_compared:
        value = getattr(expected, name)
        assert found[name] == (16 if name == "head_dim" and value is None else value), name
    assert found["max_positions"] == expected.max_position_embeddings
    assert found["tie_embeddings"] == expected.tie_word_embeddings
    eps = [getattr(expected, name) for name in EPSILONS if hasattr(expected, name)]
    assert [found["norm_eps"]] == (eps or [1e-5])
    assert found.get("windows", (None,) * 8) == sliding_layers(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_rotary_parameters_are_as_in_transformers(family: str) -> None:
    config = ours(family)
    expected = AutoConfig.for_model(family, **SIZES).rope_parameters
    kinds = [expected[SLIDING], expected[FULL]] if FULL in expected else [expected]
    for rope, kind in zip(config.ropes, kinds, strict=True):
        assert (rope.kind, rope.theta) == (kind["rope_type"], kind["rope_theta"])
        share = kind.get("partial_rotary_factor") or 1.0
        assert (rope.n_dims or config.head_dim) == int(config.head_dim * share)


# Files that transformers 5 writes list their layers; those of version 4 have these instead.
USED = {"use_sliding_window": True, "sliding_window": 8}
UNLISTED = [
    ("cohere2", {"sliding_window_pattern": 3}),
    ("exaone4", {"sliding_window_pattern": 3}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", USED | {"max_window_layers": 3}),
    ("qwen2", {"sliding_window": 8, "max_window_layers": 0}),
    ("qwen3", USED | {"max_window_layers": 3}),
    ("smollm3", USED),
    ("smollm3", {"sliding_window": 8}),
]


@pytest.mark.parametrize(("family", "settings"), UNLISTED)
def test_layers_slide_as_in_transformers(family: str, settings: dict[str, Any]) -> None:
    expected = AutoConfig.for_model(family, **SIZES, **settings)
    found = ours(family, **settings)
    assert isinstance(found, WindowedConfig) and found.windows == sliding_layers(expected)


@pytest.mark.parametrize("settings", [{}, {"no_rope_layer_interval": 3}])
def test_layers_rotate_as_in_transformers(settings: dict[str, Any]) -> None:
    expected = AutoConfig.for_model("smollm3", **SIZES, **settings)
    found = ours("smollm3", **settings)
    assert isinstance(found, PartlyRotatedConfig)
    assert found.rotates == tuple(mark == 1 for mark in expected.no_rope_layers)


YARN = {"rope_type": "yarn", "factor": 4.0}
REFUSED = [
    *((family, {"hidden_act": "tanh"}, "hidden_act") for family in FAMILIES),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("qwen2", {"layer_types": [FULL] * 7 + ["chunked_attention"]}, "layer_types must be 8 times"),
    ("qwen2", {"layer_types": [FULL]}, "layer_types must be 8 times"),
    ("qwen3", {"layer_types": [FULL] * 7 + [[]]}, "layer_types must be 8 times"),
    ("qwen3", {"layer_types": [SLIDING] * 8}, "sliding_window is not set"),
    ("phi3", {"rope_scaling": YARN}, "only longrope"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must be 8 times"),
    ("smollm3", {"no_rope_layers": ["1"] * 8}, "no_rope_layers must be 8 times"),
    ("olmo3", {"rope_parameters": YARN}, "rotary parameters must be those"),
    ("olmo3", {"rope_parameters": [YARN]}, "rotary parameters must be those"),
    ("olmo3", {"rope_scaling": "yarn"}, "rotary parameters must be those"),
    ("exaone4", {"sliding_window_pattern": "LLLG"}, "sliding_window_pattern"),
]


@pytest.mark.parametrize(("family", "settings", "words"), REFUSED)
def test_what_is_not_done_is_refused(family: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: .*{words}"):
        ours(family, **settings)
