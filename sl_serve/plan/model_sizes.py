"""What of a model counts when time and memory are computed. Plain numbers, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sl_serve.expert_share import MOST_ROUTED_SHARE, touched_share
from sl_serve.plan.hardware import Floats


@dataclass(frozen=True, slots=True)
class LinearBytes:
    """Bytes that grow with tokens: fixed + per_token * n."""

    per_token: float
    fixed: float = 0.0

    def at(self, n_tokens: int) -> int:
        return round(self.fixed + self.per_token * n_tokens)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A decoder of equal layers. Bytes of weights as stored; `itemsize` is of x, and of K
    and V where they are computed with."""

    name: str
    n_layers: int
    layer_bytes: int
    head_bytes: int
    static_bytes: int  # embedding, final norm and head together, once where they are tied
    layer_flops_per_token: float  # matrix products of one layer
    head_flops_per_token: float
    hidden_size: int
    q_size: int
    kv_size: int  # numbers of the keys, or of the values, of a token at one layer
    vocab_size: int
    max_positions: int
    itemsize: int
    activations: LinearBytes  # of one layer's pass over a sub-batch, its hidden states included
    expanded_layer_bytes: int = 0  # on a device, of a layer that is not computed with as stored
    stored_kv_bytes: int | None = None  # K and V of a token at one layer; None: as computed with
    n_kv_kinds: int = 2  # K and V, or what is both
    experts_bytes: int = 0  # of layer_bytes, those of its experts
    n_experts: int = 0
    experts_per_token: int = 0

    def idle_bytes(self, n_tokens: Floats) -> Floats:
        """Of a layer, the experts that a step of so many tokens does not need."""
        if not self.n_experts:
            return np.zeros_like(n_tokens)
        share = touched_share(n_tokens, self.n_experts, self.experts_per_token)
        return np.asarray((1.0 - share) * self.experts_bytes)

    def needed_share(self, n_tokens: Floats) -> Floats:
        """Of a layer's bytes."""
        return np.asarray(1.0 - self.idle_bytes(n_tokens) / self.layer_bytes)

    def fetched_layer_bytes(self, n_tokens: Floats) -> Floats:
        """What comes of a layer from a slower tier: what is needed, or all if that is most."""
        idle = self.idle_bytes(n_tokens)
        few = idle >= (1.0 - MOST_ROUTED_SHARE) * self.experts_bytes
        return np.asarray(self.layer_bytes - np.where(few, idle, 0.0))

    @property
    def kv_token_layer_bytes(self) -> int:
        """As host memory has it."""
        if self.stored_kv_bytes is None:
            return self.device_kv_token_layer_bytes
        return self.stored_kv_bytes

    @property
    def device_kv_token_layer_bytes(self) -> int:
        """As a device with memory of its own reads it."""
        return self.n_kv_kinds * self.kv_size * self.itemsize

    @property
    def kv_is_expanded(self) -> bool:
        """On a device with memory of its own."""
        return self.kv_token_layer_bytes != self.device_kv_token_layer_bytes

    @property
    def kv_token_bytes(self) -> int:
        return self.n_layers * self.kv_token_layer_bytes

    @property
    def weights_bytes(self) -> int:
        return self.n_layers * self.layer_bytes + self.static_bytes

    @property
    def computed_layer_bytes(self) -> int:
        """Of a layer as the arithmetic reads it."""
        return self.expanded_layer_bytes or self.layer_bytes

    def expanded(self) -> ModelSizes:
        """With layers expanded for good."""
        return replace(self, layer_bytes=self.computed_layer_bytes, expanded_layer_bytes=0)

    @property
    def attention_layer_flops(self) -> float:
        """Of one new token over one token of context: q k and the weighted sum of v."""
        return 4.0 * self.q_size
