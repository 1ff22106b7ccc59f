from enum import Enum

ROW_FIELDS: int

class Dtype(Enum):
    float32 = ...
    bfloat16 = ...
    float16 = ...
    q4_0 = ...
    q4_1 = ...
    q5_0 = ...
    q5_1 = ...
    q8_0 = ...
    q4_k = ...
    q5_k = ...
    q6_k = ...

def targets() -> list[str]: ...

class Core:
    def __init__(self, target: str, n_threads: int) -> None: ...
    def append(
        self,
        k: int,
        v: int,
        line_stride: int,
        rows: int,
        n_rows: int,
        chunks: int,
        base: int,
        n_kv_heads: int,
        head_dim: int,
        kv_dtype: Dtype,
        /,
    ) -> None: ...
    def attend(
        self,
        q: int,
        q_stride: int,
        out: int,
        out_stride: int,
        rows: int,
        n_rows: int,
        chunks: int,
        base: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        kv_dtype: Dtype,
        scale: float,
        window: int,
        softcap: float,
        slopes: int,
        /,
    ) -> None: ...
    def rope(
        self,
        x: int,
        line_stride: int,
        n_lines: int,
        n_heads: int,
        head_dim: int,
        cos: int,
        sin: int,
        /,
    ) -> None: ...
    def silu_mul(self, gate_up: int, out: int, n_lines: int, width: int, /) -> None: ...
    def gemm(
        self,
        a: int,
        a_stride: int,
        b: int,
        b_stride: int,
        b_dtype: Dtype,
        c: int,
        c_stride: int,
        accumulate: bool,
        m: int,
        n: int,
        k: int,
        /,
    ) -> None: ...
    def rms_norm(
        self, x: int, weight: int, out: int, n_lines: int, width: int, eps: float, /
    ) -> None: ...
