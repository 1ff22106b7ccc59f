"""A small model of the same kind, run both ways: what a module does that is not understood here
shows in its numbers, whatever it is."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from sl_serve.models import NewTokens
from sl_serve.models.generic.module import model_class
from sl_serve.models.generic.skeleton import Skeleton
from sl_serve.models.generic.tap import UnfitError
from sl_serve.ops import TorchOps
from sl_serve.ops.scored_attention import scored_attention

TEXT_TOKENS = (13, 8)  # of two texts that pass through together: none may see the other
WINDOW = 5
MAX_ELEMENTS = 1 << 27
MAX_ERROR = 1e-3  # of logits, against the largest: both sides compute in float32
_VOCABULARY = 96
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "mlp_hidden_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def check(settings: Any) -> None:
    """Raises UnfitError unless a small model like this computes here what it does in
    transformers."""
    small = shrunk(settings)
    skeleton = Skeleton(copy.deepcopy(small))
    n_elements = sum(map(math.prod, skeleton.layer_shapes.values())) * skeleton.n_layers
    if n_elements > MAX_ELEMENTS:
        raise UnfitError("no model of its kind can be made that is small enough to be checked")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        reference = _reference(small)
        texts = [torch.randint(_VOCABULARY, (n,)) for n in TEXT_TOKENS]
        expected = torch.cat([reference(text[None], use_cache=False).logits[0] for text in texts])
        found = _logits(skeleton, reference.state_dict(), texts)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < MAX_ERROR:
        raise UnfitError(
            f"a small model of its kind gives logits that are {error:.0%} off: its layers do more "
            "than attend to earlier tokens of their text"
        )


def shrunk(settings: Any) -> Any:
    """The same in all but sizes."""
    small = copy.deepcopy(settings)
    n_heads, hidden = settings.num_attention_heads, settings.hidden_size
    n_kv_heads = getattr(settings, "num_key_value_heads", None) or n_heads
    head_dim = getattr(settings, "head_dim", None) or hidden // n_heads
    small.hidden_size, small.num_attention_heads, small.vocab_size = 64, 4, _VOCABULARY
    if getattr(settings, "num_key_value_heads", None):
        small.num_key_value_heads = 4 if n_kv_heads == n_heads else min(n_kv_heads, 2)
    if getattr(settings, "head_dim", None) and head_dim * n_heads == hidden:
        small.head_dim = 16
    for name in vars(settings):
        value = getattr(settings, name)
        if isinstance(value, int) and name.endswith(_WIDTHS):
            setattr(small, name, 48)
    for name in _EXPERTS:
        if isinstance(getattr(settings, name, None), int):
            most = 4 * settings.num_experts_per_tok
            setattr(small, name, min(getattr(settings, name), most))
    if isinstance(getattr(settings, "sliding_window", None), int):
        small.sliding_window = WINDOW
    if getattr(settings, "rope_parameters", None) is None:  # a table of them would be large
        small.max_position_embeddings = min(settings.max_position_embeddings, 256)
    for name in _TOKENS:
        if getattr(settings, name, None) is not None:
            setattr(small, name, 1)
    return small


def _reference(settings: Any) -> Any:
    """transformers' model, every number of it alive."""
    model = model_class(settings)._from_config(
        settings, dtype=torch.float32, attn_implementation="eager"
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def _logits(
    skeleton: Skeleton, weights: dict[str, torch.Tensor], texts: list[torch.Tensor]
) -> torch.Tensor:
    """Of the texts' tokens, side by side."""
    ops = TorchOps()
    module = skeleton.module
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    tokens = weights[module.embed_name][torch.cat(texts)]
    x = skeleton.embedded(ops, weights, tokens, positions)
    for layer in range(skeleton.n_layers):
        names = {n: module.layer_name(layer, n) for n in skeleton.layer_shapes}
        w = {ours: _seen(weights[name]) for ours, name in names.items() if name in weights}
        new = skeleton.asked(ops, layer, w, x, positions)
        x = skeleton.result(ops, layer, w, x, positions, _attended(new, texts)).clone()
    logits = skeleton.head_input(ops, weights, x) @ weights[module.head_name].t()
    logits += weights.get(module.bias_name, torch.zeros(()))
    cap = skeleton.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _seen(tensor: torch.Tensor) -> torch.Tensor:
    """As the engine has it: matrices are (in, out), those of experts side by side."""
    return tensor if tensor.ndim < 2 else tensor.flatten(0, -2).t()


def _attended(new: NewTokens, texts: list[torch.Tensor]) -> torch.Tensor:
    """Each text by itself, (T, Hq * D)."""
    parts, start = [], 0
    for text in texts:
        q, k, v = (x[start : start + len(text)].transpose(0, 1) for x in new[:3])
        own = torch.arange(len(text))
        parts.append(scored_attention(q, k, v, own, own, new.scoring).transpose(0, 1).flatten(1))
        start += len(text)
    return torch.cat(parts)
