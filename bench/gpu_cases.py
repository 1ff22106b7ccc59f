"""Models larger than a GPU's memory, or made so by a cap on it; random weights of their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.cases import Case
from bench.errors import BenchError
from sl_serve.config import DTypeName, EngineConfig, ModelConfig, SchedulerConfig

GIB = 1 << 30
ITEMSIZE = 2  # bytes: all shapes are 16-bit
KV_SPARE = 1.15  # chunks that are not full
PREFILL_TOKENS = 2048
# Of the GPU's memory, beside the plan: cuBLAS's workspaces, what torch's allocator rounds up.
UNPLANNED_BYTES = GIB // 2


@dataclass(frozen=True, slots=True)
class GpuCase:
    """`device_gib`: of the GPU's memory, what may be used."""

    shape: str
    n_requests: int
    prompt_tokens: int
    output_tokens: int
    device_gib: int
    n_sub_batches: int = 4

    @property
    def name(self) -> str:
        lengths = f"{self.prompt_tokens}x{self.output_tokens}"
        return f"{self.shape}-{lengths}-n{self.n_requests}-{self.device_gib}gib"

    @property
    def model(self) -> ModelConfig:
        from sl_serve.weights.dummy import open_dummy

        return open_dummy(self.shape).config

    @property
    def kv_token_bytes(self) -> int:
        model = self.model
        return 2 * model.n_layers * model.kv_size * ITEMSIZE

    def kv_bytes(self, n_requests: int) -> int:
        """At the end of so many requests."""
        return n_requests * (self.prompt_tokens + self.output_tokens) * self.kv_token_bytes

    def workload(self) -> Case:
        """For sl-serve; the prompts are everyone's."""
        from sl_serve.llm import UNBOUNDED_QUEUE

        model = self.model
        dtype: DTypeName = model.dtype
        engine = EngineConfig(
            device="cuda",
            dtype=dtype,
            load_format="dummy",
            max_model_len=self.prompt_tokens + self.output_tokens,
            device_memory_bytes=self.device_gib * GIB - UNPLANNED_BYTES,
            kv_memory_bytes=int(KV_SPARE * self.kv_bytes(self.n_requests)),
            scheduler=SchedulerConfig(
                max_rows=self.n_requests,
                n_sub_batches=self.n_sub_batches,
                prefill_chunk_tokens=PREFILL_TOKENS,
            ),
            queue=UNBOUNDED_QUEUE,
        )
        return Case(
            name=self.name,
            about="random weights",
            model=self.shape,
            n_requests=self.n_requests,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            token_ids=(100, model.vocab_size),
            engine=engine,
        )


GPU_CASES: Mapping[str, GpuCase] = {
    case.name: case
    for case in (
        GpuCase("opt-6.7b", 128, 512, 32, 16),
        GpuCase("opt-6.7b", 128, 128, 128, 16),
        GpuCase("opt-30b", 64, 512, 32, 16),
        GpuCase("opt-30b", 64, 512, 32, 24),
        GpuCase("opt-30b", 128, 128, 128, 24),
        GpuCase("llama-3-8b", 512, 512, 32, 16),
        GpuCase("llama-3-8b", 512, 128, 128, 16),
        GpuCase("llama-3-70b", 256, 512, 32, 24),
        GpuCase("llama-3-70b", 256, 128, 128, 24),
    )
}


def find_gpu_cases(names: str) -> list[GpuCase]:
    """Comma-separated names or beginnings of names; all cases for an empty string."""
    wanted = [name for name in names.split(",") if name] or [""]
    for name in wanted:
        if not any(known.startswith(name) for known in GPU_CASES):
            raise BenchError(f"no case begins with {name!r}; there are: {', '.join(GPU_CASES)}")
    return [c for known, c in GPU_CASES.items() if known.startswith(tuple(wanted))]
