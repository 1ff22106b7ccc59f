"""OLMo 3: OLMo 2 with a window over the last tokens in most layers, which rotate in their own
way."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from sl_serve.config import RopeConfig
from sl_serve.errors import ModelError
from sl_serve.models import Block, RopeTable
from sl_serve.models.llama import head_input, hidden_states, static_tensors
from sl_serve.models.olmo2 import has_window, layer_params, new_tokens, second_half
from sl_serve.models.parts import WindowedConfig
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields, shown
from sl_serve.weights.gguf_dialect import WINDOWS, GgufDialect, listed_windows
from sl_serve.weights.hf_fields import decoder_fields, scaled_rope
from sl_serve.weights.hf_windows import FULL, SLIDING, layer_windows, sliding_window
from sl_serve.weights.layout import LayerWeights

__all__ = [
    "block",
    "head_input",
    "hidden_states",
    "layer_params",
    "model_config",
    "static_tensors",
]

ROPES = (SLIDING, FULL)  # the order of config.ropes


def _layers(fields: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, Any]:
    """The scaling is that of the layers that see all."""
    local = fields.get("rope_local_base_freq", fields["rope_theta"])
    kinds = {FULL: fields.get("rope_scaling") or {}, SLIDING: {"rope_theta": local}}
    return {**listed_windows(fields, tensors), "rope_parameters": kinds}


GGUF = GgufDialect(
    "olmo2",
    {**WINDOWS, "rope.freq_base_swa": "rope_local_base_freq"},
    derived=_layers,
    belongs=has_window,
)


def model_config(fields: Fields, generation: Fields) -> WindowedConfig:
    fields = fields.with_defaults(rms_norm_eps=1e-5, rope_theta=500000.0)
    fields.only("hidden_act", "silu")
    # What `decoder_fields` reads of rotary parameters is one kind of them.
    plain = Fields({**fields.values, "rope_parameters": None, "rope_scaling": None}, fields.source)
    decoder = decoder_fields(plain, generation)
    window = sliding_window(fields, absent=4096)
    return WindowedConfig(
        **decoder | {"ropes": ropes(fields, decoder["max_positions"], decoder["head_dim"])},
        attention_bias=fields.boolean("attention_bias", False),
        windows=layer_windows(fields, window, lambda layer: (layer + 1) % 4 != 0),
    )


def ropes(fields: Fields, max_positions: int, head_dim: int) -> tuple[RopeConfig, ...]:
    """transformers 4 writes the scaling of full layers alone, 5 the parameters of each kind."""
    given = fields.get("rope_parameters") or {FULL: fields.get("rope_scaling")}
    found = [given.get(kind) or {} for kind in ROPES] if isinstance(given, dict) else []
    usable = found and given.keys() <= set(ROPES) and all(isinstance(raw, dict) for raw in found)
    if not usable:
        raise ModelError(
            f"{fields.source}: rotary parameters must be those of {FULL!r} and {SLIDING!r}, "
            f"not {shown(given)}"
        )
    return tuple(scaled_rope(fields, raw, max_positions, head_dim) for raw in found)


def block(
    config: WindowedConfig,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    rope = ropes[ROPES.index(FULL if config.windows[layer] is None else SLIDING)]
    attended = yield new_tokens(config, ops, w, x, rope, config.scoring(layer))
    second_half(config, ops, w, x, attended)
