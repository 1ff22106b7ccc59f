"""config.json of any decoder that transformers knows -> ModelConfig, or the reason why not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from sl_serve.config import ModelConfig, RopeConfig
from sl_serve.errors import ModelError
from sl_serve.models import GENERIC, supported_families
from sl_serve.models.generic.self_check import check
from sl_serve.models.generic.skeleton import Skeleton
from sl_serve.models.generic.tap import UnfitError
from sl_serve.weights.fields import MAX_LAYERS, Fields, shown
from sl_serve.weights.hf_fields import bos_token_id, eos_token_ids, stored_dtype

# Of config.json: code, which is never run; how weights are stored (weights/published/ reads that);
# and what the engine decides.
_NOT_THE_MODULES = {
    "auto_map",
    "quantization_config",
    "_attn_implementation",
    "attn_implementation",
    "dtype",
    "torch_dtype",
    "output_attentions",
    "output_hidden_states",
    "use_cache",
}
_ATTENDING = {"full_attention", "sliding_attention"}
# All texts of a batch are turned as its longest one asks.
_TURNING_TOGETHER = {"dynamic", "longrope"}


@dataclass(frozen=True, slots=True)
class GenericConfig(ModelConfig):
    skeleton: Skeleton = field(kw_only=True, compare=False, repr=False)


def read(fields: Fields, generation: Fields) -> GenericConfig:
    """Raises ModelError, with the reason, for what cannot be run."""
    model_type = fields.text("model_type")
    try:
        settings = _settings(model_type, fields)
        skeleton = Skeleton(copy.deepcopy(settings))
        check(settings)
    except Exception as error:  # whatever a module raises that is used as nobody meant it to be
        supported = ", ".join(supported_families())
        raise ModelError(
            f"{fields.source}: architecture {model_type[:80]!r} is not supported, and cannot run "
            f"through transformers {transformers.__version__} ({_reason(error)}); "
            f"supported: {supported}"
        ) from None
    return _described(skeleton, settings, fields, generation)


def _settings(model_type: str, fields: Fields) -> Any:
    """transformers' own. Raises UnfitError for what is known not to work."""
    if int(transformers.__version__.split(".")[0]) < 5:
        raise UnfitError("of which version 5 is needed")
    if model_type not in CONFIG_MAPPING:
        raise UnfitError("which does not know it")
    values = {k: v for k, v in fields.values.items() if k not in _NOT_THE_MODULES}
    settings = CONFIG_MAPPING[model_type].from_dict(values)
    for reason in _reasons(settings):
        raise UnfitError(reason)
    return settings


def _reasons(settings: Any) -> Iterator[str]:
    """Why it cannot be run, as far as settings tell."""
    if settings.is_encoder_decoder:
        yield "it has an encoder beside its decoder"
    if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        yield "it is no decoder that writes text"
    if settings.get_text_config() is not settings:
        yield "it has parts beside its text decoder"
    kinds = set(getattr(settings, "layer_types", None) or ()) - _ATTENDING
    if kinds:
        yield f"layers of the kind {shown(min(kinds))} are not attention over earlier tokens alone"
    turning = _TURNING_TOGETHER & set(_rope_types(getattr(settings, "rope_parameters", None)))
    if turning:
        yield f"its rotary positions are scaled by the kind {min(turning)!r}"
    n_layers = settings.num_hidden_layers
    if type(n_layers) is not int or not 0 < n_layers <= MAX_LAYERS:
        yield f"it has {shown(n_layers)} layers"


def _rope_types(parameters: object) -> Iterator[str]:
    """Of all layers: parameters may be given for each kind of them."""
    if isinstance(parameters, dict):
        yield str(parameters.get("rope_type"))
        for value in parameters.values():
            yield from _rope_types(value)


def _described(
    skeleton: Skeleton, settings: Any, fields: Fields, generation: Fields
) -> GenericConfig:
    names = ("eos_token_id", "bos_token_id")
    own = Fields({name: getattr(settings, name, None) for name in names}, fields.source)
    vocab_size, width = skeleton.module.embed.weight.shape
    return GenericConfig(
        family=GENERIC,
        n_layers=skeleton.n_layers,
        hidden_size=skeleton.hidden_size,
        intermediate_size=_intermediate_size(skeleton),
        n_heads=skeleton.heads.n_heads,
        n_kv_heads=skeleton.heads.n_kv_heads,
        head_dim=skeleton.heads.head_dim,
        vocab_size=vocab_size,
        max_positions=settings.max_position_embeddings,
        ropes=(RopeConfig(kind="positions", n_dims=2),),
        tie_embeddings=skeleton.module.is_tied,
        embed_size=None if width == skeleton.hidden_size else width,
        logit_softcap=skeleton.logit_softcap,
        dtype=stored_dtype(fields),
        eos_token_ids=eos_token_ids(own, generation, vocab_size),
        bos_token_id=bos_token_id(own, vocab_size),
        skeleton=skeleton,
    )


def _intermediate_size(skeleton: Skeleton) -> int:
    """A size for which the planner leaves room for all that a module makes of a token: a buffer for
    each product, copies of queries, keys and values, and what lies between."""
    products = [shape[-2] for shape in skeleton.layer_shapes.values() if len(shape) > 1]
    heads = skeleton.heads
    attended = (heads.n_heads + 2 * heads.n_kv_heads) * heads.head_dim
    return (sum(products) + 3 * attended + 6 * skeleton.hidden_size) // 3


def _reason(error: Exception) -> str:
    if isinstance(error, UnfitError):
        return str(error)
    line = next(iter(str(error).splitlines()), "")
    return f"its module fails: {type(error).__name__}: {line[:200]}"
