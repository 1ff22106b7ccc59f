"""Whole models: what a layer is calibrated with, and the folder that is written."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from sl_serve import stored_model
from sl_serve.errors import UserError
from sl_serve.loader import Parts
from sl_serve.plan.fit import plan_memory
from sl_serve.plan.memory import MemoryPlan
from sl_serve.quantising import folder as writing
from sl_serve.quantising import layers
from sl_serve.quantising.run import quantise_model
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.groups import Grouped
from tests.engine.running import GREEDY, config, engine, random_prompts, run
from tests.models import TINY_MODELS
from tests.weights.tiny_models import tiny_llama, write_tiny_gguf

pytestmark = pytest.mark.usefixtures("one_thread")

N_LAYERS = 3
PROMPTS = random_prompts(3, longest=30, seed=6)
SHORT = replace(GREEDY, max_tokens=8)
WINDOWS = torch.randint(0, 250, (6, 48), generator=torch.Generator().manual_seed(1))
# A matrix for each input that is watched, in the order in which they are used.
WATCHED = {
    "llama": ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"),
    "opt": ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"),
}


def quantise(source: Path, out: Path, windows: torch.Tensor = WINDOWS) -> Path:
    checkpoint = open_checkpoint(source)
    try:
        quantise_model(checkpoint, "int4", windows, out, lambda: None)
    finally:
        checkpoint.close()
    return out


def write_dequantised(folder: Path, to: Path) -> Path:
    """The same numbers in float32."""
    checkpoint = open_checkpoint(folder)
    tensors = {name: checkpoint.read(name).float().clone() for name in checkpoint.names()}
    checkpoint.close()
    to.mkdir()
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    for file in folder.glob("*.json"):
        shutil.copyfile(file, to / file.name)
    settings = json.loads((folder / "config.json").read_text())
    del settings["quantization_config"]
    (to / "config.json").write_text(json.dumps(settings))
    return to


class Quantised:
    """A tiny model of a family, quantised, and the Hessians that this took."""

    def __init__(self, family: str, root: Path) -> None:
        self.family, self.source = family, root / "source"
        self.source.mkdir()
        TINY_MODELS[family](self.source, tie_word_embeddings=False)
        self.hessians: list[torch.Tensor] = []
        true_gptq = layers.gptq

        def watched(w: torch.Tensor, hessian: torch.Tensor, group: int) -> Grouped:
            self.hessians.append(hessian.clone())
            return true_gptq(w, hessian, group)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "gptq", watched)
            self.folder = quantise(self.source, root / "quantised")
        self.dequantised = write_dequantised(self.folder, root / "dequantised")

    def reference(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.dequantised, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["llama", "opt"])
def quantised(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Quantised:
    return Quantised(request.param, tmp_path_factory.mktemp(request.param))


def test_each_matrix_sees_what_those_before_it_have_become(quantised: Quantised) -> None:
    """transformers, with the quantised numbers, gives each matrix the inputs that it was calibrated
    with; those of the embedding are the model's own."""
    model = quantised.reference()
    source = AutoModelForCausalLM.from_pretrained(quantised.source, dtype=torch.float32)
    model.get_input_embeddings().weight.data.copy_(source.get_input_embeddings().weight)
    found: list[torch.Tensor] = []

    def watch(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2)
        found.append(x.t() @ x / len(x))

    blocks = model.model.decoder.layers if quantised.family == "opt" else model.model.layers
    for block in blocks:
        for name in WATCHED[quantised.family]:
            block.get_submodule(name).register_forward_pre_hook(watch)
    with torch.no_grad():
        model(WINDOWS)
    assert len(found) == len(quantised.hessians) == 4 * N_LAYERS
    for ours, theirs in zip(quantised.hessians, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_tokens_are_those_of_the_same_numbers_in_transformers(quantised: Quantised) -> None:
    with engine(quantised.folder, config(max_rows=4)) as running:
        outputs = run(running, PROMPTS, SHORT)
    model = quantised.reference()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert float((logits.amax(1) - chosen).max()) < 1e-4


def test_layers_are_in_blocks_and_the_rest_as_weights_int4_has_it(quantised: Quantised) -> None:
    ours, source = open_checkpoint(quantised.folder), open_checkpoint(quantised.source)
    assert ours.config == source.config
    of_layers = [n for n in ours.names() if ".layers." in n and len(ours.shape(n)) == 2]
    assert {ours.format(n).name for n in of_layers} == {"int4_g64_min", "int4_g32_min"}
    assert ours.format("lm_head.weight").name == "int8_g64_sym"
    for name in ours.names():
        assert ours.shape(name) == source.shape(name)
        off = (ours.read(name) - source.read(name)).norm() / source.read(name).norm()
        assert off < (0.3 if name in of_layers else 0.01), name
    ours.close()
    source.close()


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_layers_on_disk_come_from_the_folder_itself(
    quantised: Quantised, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """No folder for a spool is given; bytes read are those of the blocks."""
    with engine(quantised.folder, config(max_rows=4)) as running:
        expected = run(running, PROMPTS, SHORT)

    def planned(*args: object) -> MemoryPlan:
        return replace(plan_memory(*args), n_disk_layers=2)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_model, "plan_memory", planned)
    parts: list[Parts] = []
    settings = replace(config(max_rows=4, look_ahead=0), device=device)
    with engine(quantised.folder, settings, change=parts.append) as running:
        assert run(running, PROMPTS, SHORT) == expected
        layout, store = parts[0].store.layout, parts[0].store
        n_acquired = parts[0].sweep.weights.n_bytes_moved // layout.stored_bytes(0)
        assert n_acquired > 0 and n_acquired % N_LAYERS == 0
        n_read = n_acquired // N_LAYERS * 2
        content_bytes = sum(s.size_bytes for s in layout.segments(0))
        assert any(s.format.dtype is None for s in layout.segments(0))
        if device == "cpu":
            assert store.n_disk_bytes_read == n_read * content_bytes
        else:
            assert 0 < store.n_disk_bytes_read <= n_read * content_bytes


def test_a_large_folder_is_written_in_shards(
    quantised: Quantised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 60_000)
    sharded = open_checkpoint(quantise(quantised.source, tmp_path / "out"))
    whole = open_checkpoint(quantised.folder)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert sharded.names() == whole.names()
    for name in whole.names():
        assert torch.equal(sharded.read(name), whole.read(name))
    sharded.close()
    whole.close()


BYTE_LEVEL = {
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<x>", "c", "ac", "\u0120", "<end>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b", "a c"],
    "tokenizer.ggml.bos_token_id": 3,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}{{ eos_token }}",
}


def test_a_gguf_file_becomes_a_folder_with_its_settings_and_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    q8 = gguf.GGMLQuantizationType.Q8_0
    write_tiny_gguf(path, tiny_llama(vocab_size=8), quantisation=q8, settings=BYTE_LEVEL)
    source = open_checkpoint(path)
    ours = open_checkpoint(quantise(path, tmp_path / "out", WINDOWS % 8))
    assert ours.config == source.config
    assert ours.format("model.embed_tokens.weight").name == "q8_0"  # in few bits already
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(ours.read(name), source.read(name))
    down = "model.layers.1.mlp.down_proj.weight"
    assert ours.format(down).name == "int4_g32_min"
    assert (ours.read(down) - source.read(down)).norm() < 0.3 * source.read(down).norm()
    theirs, tokenizer = source.load_tokenizer(), ours.load_tokenizer()
    text = "ab<x>cac a<end>"
    assert tokenizer.encode(text) == theirs.encode(text)
    assert tokenizer.decode([2, 3, 6]) == theirs.decode([2, 3, 6])
    assert tokenizer.eos_token_ids == theirs.eos_token_ids == (7,)
    assert tokenizer.bos_token == theirs.bos_token == "<x>"
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.render_chat(chat) == theirs.render_chat(chat) == "ab<end>"
    ours.close()
    source.close()


Break = Callable[[pytest.MonkeyPatch], None]


def full_disk(patch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    patch.setattr(writing.shutil, "disk_usage", lambda _: usage(1000))


def disk_filling_up(patch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    patch.setattr(writing, "save_file", fail)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (full_disk, r"about .* are needed, .* are free in .*; choose another disk"),
        (disk_filling_up, "out: cannot be written .*No space left on device"),
    ],
)
def test_a_disk_without_room_is_told_and_nothing_is_left(
    quantised: Quantised,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: Break,
    message: str,
) -> None:
    broken(monkeypatch)
    with pytest.raises(UserError, match=message):
        quantise(quantised.source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(quantised: Quantised, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already; choose another OUT"):
        quantise(quantised.source, tmp_path)
