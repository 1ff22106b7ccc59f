"""Peers that offload to host memory, each in a process of its own and with random weights.

One batch is timed, as large as lets its KV fill half of the memory cap; weights get the rest.
"""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.errors import BenchError
from bench.gpu_cases import GIB, ITEMSIZE, GpuCase
from bench.gpu_work import cap_memory
from sl_serve.weights.shapes import SHAPES

SPARE_BYTES = 2 * GIB  # of the cap, for activations
TILE_ELEMENTS = 1 << 24


def find_module(names: tuple[str, ...]) -> str | None:
    """The first of these packages that is installed."""
    return next((n for n in names if importlib.util.find_spec(n) is not None), None)


# Peer -> the packages it may be installed as.
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "accelerate": ("accelerate",),
    "vllm": ("vllm",),
    "flexgen": ("flexllmgen", "flexgen"),
}


def batch_of(case: GpuCase) -> int:
    fitting = case.device_gib * GIB // 2 // case.kv_bytes(1)
    return max(1, min(case.n_requests, fitting))


def _result(case: GpuCase, batch: int, wall_s: float, **extras: Any) -> dict[str, Any]:
    tokens_per_s = batch * case.output_tokens / wall_s
    return {"tokens_per_s": tokens_per_s, "wall_s": wall_s, "batch": batch, **extras}


def _weight_bytes(case: GpuCase, batch: int) -> int:
    """Of the cap, what is left for weights."""
    left = case.device_gib * GIB - case.kv_bytes(batch) - SPARE_BYTES
    return max(GIB, left)


def _hf_config(case: GpuCase) -> Any:
    from transformers import AutoConfig

    settings = dict(SHAPES[case.shape])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _network(case: GpuCase, **settings: Any) -> Any:
    """Without memory for its parameters."""
    import transformers
    from accelerate import init_empty_weights

    models: Any = transformers.AutoModelForCausalLM
    with init_empty_weights():
        network = models.from_config(_hf_config(case), **settings)
    network.tie_weights()  # only now do ties last
    return network


def measure_accelerate(case: GpuCase) -> dict[str, Any]:
    """transformers' generate over accelerate's device_map, weights beyond the cap on the host."""
    cap_memory(case)
    batch = batch_of(case)
    model = _dispatched(case, _weight_bytes(case, batch))
    ids = torch.tensor(case.workload().prompts()[:batch], device="cuda")

    def generate(n_tokens: int) -> float:
        started_s = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=n_tokens,
            max_new_tokens=n_tokens,
            do_sample=False,
        )
        assert out.shape == (batch, ids.shape[1] + n_tokens)
        torch.cuda.synchronize()
        return time.perf_counter() - started_s

    with torch.inference_mode():
        generate(2)
        return _result(case, batch, generate(case.output_tokens))


def _dispatched(case: GpuCase, weight_bytes: int) -> Any:
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import set_module_tensor_to_device

    dtype = getattr(torch, case.model.dtype)
    model = _network(case, dtype=dtype)
    device_map = infer_auto_device_map(
        model,
        max_memory={0: weight_bytes, "cpu": 1 << 50},
        no_split_module_classes=model._no_split_modules,
        dtype=dtype,
    )
    tile = (torch.randn(TILE_ELEMENTS) * 0.02).to(dtype)
    for name, parameter in model.named_parameters():
        owner = max((k for k in device_map if name.startswith(k)), key=len)
        n_tiles = -(-parameter.numel() // TILE_ELEMENTS)
        value = tile.repeat(n_tiles)[: parameter.numel()].view(parameter.shape)
        set_module_tensor_to_device(model, name, device_map[owner], value=value, dtype=dtype)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return dispatch_model(model.eval(), device_map=device_map)


def measure_vllm(case: GpuCase) -> dict[str, Any]:
    """vLLM with --cpu-offload-gb for the weights that the cap leaves no room for."""
    from vllm import LLM, SamplingParams

    workload, batch = case.workload(), case.n_requests
    total_bytes = torch.cuda.mem_get_info()[1]
    model_bytes = _n_parameters(case) * ITEMSIZE
    offload_bytes = max(0, model_bytes - _weight_bytes(case, batch_of(case)))
    with tempfile.TemporaryDirectory(prefix="sl-serve-bench-") as folder:
        _hf_config(case).save_pretrained(folder)
        llm = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=case.model.dtype,
            max_model_len=case.prompt_tokens + case.output_tokens,
            gpu_memory_utilization=case.device_gib * GIB / total_bytes,
            cpu_offload_gb=math.ceil(offload_bytes / GIB),
        )

        def generate(prompts: list[list[int]], n_tokens: int) -> float:
            sampling = SamplingParams(
                max_tokens=n_tokens, temperature=0.0, ignore_eos=True, detokenize=False
            )
            started_s = time.perf_counter()
            llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
            return time.perf_counter() - started_s

        generate(workload.warm_up_prompts(), 2)
        wall_s = generate(workload.prompts(), case.output_tokens)
    return _result(case, batch, wall_s, cpu_offload_bytes=offload_bytes)


def _n_parameters(case: GpuCase) -> int:
    return int(_network(case).num_parameters())


def measure_flexgen(case: GpuCase) -> dict[str, Any]:
    """FlexGen's own command with its dummy weights: KV in host memory, weights as they fit."""
    package = find_module(PACKAGES["flexgen"])
    if not case.shape.startswith("opt-"):
        raise BenchError("FlexGen runs OPT alone")
    share = _weight_bytes(case, 0) / (_n_parameters(case) * ITEMSIZE)
    on_gpu = min(100, int(100 * share / 2))  # as much again for what a layer needs
    batch = max(1, case.n_requests // case.n_sub_batches)
    command = [sys.executable, "-m", f"{package}.flex_opt", "--model", f"facebook/{case.shape}"]
    command += ["--path", "_DUMMY_", "--prompt-len", str(case.prompt_tokens)]
    command += ["--gen-len", str(case.output_tokens), "--gpu-batch-size", str(batch)]
    command += ["--num-gpu-batches", str(case.n_sub_batches), "--percent"]
    command += [str(n) for n in (on_gpu, 100 - on_gpu, 0, 100, 100, 0)]
    with tempfile.TemporaryDirectory(prefix="sl-serve-bench-") as folder:
        command += ["--offload-dir", str(Path(folder) / "offload")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    found = re.search(r"total throughput: ([\d.]+) token/s", done.stdout)
    if done.returncode or found is None:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise BenchError("FlexGen failed: " + " / ".join(lines[-3:]))
    n_tokens = batch * case.n_sub_batches * case.output_tokens
    wall_s = n_tokens / float(found[1])
    return _result(case, batch * case.n_sub_batches, wall_s, percent_on_gpu=on_gpu)


MEASURE: Mapping[str, Callable[[GpuCase], dict[str, Any]]] = {
    "accelerate": measure_accelerate,
    "vllm": measure_vllm,
    "flexgen": measure_flexgen,
}
