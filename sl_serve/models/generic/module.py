"""A decoder's module of transformers without its weights, and the tensors it wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from sl_serve.models.generic.tap import OURS, UnfitError, register

Shapes = Mapping[str, tuple[int, ...]]


class DecoderModule:
    """`model`, its layers and its vocabulary. Raises UnfitError where they are not to be found."""

    def __init__(self, settings: Any) -> None:
        """`settings`: transformers' own, which become the module's."""
        self.model = built(settings)
        self._stack, self.layers = _stack(self.model, settings.num_hidden_layers)
        self.embed, self.head = (
            self.model.get_input_embeddings(),
            self.model.get_output_embeddings(),
        )
        if not isinstance(self.embed, nn.Embedding) or not isinstance(self.head, nn.Linear):
            raise UnfitError("it has no embedding table or no head")
        if self.head.weight.shape[0] != self.embed.weight.shape[0]:
            raise UnfitError("its head and its embedding are of different vocabularies")
        names = {module: f"{name}.weight" for name, module in self.model.named_modules()}
        self.embed_name: str = names[self.embed]
        self.head_name: str = names[self.head]
        self.bias_name = (
            self.head_name.removesuffix("weight") + "bias"
        )  # of the head, if it has one
        self.embed.padding_idx = None  # of training; the table looked up in may be shorter

    @property
    def is_tied(self) -> bool:
        return self.head.weight is self.embed.weight

    def layer_name(self, layer: int | str, name: str = "") -> str:
        """Of a tensor of a layer in the model's state."""
        return f"{self._stack}.{layer}.{name}"

    def layer_shapes(self) -> list[Shapes]:
        """Of each layer's tensors, by their names in it."""
        return [
            {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
            for layer in self.layers
        ]

    def static_shapes(self) -> Shapes:
        """Of what is in no layer, by its name in the model's state."""
        return {
            name: tuple(tensor.shape)
            for name, tensor in self.model.state_dict().items()
            if not name.startswith(f"{self._stack}.")
        }


def model_class(settings: Any) -> Any:
    """transformers', of a decoder with a head."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]


def built(settings: Any) -> Any:
    """The module: parameters on the meta device, buffers that no checkpoint has as they are."""
    register()
    ours = {"attn_implementation": OURS, "experts_implementation": OURS}
    try:
        with torch.device("meta"):
            model = model_class(settings)._from_config(settings, dtype=torch.float32, **ours)
    except KeyError as error:
        if error.args != (OURS,):
            raise
        raise UnfitError("it knows a few ways to attend, and takes no other") from None
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, own = name.rpartition(".")
        real = torch.empty_like(buffer, device="cpu")
        model.get_submodule(owner).register_buffer(own, real, persistent=False)
    model.initialize_weights()  # of what is real
    return model.eval().requires_grad_(False)


def _stack(model: nn.Module, n_layers: int) -> tuple[str, nn.ModuleList]:
    """The one list of as many modules, and its name."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    outermost = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        raise UnfitError(f"it has {len(outermost)} stacks of {n_layers} layers")
    return outermost[0], lists[outermost[0]]
