"""A decoder's module, run layer by layer with weights from outside.

Each run goes through the model's own `forward` from its start, so that a layer gets whatever that
hands to it: rotary tables, masks, positions. Layers that the run is not for pass their input on.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from sl_serve.models import NewTokens, StaticTensors
from sl_serve.models.generic.module import DecoderModule
from sl_serve.models.generic.names import Names
from sl_serve.models.generic.tap import Reached, Run, Tap, UnfitError
from sl_serve.ops import Ops
from sl_serve.weights.layout import LayerWeights, Param
from sl_serve.weights.quantised import QuantisedWeight, Weight

Tensors = dict[str, torch.Tensor]


class Heads(NamedTuple):
    n_heads: int
    n_kv_heads: int
    head_dim: int


class Skeleton:
    """One thread uses it at a time. Raises UnfitError for a model that cannot be run so."""

    def __init__(self, settings: Any) -> None:
        self.module = DecoderModule(settings)
        self._names = Names(self.module.model)
        self._static_shapes = self.module.static_shapes()
        self._tap = Tap()
        self._fills: dict[tuple[torch.device, torch.dtype], Tensors] = {}
        self._gives_tuples = False  # its layers do, not tensors
        products = self._open()
        self.layer_shapes, self._layers_with = _of_all_layers(self.module)
        self._unmultiplied = [name for name in self.layer_shapes if name not in products]
        for name in self._unmultiplied:
            if len(self.layer_shapes[name]) > 2:
                raise UnfitError(f"its layers have {name}, which is no matrix")
        self.hidden_size = self._dry_hidden_size()
        self.heads = self._dry_layer()
        self.logit_scale, self.logit_softcap = self._dry_head()

    @property
    def n_layers(self) -> int:
        return len(self.module.layers)

    def layer_params(self) -> tuple[Param, ...]:
        return tuple(self._param(name, shape) for name, shape in self.layer_shapes.items())

    def _param(self, name: str, shape: tuple[int, ...]) -> Param:
        n_experts = shape[0] if len(shape) == 3 else 0
        sources = self._names.sources(self.module.layer_name("{layer}", name), n_experts)
        if n_experts and len(sources) < n_experts:
            raise UnfitError("its checkpoints have the matrices of all experts in one tensor")
        n_in, n_out = shape[-1:], math.prod(shape[: max(1, len(shape) - 1)])
        seen = shape if len(shape) < 2 else (*n_in, n_out)
        layers = self._layers_with[name]
        return Param(
            name,
            seen,
            sources,
            (n_out // len(sources),) * len(sources),
            layers=None if len(layers) == self.n_layers else layers,
        )

    def static_tensors(self) -> StaticTensors:
        module = self.module
        ours = {
            module.embed_name: "embed",
            module.head_name: "head",
            module.bias_name: "head_bias",
        }
        tensors = {
            ours.get(name, name): (self._names.sources(name)[0], shape)
            for name, shape in self._static_shapes.items()
        }
        if module.is_tied:
            tensors["head"] = tensors["embed"]
        return tensors

    def embedded(
        self, ops: Ops, w: LayerWeights, tokens: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """What enters the first layer, (T, hidden)."""
        values = self._static_values(ops, w) | {self.module.embed_name: tokens}
        ids = torch.arange(len(tokens), device=tokens.device)
        found: torch.Tensor = self._reach(Run(0), ops.dtype, ids, positions, values)
        return found[0].to(ops.dtype)

    def asked(
        self, ops: Ops, layer: int, w: LayerWeights, x: torch.Tensor, positions: torch.Tensor
    ) -> NewTokens:
        """What the layer wants to have attended to."""
        found = self._run_layer(Run(layer, x[None], ops, w), positions)
        if not isinstance(found, NewTokens):
            raise UnfitError(
                "its layers do not attend by transformers' interface: they keep a state of their "
                "own, or attention is written out in them"
            )
        return found

    def result(
        self,
        ops: Ops,
        layer: int,
        w: LayerWeights,
        x: torch.Tensor,
        positions: torch.Tensor,
        attended: torch.Tensor,
    ) -> torch.Tensor:
        """What the layer makes of x (T, hidden); may lie in a scratch buffer."""
        found = self._run_layer(Run(layer, x[None], ops, w, attended), positions)
        if isinstance(found, NewTokens):
            raise UnfitError("its layers attend more than once")
        self._gives_tuples = isinstance(found, tuple)
        states: torch.Tensor = found[0] if self._gives_tuples else found
        return states.view(x.shape)

    def head_input(self, ops: Ops, w: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        """x (n, hidden) after the last layer -> (n, width)."""
        ids = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        run, values = Run(self.n_layers, x[None]), self._static_values(ops, w)
        found: torch.Tensor = self._reach(run, ops.dtype, ids, ids, values)
        return found[0].to(ops.dtype) * self.logit_scale

    def _run_layer(self, run: Run, positions: torch.Tensor) -> Any:
        ops, w = run.ops, run.weights
        assert ops is not None and w is not None
        values = {
            self.module.layer_name(run.layer, name): _plain(ops, w[name])
            for name in self._unmultiplied
            if name in w
        }
        return self._reach(run, ops.dtype, torch.zeros_like(positions), positions, values)

    def _reach(
        self,
        run: Run,
        dtype: torch.dtype,
        ids: torch.Tensor,
        positions: torch.Tensor,
        values: Tensors,
    ) -> Any:
        """What the run comes to. `values`: of tensors that it looks at."""
        arguments = {
            "input_ids": ids[None],
            "attention_mask": torch.ones_like(ids)[None],
            "position_ids": positions[None],
            "use_cache": False,
        }
        values = self._fill(ids.device, dtype) | values
        self._tap.run = run
        try:
            return functional_call(self.module.model, values, (), arguments, tie_weights=False)
        except Reached as reached:
            return reached.found
        finally:
            self._tap.run = Run(0)

    def _fill(self, device: torch.device, dtype: torch.dtype) -> Tensors:
        """Buffers there, and for tensors in no layer zeros that take no memory."""
        key = device, dtype
        if key not in self._fills:
            zero = torch.zeros((), device=device, dtype=dtype)
            zeros = {name: zero.expand(shape) for name, shape in self._static_shapes.items()}
            buffers = self.module.model.named_non_persistent_buffers()
            self._fills[key] = zeros | {name: b.to(device) for name, b in buffers}
        return self._fills[key]

    def _static_values(self, ops: Ops, w: LayerWeights) -> Tensors:
        kept = self.module.embed_name, self.module.head_name, self.module.bias_name
        return {n: w[n].to(ops.dtype) for n in self._static_shapes if n not in kept}

    def _open(self) -> set[str]:
        """Puts ours in place of what the model does. Returns names of tensors in layers that go
        into products."""
        products: set[str] = set()
        for index, layer in enumerate(self.module.layers):
            layer.forward = partial(self._enter, index, layer.forward)
            for name, part in layer.named_modules():
                part.tap, part.tapped_as, is_linear = self._tap, f"{name}.", type(part) is nn.Linear
                if is_linear:
                    part.forward = partial(self._tap.product, part.tapped_as)
                if is_linear or hasattr(part, "_apply_gate"):  # experts
                    products |= {part.tapped_as + own for own, _ in part.named_parameters()}
        self.module.head.forward = self._enter_head
        return products

    def _enter(self, index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of a layer's forward."""
        run = self._tap.run
        hidden = args[0] if args else kwargs["hidden_states"]
        if run.layer == index:
            if run.x is None:
                raise Reached(hidden)
            if args:
                raise Reached(forward(run.x, *args[1:], **kwargs))
            raise Reached(forward(**kwargs | {"hidden_states": run.x}))
        if run.layer == self.n_layers == index + 1:
            hidden = run.x
        return (hidden,) if self._gives_tuples else hidden

    def _enter_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """In place of the head's forward."""
        if self._tap.run.logits is None:
            raise Reached(hidden)
        return self._tap.run.logits

    def _dry_hidden_size(self) -> int:
        ids = torch.arange(2)
        states: torch.Tensor = self._reach(Run(0), torch.float32, ids, ids, {})
        return states.shape[-1]

    def _dry_layer(self) -> Heads:
        """The first layer with two tokens and no weights."""
        ops: Any = _NoProducts()
        zero, x, positions = torch.zeros(()), torch.zeros(2, self.hidden_size), torch.arange(2)
        w = {p.name: zero.expand(p.shape) for p in self.layer_params() if p.is_in(0)}
        new = self.asked(ops, 0, w, x, positions)
        self.result(ops, 0, w, x, positions, torch.zeros(2, new.q[0].numel()))
        (n_heads, head_dim), n_kv_heads = new.q.shape[1:], new.k.shape[1]
        if n_heads % n_kv_heads:
            raise UnfitError(f"{n_heads} heads cannot share {n_kv_heads} key and value heads")
        return Heads(n_heads, n_kv_heads, head_dim)

    def _dry_head(self) -> tuple[float, float | None]:
        """What becomes of a logit z: softcap * tanh(scale * z / softcap), or scale * z."""
        n_rows, near, far = self.module.head.weight.shape[0], 2.0**-10, 2.0**30
        low, high = (float(self._logits(torch.full((n_rows,), z))[0]) for z in (near, far))
        scale = low / near
        softcap = None if abs(high - scale * far) < 1e-3 * scale * far else high
        z = torch.linspace(-40, 40, n_rows)
        expected = z * scale if softcap is None else softcap * torch.tanh(z * scale / softcap)
        is_known = torch.allclose(self._logits(z), expected, rtol=1e-4, atol=1e-5)
        if not is_known or (self.module.head.bias is not None and scale != 1):
            raise UnfitError("what it makes of its logits is not known")
        return scale, softcap

    def _logits(self, given: torch.Tensor) -> torch.Tensor:
        """What the model makes of its head's product, (vocabulary,)."""
        ids, x = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, self.hidden_size)
        run = Run(self.n_layers, x, logits=given.expand(1, 1, -1).clone())
        made: torch.Tensor = self._reach(run, torch.float32, ids, ids, {}).logits
        return made[0, 0]


class _NoProducts:
    """Operations of which only the shapes matter."""

    dtype = torch.float32

    def linear(self, _name: str, x: torch.Tensor, w: torch.Tensor, _bias: object) -> torch.Tensor:
        return torch.zeros(len(x), w.shape[1])

    def expand(self, w: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(w)


def _of_all_layers(
    module: DecoderModule,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Of each tensor, its shape and the layers that have it."""
    shapes: dict[str, tuple[int, ...]] = {}
    layers: dict[str, tuple[int, ...]] = {}
    for number, of_layer in enumerate(module.layer_shapes()):
        for name, shape in of_layer.items():
            if shapes.setdefault(name, shape) != shape:
                raise UnfitError(f"{name} of its layers is of different shapes")
            layers[name] = (*layers.get(name, ()), number)
    return shapes, layers


def _plain(ops: Ops, w: Weight) -> torch.Tensor:
    """As the module has it, in the dtype that is computed with: matrices are (out, in)."""
    if not isinstance(w, QuantisedWeight) and w.ndim < 2:
        return w.to(ops.dtype)
    data = w.parts[0].data if isinstance(w, QuantisedWeight) else w
    out = torch.empty(w.shape[::-1], dtype=ops.dtype, device=data.device)
    ops.expand(w, out.t())
    return out
