"""What a checkpoint calls the tensors of a module: transformers renames some on loading, and makes
one tensor of those of all experts."""

from __future__ import annotations

import re
from typing import Any

from transformers.conversion_mapping import extract_weight_conversions_for_model
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from sl_serve.models.generic.tap import UnfitError


class Names:
    """Of one model. Raises UnfitError for a conversion that changes more than names."""

    def __init__(self, model: Any) -> None:
        conversions = extract_weight_conversions_for_model(model) or []
        self._renamings: list[tuple[str, str]] = []  # the module's -> the checkpoint's
        self._joined: dict[str, list[str]] = {}  # end of the module's -> those of each expert
        for conversion in conversions:
            targets = [_plain(target) for target in conversion.target_patterns]
            sources = [_plain(source) for source in conversion.source_patterns]
            if isinstance(conversion, WeightRenaming):
                self._renamings.insert(0, (targets[0], sources[0]))
            elif isinstance(conversion, WeightConverter) and _joins_experts(conversion):
                self._joined[targets[0]] = sources
            else:
                raise UnfitError(f"its checkpoints have {sources[0]!r} in another shape")

    def sources(self, name: str, n_experts: int = 0) -> tuple[str, ...]:
        """In the checkpoint. `n_experts`: that the tensor is joined from, if it is."""
        for end, sources in self._joined.items():
            if n_experts and name.endswith(end):
                start = name.removesuffix(end)
                return tuple(
                    self._renamed(start + source.replace("*", str(expert)))
                    for expert in range(n_experts)
                    for source in sources
                )
        return (self._renamed(name),)

    def _renamed(self, name: str) -> str:
        for ours, theirs in self._renamings:
            name = name.replace(ours, theirs)
        return name


def _joins_experts(conversion: Any) -> bool:
    """Into (experts, out, in), each expert's sources one after another along `out`."""
    kinds = [(type(step), step.dim) for step in conversion.operations]
    ways = [(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]
    return kinds in ways and len(conversion.target_patterns) == 1


def _plain(pattern: str) -> str:
    """The names that it finds, `*` for a number. Raises UnfitError where it may find several."""
    name = re.sub(r"\\([.])", r"\1", pattern)
    if re.search(r"[\\^$()\[\]+?|{}]", name):
        raise UnfitError(f"its checkpoints name tensors by the rule {pattern!r}")
    return name
