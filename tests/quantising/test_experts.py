"""Models with experts: what each is calibrated with, and what becomes of those that few tokens
chose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sl_serve.quantising import layers
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.groups import Grouped
from sl_serve.weights.requantised import with_weights
from tests.engine.running import random_prompts
from tests.families.experts import joined_expert, stacked_expert
from tests.families.harness import check, news_of
from tests.families.test_deepseek_v3 import TINY as DEEPSEEK
from tests.families.test_gguf import write as write_gguf_of
from tests.families.test_gpt_oss import TINY as GPT_OSS
from tests.families.test_mixtral import TINY as MIXTRAL
from tests.families.test_qwen2_moe import TINY as QWEN
from tests.quantising.test_folder import WINDOWS, quantise, write_dequantised

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {tiny.family: tiny for tiny in (MIXTRAL, QWEN, DEEPSEEK, GPT_OSS)}
ENOUGH_TOKENS = 70  # of 288: some experts of each layer have more, some fewer
MATRICES = ("w1", "w3", "w2")


@pytest.fixture(autouse=True)
def _enough_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MIN_EXPERT_TOKENS", ENOUGH_TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_runs_with_its_numbers(family: str, tmp_path: Path) -> None:
    reference = FAMILIES[family].write(tmp_path / "source")
    out = quantise(tmp_path / "source", tmp_path / "out")
    checkpoint, parameters = open_checkpoint(out), reference.state_dict()
    source = open_checkpoint(tmp_path / "source")
    find = stacked_expert if family == "gpt_oss" else joined_expert
    experts = [n for n in checkpoint.names() if ".experts." in n and len(checkpoint.shape(n)) == 2]
    assert {checkpoint.format(n).name for n in experts} <= {"int4_g64_min", "int4_g32_min"}
    assert experts
    with torch.no_grad():
        for name in checkpoint.names():
            numbers = checkpoint.read(name)
            assert (numbers - source.read(name)).norm() <= 0.3 * source.read(name).norm(), name
            here = name.replace("block_sparse_moe.gate", "mlp.gate")  # transformers' own name
            find(parameters, here).copy_(numbers)
    for each in (checkpoint, source):
        each.close()
    prompts = random_prompts(3)
    check(reference, prompts, news_of(out, prompts), 1e-3)


def test_each_expert_sees_the_tokens_that_chose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers routes them with the quantised numbers; with too few it is rounded."""
    source = MIXTRAL.write(tmp_path / "source")
    hessians: list[torch.Tensor] = []
    true_gptq = layers.gptq

    def watched(w: torch.Tensor, hessian: torch.Tensor, group: int) -> Grouped:
        hessians.append(hessian.clone())
        return true_gptq(w, hessian, group)

    monkeypatch.setattr(layers, "gptq", watched)
    out = quantise(tmp_path / "source", tmp_path / "out")
    ours = open_checkpoint(out)
    rounded = with_weights(open_checkpoint(tmp_path / "source"), "int4")
    model = AutoModelForCausalLM.from_pretrained(
        write_dequantised(out, tmp_path / "dequantised"), dtype=torch.float32
    ).eval()
    model.get_input_embeddings().weight.data.copy_(source.get_input_embeddings().weight)
    asked: list[tuple[torch.Tensor, ...]] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: asked.append(inputs))
    with torch.no_grad():
        model(WINDOWS)
    found = iter(hessians)
    n_known = 0
    for i, (layer, (hidden, chosen, _)) in enumerate(zip(model.model.layers, asked, strict=True)):
        next(found), next(found)  # of attention
        experts = layer.mlp.experts
        for expert in range(len(experts.down_proj)):
            x = hidden.flatten(0, -2)[(chosen == expert).any(-1)].detach()
            module = f"model.layers.{i}.block_sparse_moe.experts.{expert}"
            same = [
                torch.equal(ours.read_blocks(name), rounded.read_blocks(name))
                for name in (f"{module}.{matrix}.weight" for matrix in MATRICES)
            ]
            assert all(same) if len(x) < ENOUGH_TOKENS else not any(same)
            if len(x) < ENOUGH_TOKENS:
                continue
            n_known += 1
            gate, up = (x @ experts.gate_up_proj[expert].detach().t()).chunk(2, -1)
            for entering in (x, torch.nn.functional.silu(gate) * up):
                expected = entering.t() @ entering / len(x)
                most = float(expected.abs().max())
                torch.testing.assert_close(next(found), expected, rtol=1e-3, atol=1e-4 * most)
    assert next(found, None) is None
    assert 0 < n_known < 3 * 8
    ours.close()
    rounded.close()


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "qwen2_moe"])
def test_a_gguf_file_becomes_a_folder(family: str, tmp_path: Path) -> None:
    write_gguf_of(tmp_path, family)
    path = tmp_path / "model.gguf"
    out = quantise(path, tmp_path / "out")
    ours, source = open_checkpoint(out), open_checkpoint(path)
    assert ours.config == source.config
    assert set(ours.names()) == set(source.names())
    for name in ours.names():
        off = (ours.read(name) - source.read(name)).norm() / source.read(name).norm()
        assert off < (0.3 if ours.format(name).dtype is None else 1e-6), name
    ours.close()
    source.close()
