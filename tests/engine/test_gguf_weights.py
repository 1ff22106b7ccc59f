"""GGUF matrices stay in their blocks: fewer bytes, and the tokens of the dequantised weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import pre_tokenizers

from sl_serve import loader, stored_model
from sl_serve.core import SamplingParams
from sl_serve.device import SimDevice
from sl_serve.loader import Parts
from sl_serve.plan.fit import plan_memory
from sl_serve.plan.memory import MemoryPlan
from sl_serve.plan.model_reader import read_sizes, stored_formats
from sl_serve.stored_model import plan_checkpoint
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.layout import ALIGNMENT_BYTES, IMAGE_ALIGNMENT_BYTES
from sl_serve.weights.quantised import QuantisedWeight
from tests.engine.running import GREEDY, config, engine, random_prompts, requests_for, run
from tests.weights.blocks import Kind
from tests.weights.tiny_models import tiny_llama, write_tiny_gguf

pytestmark = pytest.mark.usefixtures("one_thread")

N_LAYERS = 3
PROMPTS = random_prompts(4, longest=40, seed=4)
SHORT = replace(GREEDY, max_tokens=10)
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
TOKENIZER = {
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * len(TOKENS),
    "tokenizer.ggml.merges": ["a b"],
}
# As mixes of K types are made: some matrices, and the same one of some layers, with more bits.
MIXED = {
    "token_embd.weight": Kind.Q6_K,
    "blk.0.attn_v.weight": Kind.Q6_K,
    "blk.0.ffn_down.weight": Kind.Q6_K,
    "blk.1.attn_q.weight": Kind.Q5_K,
    "blk.1.ffn_gate.weight": Kind.F16,
    "blk.2.attn_output.weight": Kind.BF16,
    "blk.2.ffn_up.weight": Kind.F32,
    "blk.2.ffn_gate.weight": Kind.Q5_1,
}
FILES: dict[str, tuple[Kind, Mapping[str, Kind]]] = {
    **{k.name: (k, {}) for k in (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0)},
    **{k.name: (k, {}) for k in (Kind.MXFP4, Kind.F16)},
    "mixed": (Kind.Q4_K, MIXED),
}


def write_in_blocks(
    path: Path,
    quantisation: Kind,
    kinds: Mapping[str, Kind],
    *,
    n_layers: int = N_LAYERS,
    tied: bool = True,
) -> None:
    """A Llama of several layers whose inputs are whole blocks of any type. `kinds`: of tensors that
    are not in `quantisation`."""
    model = tiny_llama(
        vocab_size=len(TOKENS),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=n_layers,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    write_tiny_gguf(path, model, quantisation=quantisation, kinds=kinds, settings=TOKENIZER)


@pytest.fixture(scope="module", params=FILES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_in_blocks(path, *FILES[request.param])
    return path


@pytest.fixture(scope="module")
def expected(path: Path) -> list[list[int]]:
    """Of weights that are dequantised while loading."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_model, "stored_formats", lambda *_, **__: {})
        with engine(path, config(max_rows=6), SimDevice()) as running:
            return run(running, PROMPTS, SHORT)


@pytest.mark.parametrize(("native", "max_rows"), [(True, 1), (True, 6), (False, 6)])
def test_tokens_are_those_of_dequantised_weights(
    path: Path, expected: list[list[int]], native: bool, max_rows: int
) -> None:
    settings = replace(config(max_rows=max_rows, prefill_chunk_tokens=48), native=native)
    with engine(path, settings) as running:
        assert run(running, PROMPTS, SHORT) == expected


def test_log_probabilities_too(path: Path) -> None:
    sampling = SamplingParams(
        max_tokens=8, temperature=0, ignore_eos=True, logprobs=4, prompt_logprobs=2
    )
    said = []
    for device in (None, SimDevice()):
        with engine(path, config(max_rows=6), device) as running:
            requests, answers = requests_for(PROMPTS, sampling)
            running.submit(requests)
            answers.wait()
        news = [out for row in answers.news for out in row]
        of_prompts = [p for out in news for p in out.prompt_logprobs or () if p]
        said.append(of_prompts + [token for out in news for token in out.logprobs])
    assert len(said[0]) == sum(map(len, PROMPTS)) - len(PROMPTS) + 8 * len(PROMPTS)
    for ours, theirs in zip(*said, strict=True):
        assert ours.token_id == theirs.token_id
        assert abs(ours.logprob - theirs.logprob) < 1e-4


def test_matrices_are_in_memory_as_they_are_in_the_file(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    parts = loader.load(checkpoint, config(max_rows=2))
    raw = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for layer in range(N_LAYERS):
        views = parts.store.layout.views(parts.store.host_images[layer], layer)
        assert in_bytes(views["down"]) == raw[f"blk.{layer}.ffn_down.weight"].data.tobytes()
        joined = [raw[f"blk.{layer}.ffn_{name}.weight"].data.tobytes() for name in ("gate", "up")]
        assert in_bytes(views["gate_up"]) == b"".join(joined)
        assert views["input_norm"].dtype == torch.float32
    parts.close()
    checkpoint.close()


def in_bytes(weight: torch.Tensor | QuantisedWeight) -> bytes:
    if isinstance(weight, torch.Tensor):
        return bytes(weight.t().contiguous().view(torch.uint8).numpy().tobytes())
    return b"".join(part.data.numpy().tobytes() for part in weight.parts)


def test_the_plan_counts_stored_bytes(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    plan = plan_checkpoint(checkpoint, config(max_rows=2))
    sizes = read_sizes(
        "tiny", checkpoint.config, torch.float32, torch.float32, stored_formats(checkpoint)
    )
    stored = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(path).tensors}
    largest = max(
        sum(n for name, n in stored.items() if name.startswith(f"blk.{i}.")) for i in range(3)
    )
    n_segments = 9  # a parameter each, and the joined ones' sources
    image_bytes = plan.weights_bytes // N_LAYERS
    assert largest <= image_bytes
    assert image_bytes <= largest + n_segments * ALIGNMENT_BYTES + IMAGE_ALIGNMENT_BYTES
    assert plan.static_bytes == stored["token_embd.weight"] + stored["output_norm.weight"]
    assert (sizes.layer_bytes, sizes.static_bytes) == (image_bytes, plan.static_bytes)
    assert sizes.head_bytes == stored["token_embd.weight"]
    checkpoint.close()


@pytest.mark.parametrize("n_disk_layers", [1, 3])
def test_layers_on_disk_are_spooled_as_they_are(
    path: Path,
    expected: list[list[int]],
    n_disk_layers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def planned(*args: object) -> MemoryPlan:
        return replace(plan_memory(*args), n_disk_layers=n_disk_layers)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_model, "plan_memory", planned)
    found: list[Parts] = []
    settings = replace(config(max_rows=6), disk_dir=str(tmp_path))
    with engine(path, settings, change=found.append) as running:
        assert run(running, PROMPTS, SHORT) == expected
        layout = found[0].store.layout
        on_disk = [i for i in range(N_LAYERS) if i not in found[0].store.host_images]
        of_step = sum(map(layout.stored_bytes, on_disk))
        assert found[0].store.n_disk_bytes_read % of_step == 0
        assert found[0].store.n_disk_bytes_read >= of_step > 0
        assert len(found[0].store.host_images) == N_LAYERS - n_disk_layers


def test_a_format_nobody_widens_is_dequantised_while_loading(tmp_path: Path) -> None:
    path, sizes = tmp_path / "x.gguf", {"hidden_size": 256, "intermediate_size": 256}
    write_tiny_gguf(path, tiny_llama(**sizes), quantisation=Kind.TQ2_0)
    checkpoint = open_checkpoint(path)
    assert {f.name for f in stored_formats(checkpoint).values()} == {"float32"}
    checkpoint.close()


def test_greedy_answers_differ_between_prompts(expected: list[list[int]]) -> None:
    """The model is lively enough for wrong weights to show."""
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert len({token for tokens in expected for token in tokens}) > 12
    assert all(len(tokens) == SHORT.max_tokens for tokens in expected)
