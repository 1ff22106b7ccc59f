"""What a model's layers make of tokens, by the operations that an engine would choose."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch

from sl_serve.config import EngineConfig, ModelConfig
from sl_serve.device import SimDevice
from sl_serve.models import NewTokens, RopeTable, Routed, load_family, run_block
from sl_serve.ops import TorchOps, choose_ops
from sl_serve.plan.activations import PeakBytes
from sl_serve.plan.block_memory import block_memory
from sl_serve.weights.layout import LayerWeights, Param
from sl_serve.weights.quantised import QuantisedWeight, Weight
from tests.engine.test_group_matmul import rows_of

ONCE_BYTES = 1024  # of a table with a number per head, which the first layer makes


def engine_ops(config: EngineConfig) -> TorchOps:
    device = SimDevice() if config.device == "sim" else None
    ops = choose_ops(config.dtype, 1, config.native, device, config.activations)
    assert isinstance(ops, TorchOps)
    return ops


def random_tensor(param: Param, rounds: bool) -> Weight:
    """Matrices as they lie in memory, output by output; in blocks where these matter."""
    if rounds and param.is_matrix:
        n_in, n_out = param.shape
        return rows_of("int4_g32", n_out, n_in).t()
    numbers = torch.randn(param.shape[::-1]) * 0.1
    return numbers.t() if param.is_matrix else numbers


def tensors(weights: LayerWeights) -> Iterator[torch.Tensor]:
    for w in weights.values():
        yield from [part.data for part in w.parts] if isinstance(w, QuantisedWeight) else [w]


def made(model: ModelConfig, ops: TorchOps, n_tokens: int) -> tuple[int, int]:
    """By a pass over all layers: the most bytes at once, and those outside buffers while one
    waits."""
    family, x = load_family(model.family), torch.randn(n_tokens, model.hidden_size)
    ropes = [RopeTable(*torch.rand(2, n_tokens, n)) for n in model.rotated_pairs]
    params, given = family.layer_params(model), torch.randn(x.shape)
    layers: list[LayerWeights] = [
        {p.name: random_tensor(p, ops.rounds) for p in params if p.is_in(layer) and not p.n_experts}
        for layer in range(model.n_layers)
    ]
    waiting: list[int] = []
    known = [x, given, *chain(*ropes), *chain(*map(tensors, layers))]

    def note() -> None:
        waiting.append(alive.alive_bytes - sum(b.nbytes for b in ops._scratch.buffers))

    with torch.inference_mode(), PeakBytes(known) as alive:

        def attend(new: NewTokens) -> torch.Tensor:
            note()
            width = new.q.shape[1] * new.q.shape[2]
            return ops._scratch("attention", n_tokens + 1, width)[:n_tokens].zero_()

        def ask(routed: Routed) -> torch.Tensor:
            note()
            return given

        for layer, weights in enumerate(layers):
            if layer == 1:
                waiting.clear()  # the first held buffers that others have outgrown
            run_block(family.block(model, ops, layer, weights, x, ropes), attend, ask)
    return alive.peak_bytes, max(waiting)


def made_by_expert(model: ModelConfig, ops: TorchOps, n_tokens: int) -> int:
    family, x = load_family(model.family), torch.randn(n_tokens, model.hidden_size)
    params = [p for p in family.layer_params(model) if p.n_experts]
    weights: LayerWeights = {p.name: random_tensor(p, ops.rounds) for p in params}
    with torch.inference_mode(), PeakBytes([x, *tensors(weights)]) as alive:
        family.expert(model, ops, weights, x)
    return alive.peak_bytes


def check_planned(model: ModelConfig, config: EngineConfig, n_tokens: int) -> None:
    planned = block_memory(model, config)
    peak, waiting = made(model, engine_ops(config), n_tokens)
    assert peak - ONCE_BYTES <= planned.computed.at(n_tokens) <= 1.1 * peak
    assert waiting - ONCE_BYTES <= planned.waiting.at(n_tokens)
    if model.n_experts:
        of_expert = made_by_expert(model, engine_ops(config), n_tokens)
        assert of_expert <= planned.expert.at(n_tokens) <= 1.1 * of_expert
