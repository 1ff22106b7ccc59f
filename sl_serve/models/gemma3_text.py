"""Gemma 3: Gemma 2 with normed queries and keys, and a rotation of its own in windowed layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sl_serve.config import RopeConfig
from sl_serve.errors import ModelError
from sl_serve.models import Block, RopeTable, gemma2
from sl_serve.models.gemma import PREFIX, norm
from sl_serve.models.gemma2 import Gemma2Config
from sl_serve.models.parts import new_tokens_of, vector_param
from sl_serve.ops import Ops
from sl_serve.weights.fields import Fields, shown
from sl_serve.weights.gguf_dialect import GgufDialect
from sl_serve.weights.hf_fields import decoder_fields, scaled_rope
from sl_serve.weights.hf_windows import FULL, SLIDING
from sl_serve.weights.layout import LayerWeights, Param

# transformers' own: the folders of the larger models leave out what is equal to these.
DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
ROTARY = ("rope_parameters", "rope_scaling")

static_tensors = gemma2.static_tensors
hidden_states, head_input = gemma2.hidden_states, gemma2.head_input


GGUF = GgufDialect(
    "gemma3",
    {
        "attention.sliding_window_pattern": "sliding_window_pattern",
        "final_logit_softcapping": "final_logit_softcapping",
        "rope.freq_base_swa": "rope_local_base_freq",
    },
    derived=gemma2.score_scale(62),
    norm_offset=1,
)


def model_config(fields: Fields, generation: Fields) -> Gemma2Config:
    fields.only("attn_logit_softcapping", None)
    fields = fields.or_else(DEFAULTS)
    others = {key: value for key, value in fields.values.items() if key not in ROTARY}
    settings = decoder_fields(Fields(others, fields.source), generation)
    return Gemma2Config(
        **settings | {"ropes": _ropes(fields)},
        **gemma2.attention_fields(fields, fields.integer("sliding_window_pattern", 6)),
        logit_softcap=gemma2.softcap(fields, "final_logit_softcapping", None),
        score_softcap=None,
    )


def _ropes(fields: Fields) -> tuple[RopeConfig, ...]:
    """Of windowed layers, of those that see all. transformers 4 writes the bases of both, and
    rope_scaling for the latter."""
    given, scaling = (fields.get(key) or {} for key in ROTARY)
    known = isinstance(given, dict) and given.keys() <= {SLIDING, FULL}
    if not known or not all(isinstance(p, dict | None) for p in (scaling, *given.values())):
        raise ModelError(
            f"{fields.source}: rope_parameters must be those of {SLIDING} and {FULL}, "
            f"not {shown(given)}"
        )
    raw = {
        SLIDING: {"rope_theta": fields.number("rope_local_base_freq", 1e4)},
        FULL: {"rope_theta": fields.number("rope_theta", 1e6), **scaling},
    }
    max_positions, head_dim = (fields.integer(k) for k in ("max_position_embeddings", "head_dim"))
    return tuple(
        scaled_rope(fields, {**raw[kind], **(given.get(kind) or {})}, max_positions, head_dim)
        for kind in (SLIDING, FULL)
    )


def layer_params(config: Gemma2Config) -> tuple[Param, ...]:
    attn, size = PREFIX + "self_attn.", config.head_dim
    return (
        *gemma2.layer_params(config),
        vector_param("q_norm", attn + "q_norm.weight", size),
        vector_param("k_norm", attn + "k_norm.weight", size),
    )


def block(
    config: Gemma2Config,
    ops: Ops,
    layer: int,
    w: LayerWeights,
    x: torch.Tensor,
    ropes: Sequence[RopeTable],
) -> Block:
    new = new_tokens_of(config, gemma2.projected(config, ops, w, x), gemma2.scoring(config, layer))
    rope = ropes[0 if config.windowed[layer] else 1]
    for heads, weight in (new.q, w["q_norm"]), (new.k, w["k_norm"]):
        flat = heads.reshape(-1, config.head_dim)
        heads.copy_(norm(config, ops, flat, weight).view(heads.shape))
        ops.rope_(heads, *rope)
    attended = yield new
    gemma2.add_rest(config, ops, w, x, attended)
