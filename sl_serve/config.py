"""Frozen settings. `ModelConfig` speaks the engine's names, whatever the checkpoint's dialect."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

DTypeName = Literal["float32", "bfloat16", "float16"]
KVDTypeName = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]
DeviceName = Literal["cpu", "cuda", "sim"]
# Where KV in host memory is attended to. auto: the device, or what the planner found to be faster.
AttentionPlacement = Literal["auto", "device", "host"]
# What quantised weights are multiplied with.
ActivationName = Literal["float32", "int8"]
LoadFormat = Literal["auto", "dummy"]  # as the model's files are, or random weights of its shape


# Lines of the vocabulary matrix's product made at once: where matmuls reach their full rate. One
# buffer of (this, vocabulary) serves all rows of a step.
LOGITS_BLOCK_LINES = 256


# positions: nothing is turned; the tables are the tokens' positions, for a family that turns heads
# by means of its own.
RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope", "positions"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions. `kind` is Hugging Face's `rope_type`; fields are those of its kinds."""

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_positions: int = 8192  # llama3, yarn, longrope
    n_dims: int | None = None  # the first so many elements of a head turn; None: all
    amplitude: float = 1.0  # of cos and sin (yarn, longrope)
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the ends of its ramp are whole numbers
    # longrope: a divisor for each pair of elements; the long ones for texts that will be longer
    # than original_max_positions.
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder. All sizes in elements. A family whose arithmetic has more settings
    adds them in a class of its own."""

    family: str  # Hugging Face `model_type`; names the file in sl_serve/models
    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float = 1e-5
    # Kinds of rotation, of which a layer takes one or none. Empty: layers know no positions; they
    # enter with the embedding.
    ropes: tuple[RopeConfig, ...] = (RopeConfig(),)
    tie_embeddings: bool = False
    attention_bias: bool = False  # biases on q, k, v and o
    mlp_bias: bool = False
    values_are_keys: bool = False  # one line serves as both, and is kept once
    norm_first: bool = True  # norms before attention and MLP; False: after
    final_norm: bool = True
    embed_size: int | None = None  # width of embedding and head; None: hidden_size
    n_experts: int = 0  # of a layer that has some; their tensors are in `layer_params`
    experts_per_token: int = 0  # that a router chooses
    expert_size: int = 0  # intermediate_size of one of them
    logit_softcap: float | None = None  # a logit x becomes softcap * tanh(x / softcap)
    dtype: DTypeName = "float32"  # as stored in the checkpoint
    transposed: tuple[str, ...] = ()  # ends of names of matrices that a folder stores as (in, out)
    # Names that end so stand for a tensor of all experts in a folder, in which these modules of an
    # expert have their outputs by turns.
    stacked: tuple[tuple[str, tuple[str, ...]], ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def rotated_pairs(self) -> list[int]:
        """Of a head's elements, by each kind of rotation."""
        return [(rope.n_dims or self.head_dim) // 2 for rope in self.ropes]

    @property
    def q_size(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def n_kv_kinds(self) -> int:
        """Kept of a token at a head: a key and a value, or what is both."""
        return 1 if self.values_are_keys else 2

    @property
    def n_kv_lines(self) -> int:
        """Kept of a token at a layer, of head_dim numbers each."""
        return self.n_kv_heads * self.n_kv_kinds


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """Ceilings of the waiting queue; past any of them a submission is refused (429)."""

    max_requests: int = 1024
    max_tokens: int = 4_000_000  # prompt and requested output tokens together


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How rows are packed. Zero means: chosen by the plan."""

    max_rows: int = 256  # of a step, over all sub-batches
    n_sub_batches: int = 1
    prefill_chunk_tokens: int = 0  # prompt tokens of all rows in one step
    look_ahead: int = 1  # layers loading while one computes; 0 is the serial twin


@dataclass(frozen=True, slots=True)
class EngineConfig:
    device: DeviceName = "cpu"
    dtype: DTypeName = "float32"
    kv_dtype: KVDTypeName = "auto"  # of KV in host memory; auto: as `dtype`
    max_model_len: int | None = None  # None: what the model says, lowered to what memory allows
    kv_memory_bytes: int | None = None  # None: a share of what is free
    host_memory_bytes: int | None = None  # of the whole process; None: what is free
    device_memory_bytes: int | None = None  # None: what is free on the device
    disk_dir: str | None = None  # for layers that the checkpoint's own files cannot serve
    load_format: LoadFormat = "auto"
    weights: str = "auto"  # as the checkpoint has them; or a word of `with_weights`
    attention: AttentionPlacement = "auto"
    activations: ActivationName = "float32"  # int8: on the processor, see ops/rounded.py
    n_threads: int | None = None
    native: bool = True  # False: the pure-torch twins even where the native core is built
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)

    @property
    def host_attends(self) -> bool:
        """Beside a device: the processor attends to KV in host memory."""
        return self.attention == "host" and self.device != "cpu"
