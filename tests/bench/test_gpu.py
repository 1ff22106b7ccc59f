from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from bench import gpu, gpu_work
from bench.errors import BenchError
from bench.gpu_cases import GIB, GPU_CASES, GpuCase, find_gpu_cases
from bench.gpu_peers import MEASURE, PACKAGES, batch_of
from bench.gpu_report import GpuResults, bound_s, build_report, render
from bench.timeline import STREAMS, Timeline, draw
from sl_serve import device as device_module
from sl_serve import stored_model
from sl_serve.device import SimDevice, Span
from tests.engine.fake_cuda import FakeRuntime, LazyCudaDevice, fake_cuda
from tests.engine.running import GREEDY, config, engine, run
from tests.models import write_tiny_llama

LINK = {
    "gpu": "Imagined",
    "gpu_memory_bytes": 80 << 30,
    "down_bytes_per_s": 25e9,
    "up_bytes_per_s": 24e9,
    "each_way_at_once_bytes_per_s": 20e9,
    "flops_per_s": 200e12,
}
CASE = GPU_CASES["opt-30b-512x32-n64-16gib"]
SPANS = [
    Span("load", "weights", 10.0, 12.0),
    Span("compute", "layer", 11.0, 14.0),
    Span("store", "new KV", 13.0, 14.0),
]


@pytest.mark.parametrize("case", GPU_CASES.values(), ids=list(GPU_CASES))
def test_a_case_is_a_full_workload(case: GpuCase) -> None:
    workload = case.workload()
    assert workload.engine.device == "cuda" and workload.engine.load_format == "dummy"
    assert workload.engine.dtype in ("float16", "bfloat16")
    assert [len(p) for p in workload.prompts()] == [case.prompt_tokens] * case.n_requests
    kv_bytes = workload.engine.kv_memory_bytes
    assert kv_bytes is not None and kv_bytes >= case.kv_bytes(case.n_requests)


def test_kv_of_a_known_model() -> None:
    # 48 layers, keys and values, 7168 numbers of 2 bytes
    assert CASE.kv_token_bytes == 48 * 2 * 7168 * 2
    assert CASE.kv_bytes(64) == 64 * 544 * CASE.kv_token_bytes
    # half of 16 GiB
    assert batch_of(CASE) == (8 << 30) // CASE.kv_bytes(1) == 11


def test_cases_are_found_by_their_beginnings() -> None:
    assert [c.name for c in find_gpu_cases("opt-30b-128")] == ["opt-30b-128x128-n128-24gib"]
    assert find_gpu_cases("") == list(GPU_CASES.values())
    assert len(find_gpu_cases("llama-3-8b,opt-6.7b")) == 4
    with pytest.raises(BenchError, match="no case begins with 'gpt'; there are: opt-6"):
        find_gpu_cases("opt,gpt")


def test_the_bound_by_hand() -> None:
    layer = (4 + 2 * 4) * 7168**2  # q, k, v, o, and up and down of four times the width
    streamed = 48 * layer * 2 - 16 * GIB
    assert bound_s(CASE, LINK) == pytest.approx(32 * streamed / 25e9)
    slow = LINK | {"flops_per_s": 1e12}
    rows = 64 * (512 + 32 - 1)
    flops = 2 * rows * 48 * layer + 2 * 64 * 32 * 7168 * 50272
    assert bound_s(CASE, slow) == pytest.approx(flops / 1e12)


def answer(tokens_per_s: float, **more: Any) -> dict[str, Any]:
    return {"tokens_per_s": tokens_per_s, "wall_s": 2048 / tokens_per_s, **more}


OURS = answer(
    10.0,
    weight_bytes=3_000e9,
    kv_down_bytes=1_000e9,
    step_s=200.0,
    timeline=Timeline.of(SPANS).as_json(),
)


def job(system: str, case_name: str) -> dict[str, Any]:
    if system == "vllm":
        raise BenchError("not installed")
    return OURS if system == "sl-serve" else answer(4.0, batch=11)


def test_a_report_sets_ours_beside_the_bound_and_the_peers() -> None:
    said: list[str] = []
    results = gpu.run_case(CASE, LINK, ["accelerate", "vllm"], job, said.append)
    report = build_report(results)
    assert report["ratio_to_best_peer"] == pytest.approx(2.5)
    assert report["share_of_bound"] == pytest.approx(10.0 * bound_s(CASE, LINK) / 2048)
    assert report["link_share"] == pytest.approx(4_000e9 / 25e9 / 200)
    assert report["without_figures"] == {"vllm": "not installed"}
    assert said == [f"{CASE.name}: {s}" for s in ("sl-serve", "accelerate", "vllm")]
    assert json.loads(json.dumps(report)) == report
    text = io.StringIO()
    Console(file=text, width=140).print(render(LINK, [report]))
    for shown in ("Imagined", "25.0 GB/s", "10.0", "80%", "not installed", "accelerate"):
        assert shown in text.getvalue()


def test_without_ours_there_is_still_a_report() -> None:
    results = GpuResults(CASE, LINK, {"accelerate": answer(4.0)}, {"sl-serve": "out of memory"})
    report = build_report(results)
    assert report["share_of_bound"] is None and report["ratio_to_best_peer"] is None
    Console(file=io.StringIO()).print(render(LINK, [report]))


def test_every_peer_can_be_named_found_and_measured() -> None:
    assert set(gpu.PEERS) == set(PACKAGES) == set(MEASURE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_worker_that_fails_says_why_in_one_line() -> None:
    with pytest.raises(BenchError, match=r"^--device cuda: .*use --device cpu$"):
        gpu.start_worker("link", "")


def test_a_peer_that_is_not_installed_is_told() -> None:
    with pytest.raises(BenchError, match="not installed"):
        gpu.run_job("flexgen", CASE.name)


def test_a_timeline_counts_from_its_first_span() -> None:
    timeline = Timeline.of(SPANS)
    assert timeline.length_s == 4.0
    assert timeline.spans[0] == Span("load", "weights", 0.0, 2.0)
    assert [timeline.busy_share(lane) for lane in timeline.lanes] == [0.5, 0.75, 0.25]
    assert timeline.lanes == STREAMS
    assert Timeline.of([]).busy_share("load") == 0.0


def test_a_drawing_has_a_bar_for_every_span(tmp_path: Path) -> None:
    report = {"case": "a <case>", "systems": {"sl-serve": OURS}}
    gpu.write_timelines([report], tmp_path / "new")
    (path,) = (tmp_path / "new").iterdir()
    root = ElementTree.fromstring(path.read_text())
    svg = "{http://www.w3.org/2000/svg}"
    bars = [r for r in root.iter(f"{svg}rect") if r.find(f"{svg}title") is not None]
    assert len(bars) == len(SPANS)
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths[1] == pytest.approx(1.5 * widths[0], rel=0.01)
    assert "a <case>: one step" in [t.text for t in root.iter(f"{svg}text")]
    empty = ElementTree.fromstring(draw(Timeline.of([]), "nothing"))
    assert not list(empty.iter(f"{svg}title"))


def test_the_processor_has_a_lane_where_it_attends(tmp_path: Path) -> None:
    """Of a run on the simulated device."""
    write_tiny_llama(tmp_path)
    device, spans = SimDevice(), list[Span]()
    settings = replace(config(max_rows=4, n_sub_batches=2), attention="host")
    with engine(tmp_path, settings, device) as running:
        running.on_step(lambda _: spans.extend(device.take_timeline()) or device.start_timeline())
        run(running, [[1, 2, 3], [4, 5]], replace(GREEDY, max_tokens=4))
    timeline = Timeline.of(spans)
    assert timeline.lanes == (*STREAMS, "host")
    assert {s.name for s in timeline.spans if s.stream == "host"} == {"attention"}
    assert set(timeline.as_json()["busy_share"]) == {*STREAMS, "host"}
    root = ElementTree.fromstring(draw(timeline, "attends"))
    svg = "{http://www.w3.org/2000/svg}"
    titles = [t.text or "" for t in root.iter(f"{svg}text")]
    assert any(t.startswith("host ") for t in titles)
    bars = {float(r.attrib["y"]) for r in root.iter(f"{svg}rect") if len(r)}
    assert len(bars) == 4  # a height each
    assert max(bars) < float(root.attrib["height"]) - 50


@pytest.mark.parametrize("stays", [False, True])
def test_our_own_run_on_a_gpu_that_is_imagined(
    monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    """All of the worker but the hardware: dummy weights, both runs, counters, one timeline."""
    if not stays:  # this small a model would fit whole
        monkeypatch.setattr(stored_model, "device_budget_bytes", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 123)
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setitem(device_module._DEVICES, "cuda", lambda: LazyCudaDevice(torch.device("cpu")))
    case = GpuCase("opt-125m", 6, 40, 6, 16, n_sub_batches=2)
    with fake_cuda(FakeRuntime(), slot_bytes=1 << 20):
        result = gpu_work.measure_ours(case)
    assert shares == [0.2]
    assert result["steps"] >= 6
    layer_bytes = 12 * (12 * 768**2 + 13 * 768) * 2
    moved_bytes = 0 if stays else layer_bytes
    assert result["device_layers"] == (12 if stays else 0)
    assert result["weight_bytes"] / result["steps"] == pytest.approx(moved_bytes, rel=0.01)
    assert (result["kv_down_bytes"] > 0, result["kv_up_bytes"] > 0) == (not stays, not stays)
    spans = [Span(**s) for s in result["timeline"]["spans"]]
    crossing = {"weights", "KV prefix", "new KV"}
    assert {s.name for s in spans} == {"layer", "attention"} | (set() if stays else crossing)
    assert sum(s.name == "layer" for s in spans) == 2 * 12
    assert json.loads(json.dumps(result)) == result
