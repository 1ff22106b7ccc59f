"""Tiny folders in published layouts, packed number by number from the layouts' definitions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sl_serve.weights.groups import GROUP_FORMATS
from tests.models import write_tiny_llama
from tests.weights.groups import e4m3fn, in_float64, random_grouped

HIDDEN, INNER = 128, 192
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which output stands at which place of a set


@dataclass(frozen=True)
class Model:
    folder: Path
    expected: dict[str, np.ndarray]  # weight's name -> float64 (out, in)


# A module's tensors, and what they stand for in float64.
Packed = tuple[dict[str, torch.Tensor], np.ndarray]
Pack = Callable[[np.random.Generator, int, int], Packed]


def write(
    folder: Path, pack: Pack, settings: dict[str, Any], dtype: str = "float16", **sizes: int
) -> Model:
    """Every matrix of the layers packed, except layer 1's o_proj, which stays plain."""
    write_tiny_llama(folder, **({"hidden_size": HIDDEN, "intermediate_size": INNER} | sizes))
    tensors = load_file(folder / "model.safetensors")
    rng, expected = np.random.default_rng(0), {}
    for name in [n for n in tensors if ".layers." in n and tensors[n].dim() == 2]:
        if "layers.1.self_attn.o_proj" in name:
            continue
        parts, expected[name] = pack(rng, *tensors.pop(name).shape)
        module = name.removesuffix("weight")
        tensors |= {module + part: t.contiguous() for part, t in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_settings(folder, quantization_config=settings, torch_dtype=dtype, dtype=dtype)
    return Model(folder, expected)


def write_stored_blocks(folder: Path, name: str, **sizes: int) -> Model:
    """Our own layout, random numbers in the group format `name`."""

    def pack(_: np.random.Generator, n_out: int, n_in: int) -> Packed:
        rows = random_grouped(name, n_out, n_in)
        return {"weight": GROUP_FORMATS[name].pack(rows)}, in_float64(name, rows)

    folder.mkdir(exist_ok=True)
    model = write(folder, pack, {}, "float32", **sizes)
    settings = {"quant_method": "sl-serve", "version": 1}
    change_settings(
        folder, quantization_config={**settings, "formats": dict.fromkeys(model.expected, name)}
    )
    return model


# OCP Microscaling Formats, table 5 (E2M1) and 5.4.1 (E8M0), by the bit patterns.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks (..., out, n_groups, 16), scales (..., out, n_groups) -> float64 (..., out, in)."""
    table = torch.tensor(E2M1, dtype=torch.float64)
    numbers = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], dim=-1)
    powers = 2.0 ** (scales.double() - 127)
    return (numbers.flatten(-2) * powers[..., None]).flatten(-2)


def pack_experts(folder: Path) -> dict[str, torch.Tensor]:
    """The experts of a gpt-oss become random numbers in MXFP4: each stack's, (experts, in, out)."""
    random, found = torch.Generator().manual_seed(3), {}
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        n_experts, n_in, n_out = tensors.pop(name).shape
        shape = n_experts, n_out, n_in // 32, 16
        blocks = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        scales = torch.randint(121, 126, shape[:3], generator=random, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        found[name] = from_mxfp4(blocks, scales).transpose(1, 2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_settings(folder, quantization_config={"quant_method": "mxfp4"})
    return found


def change_settings(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def write_dequantised(model: Model, folder: Path) -> None:
    """The same model, its matrices in float32."""
    tensors = load_file(model.folder / "model.safetensors")
    packed = {name.removesuffix(".weight") for name in model.expected}
    plain = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in packed}
    plain |= {n: torch.from_numpy(e.astype(np.float32)) for n, e in model.expected.items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    for file in model.folder.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    del settings["quantization_config"]
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": "float32"}))


def words(numbers: Iterable[int], n_bits: int) -> Iterator[int]:
    """Signed 32-bit words, the first number in the lowest bits."""
    word, shift = 0, 0
    for number in numbers:
        word |= int(number) << shift
        shift += n_bits
        if shift == 32:
            yield word - (word >> 31 << 32)
            word, shift = 0, 0
    if shift:
        yield word - (word >> 31 << 32)


def packed_rows(numbers: np.ndarray, n_bits: int) -> torch.Tensor:
    return torch.tensor([list(words(row, n_bits)) for row in numbers.tolist()], dtype=torch.int32)


def random_scales(rng: np.random.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rng.uniform(0.5, 1.5, shape)).to(dtype)


def spread(values: np.ndarray, n_in: int) -> np.ndarray:
    """(out, n_groups) -> (out, in)."""
    group = -(-n_in // values.shape[1])
    return np.repeat(values, group, axis=1)[:, :n_in]


def gptq(
    n_bits: int = 4,
    group: int = 64,
    v2: bool = False,
    shuffled: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Pack:
    def pack(rng: np.random.Generator, n_out: int, n_in: int) -> Packed:
        top, n_groups = 1 << n_bits, n_in // (n_in if group == -1 else group)
        numbers = rng.integers(0, top, (n_out, n_in))
        zeros = rng.integers(0, top, (n_out, n_groups))
        scales = random_scales(rng, n_out, n_groups, dtype=dtype) * (1.5 / top)
        group_of = np.arange(n_in) // (n_in // n_groups)
        if shuffled:
            group_of = rng.permutation(group_of)
        stored_zeros = zeros if v2 else (zeros - 1) % top
        tensors = {
            "qweight": packed_rows(numbers, n_bits).t(),
            "qzeros": packed_rows(stored_zeros.T, n_bits),
            "scales": scales.t(),
            "g_idx": torch.from_numpy(group_of.astype(np.int32)),
        }
        of_input = scales.double().numpy()[:, group_of]
        return tensors, of_input * (numbers - zeros[:, group_of])

    return pack


def awq(group: int = 64) -> Pack:
    def pack(rng: np.random.Generator, n_out: int, n_in: int) -> Packed:
        n_groups = n_in // group
        numbers = rng.integers(0, 16, (n_out, n_in))
        zeros = rng.integers(0, 16, (n_out, n_groups))
        scales = random_scales(rng, n_out, n_groups, dtype=torch.float16) * 0.1

        def sets(of_outputs: np.ndarray) -> torch.Tensor:
            lines = of_outputs.T.reshape(-1, n_out // 8, 8)[..., AWQ_ORDER]
            return packed_rows(lines.reshape(len(lines), n_out), 4)

        tensors = {"qweight": sets(numbers), "qzeros": sets(zeros), "scales": scales.t()}
        exact = spread(scales.double().numpy(), n_in) * (numbers - spread(zeros, n_in))
        return tensors, exact

    return pack


def pack_quantized(
    n_bits: int = 4,
    group: int | None = 64,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    shuffled: bool = False,
) -> Pack:
    def pack(rng: np.random.Generator, n_out: int, n_in: int) -> Packed:
        half, n_groups = 1 << n_bits - 1, 1 if group is None else n_in // group
        numbers = rng.integers(-half, half, (n_out, n_in))
        scales = random_scales(rng, n_out, n_groups, dtype=dtype) * (0.8 / half)
        tensors = {
            "weight_packed": packed_rows(numbers + half, n_bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([n_out, n_in]),
        }
        group_of = np.arange(n_in) // (n_in // n_groups)
        if shuffled:
            group_of = rng.permutation(group_of)
            tensors["weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
        zeros = np.zeros((n_out, n_groups), int)
        if not symmetric:
            zeros = rng.integers(-half, half, zeros.shape)
            tensors["weight_zero_point"] = packed_rows((zeros + half).T, n_bits).t()
        return tensors, scales.double().numpy()[:, group_of] * (numbers - zeros[:, group_of])

    return pack


def one_byte(
    kind: str,
    scales_of: tuple[int, int] | None,
    dtype: torch.dtype = torch.bfloat16,
    suffix: str = "weight_scale",
    symmetric: bool = True,
) -> Pack:
    """`scales_of`: outputs and inputs that share a scale, -1 for all; None: one without a shape."""

    def pack(rng: np.random.Generator, n_out: int, n_in: int) -> Packed:
        n_rows, n_columns = (n_out, n_in) if scales_of is None else scales_of
        n_rows = n_out if n_rows == -1 else n_rows
        group = n_in if n_columns == -1 else n_columns
        shape = -(-n_out // n_rows), -(-n_in // group)
        stored = rng.integers(0, 256, (n_out, n_in), dtype=np.uint8)
        if kind == "fp8":
            stored[stored & 0x7F == 0x7F] = 0
        numbers = e4m3fn(stored) if kind == "fp8" else stored.view(np.int8).astype(float)
        scales = random_scales(rng, *shape, dtype=dtype) * (0.01 if kind == "int8" else 0.004)
        zeros = np.zeros(shape)
        torch_dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        tensors = {
            "weight": torch.from_numpy(stored).view(torch_dtype),
            suffix: scales.reshape(()) if scales_of is None else scales,
        }
        if not symmetric:
            zeros = rng.integers(-128, 128, shape)
            tensors["weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8))

        def each(values: np.ndarray) -> np.ndarray:
            wide = np.repeat(np.repeat(values, n_rows, axis=0), group, axis=1)
            return wide[:n_out, :n_in]

        return tensors, each(scales.double().numpy()) * (numbers - each(zeros))

    return pack
