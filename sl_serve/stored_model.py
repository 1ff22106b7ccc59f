"""A checkpoint as a configuration stores it, and the memory plan for it. No weight is read here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sl_serve.config import DTypeName, EngineConfig
from sl_serve.device import device_budget_bytes
from sl_serve.errors import MemoryBudgetError
from sl_serve.models import Family, StaticTensors, load_family
from sl_serve.plan.budget import host_budget_bytes
from sl_serve.plan.fit import plan_memory
from sl_serve.plan.memory import MemoryPlan, WeightSizes
from sl_serve.plan.model_reader import stored_dtype, stored_formats, torch_dtype
from sl_serve.weights.checkpoint import Checkpoint
from sl_serve.weights.formats import Format, plain
from sl_serve.weights.host import check_checkpoint, static_bytes
from sl_serve.weights.layout import LayerLayout
from sl_serve.weights.requantised import with_weights
from sl_serve.weights.tiers import served_by_files


def plan_checkpoint(checkpoint: Checkpoint, config: EngineConfig) -> MemoryPlan:
    """The memory plan, without reading any weight. Raises CheckpointError, MemoryBudgetError."""
    return StoredModel.planned(checkpoint, config)[1]


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A checkpoint as this configuration stores it."""

    checkpoint: Checkpoint
    config: EngineConfig
    family: Family
    formats: Mapping[str, Format]  # of tensors that are not in the layout's dtype
    layout: LayerLayout
    static: StaticTensors

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: EngineConfig) -> StoredModel:
        """Raises CheckpointError before any weight is read if one is missing or misshapen."""
        settings = checkpoint.config
        checkpoint = with_weights(checkpoint, config.weights)
        family = load_family(settings.family)
        params, static = family.layer_params(settings), family.static_tensors(settings)
        check_checkpoint(checkpoint, params, dict(static.values()))
        dtype = torch_dtype(_stored_as(checkpoint, config))
        formats = _formats(checkpoint, config)
        layout = LayerLayout(params, dtype, formats, settings.n_layers)
        return cls(checkpoint, config, family, formats, layout, static)

    @classmethod
    def planned(
        cls, checkpoint: Checkpoint, config: EngineConfig
    ) -> tuple[StoredModel, MemoryPlan]:
        """With layers as stored; or, where a device has room for all of them expanded and for no
        less KV, so for good. Raises MemoryBudgetError."""
        model = cls.of(checkpoint, config)
        whole = model._all_expanded()
        try:
            plan = model.plan()
        except MemoryBudgetError:
            if whole is None:
                raise
            return whole
        if whole is not None and whole[1].device_kv_bytes >= plan.device_kv_bytes:
            return whole
        return model, plan

    def _all_expanded(self) -> tuple[StoredModel, MemoryPlan] | None:
        """Where a device has room for that."""
        if self.config.device == "cpu" or not self.layout.expanded_bytes:
            return None
        model = replace(self, layout=self.layout.expanded)
        try:
            plan = model.plan()
        except MemoryBudgetError:
            return None
        stay = plan.n_device_layers == plan.kv.n_layers and not plan.swaps_hidden
        return (model, plan) if stay else None

    @property
    def n_parameters(self) -> int:
        static = sum(math.prod(shape) for shape in dict(self.static.values()).values())
        n_layers = self.checkpoint.config.n_layers
        in_layers = sum(
            math.prod(p.shape) * len(p.owners) * sum(map(p.is_in, range(n_layers)))
            for p in self.layout.params
        )
        return in_layers + static

    def plan(self) -> MemoryPlan:
        config, settings = self.config, self.checkpoint.config
        return plan_memory(
            settings,
            config,
            self._sizes(),
            # Attention reads host memory in place, or one bulk copy takes the prefix over the link.
            "row" if config.device == "cpu" else "position",
            host_budget_bytes(config.host_memory_bytes),
            device_budget_bytes(config.device, config.device_memory_bytes),
        )

    def static_names(self, plan: MemoryPlan) -> dict[str, str]:
        """Our name -> the checkpoint's, of what stays in memory."""
        names = {ours: source for ours, (source, _) in self.static.items()}
        if plan.embedding_on_disk:
            del names["embed"]
        if plan.head_on_disk:
            del names["head"]
        return names

    def _sizes(self) -> WeightSizes:
        settings, static = self.checkpoint.config, self.static.values()
        on_device, plain_format = self.config.device != "cpu", plain(self.layout.dtype)
        formats = {source: self.formats.get(source, plain_format) for source, _ in static}
        used = dict.fromkeys(formats, plain_format) if on_device else formats
        sizes = {source: static_bytes(shape, used[source]) for source, shape in static}
        (head, _), (embed, embed_shape) = self.static["head"], self.static["embed"]
        embedding_bytes = 0 if embed == head else sizes[embed]
        if on_device:  # on the host, as stored
            embedding_bytes = static_bytes(embed_shape, formats[embed])
        places = [(self.checkpoint.location(s), formats[s].dtype) for s in (head, embed)]
        in_files = served_by_files(self.checkpoint, self.layout, settings.n_layers)
        return WeightSizes(
            layer_bytes=self.layout.image_bytes,
            expanded_layer_bytes=self.layout.expanded_bytes if on_device else 0,
            embedding_bytes=embedding_bytes,
            head_bytes=sizes[head],
            others_bytes=sum(sizes.values()) - sum(sizes[s] for s in {head, embed}),
            disk_tier=in_files or self.config.disk_dir is not None,
            vocabulary_in_file=all(found and d and found.dtype == d for found, d in places),
            expert_bytes=self.layout.expert_bytes,
        )


def _stored_as(checkpoint: Checkpoint, config: EngineConfig) -> DTypeName:
    """The processor computes in float32 with weights as short as the checkpoint has them: the
    conversion is exact, and half the bytes are read. Elsewhere weights are what is computed with.
    """
    return stored_dtype(checkpoint) if _widens(config) else config.dtype


def _formats(checkpoint: Checkpoint, config: EngineConfig) -> dict[str, Format]:
    if config.device == "cpu":
        return stored_formats(checkpoint) if _widens(config) else {}
    return stored_formats(checkpoint, has_device=True)


def _widens(config: EngineConfig) -> bool:
    return config.device == "cpu" and config.dtype == "float32"
