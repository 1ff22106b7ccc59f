"""Decoders that run through transformers' own modules."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    ArceeConfig,
    ArceeForCausalLM,
    AutoConfig,
    BioGptConfig,
    BioGptForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    Exaone4Config,
    Exaone4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GraniteSWAConfig,
    GraniteSWAForCausalLM,
    HeliumConfig,
    HeliumForCausalLM,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from sl_serve.cli import main
from sl_serve.config import EngineConfig
from sl_serve.core import SamplingParams
from sl_serve.device import SimDevice
from sl_serve.errors import ModelError, UserError
from sl_serve.llm import LLM, UNBOUNDED_QUEUE
from sl_serve.models.generic import tap
from sl_serve.quantising.run import quantise_model
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.dummy import open_dummy
from tests.engine.running import random_prompts
from tests.families.harness import FamilyTests, Tiny, check, news_of
from tests.families.test_llama import TINY as LLAMA
from tests.plan.made_by_blocks import check_planned

WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATENT = {  # keys of 24 elements, values of 16
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
}
SOME_EXPERTS = {  # in all layers but the first
    "moe_num_experts": 6,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "moe_layer_start_index": 1,
    "first_k_dense_replace": 1,
}
MODELS = {
    tiny.family: tiny
    for tiny in (
        Tiny(ApertusConfig, ApertusForCausalLM),
        Tiny(ArceeConfig, ArceeForCausalLM),
        Tiny(BioGptConfig, BioGptForCausalLM),
        Tiny(Ernie4_5Config, Ernie4_5ForCausalLM, {"head_dim": 24}),
        Tiny(Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, SOME_EXPERTS | {"moe_k": 2}),
        Tiny(Exaone4Config, Exaone4ForCausalLM, WINDOWS | {"num_hidden_layers": 4}),
        Tiny(Glm4MoeConfig, Glm4MoeForCausalLM, SOME_EXPERTS | {"head_dim": 16}),
        Tiny(GPTBigCodeConfig, GPTBigCodeForCausalLM),
        Tiny(GraniteSWAConfig, GraniteSWAForCausalLM, MULTIPLIERS),
        Tiny(HunYuanDenseV1Config, HunYuanDenseV1ForCausalLM, {"head_dim": 16}),
        Tiny(MiniCPM3Config, MiniCPM3ForCausalLM, LATENT),
        Tiny(NanoChatConfig, NanoChatForCausalLM),
        Tiny(NemotronConfig, NemotronForCausalLM),
        Tiny(Olmo3Config, Olmo3ForCausalLM, WINDOWS | {"num_hidden_layers": 4}),
        Tiny(OlmoeConfig, OlmoeForCausalLM, {"num_experts": 6, "num_experts_per_tok": 2}),
        Tiny(PersimmonConfig, PersimmonForCausalLM),
        Tiny(PhiConfig, PhiForCausalLM),  # its head has a bias
    )
}


@pytest.fixture(autouse=True)
def no_family_has_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sl_serve.weights.hf_config.supported_families", tuple)


class TestHelium(FamilyTests):
    tiny = Tiny(HeliumConfig, HeliumForCausalLM, {"head_dim": 16})


@pytest.mark.parametrize("model_type", MODELS)
def test_every_log_probability_of_other_decoders(model_type: str, tmp_path: Path) -> None:
    reference = MODELS[model_type].write(tmp_path)
    prompts = random_prompts(3)
    check(reference, prompts, news_of(tmp_path, prompts))


@pytest.mark.parametrize("model_type", ["exaone4", "ernie4_5_moe"])
def test_other_decoders_streamed_in_chunks(model_type: str, tmp_path: Path) -> None:
    reference = MODELS[model_type].write(tmp_path)
    prompts = random_prompts(3)
    check(reference, prompts, news_of(tmp_path, prompts, 7, SimDevice()))


def test_a_checkpoint_in_bfloat16(tmp_path: Path) -> None:
    tiny = MODELS["olmo3"]
    reference = tiny.write(tmp_path)
    reference.bfloat16().save_pretrained(tmp_path)
    reference = tiny.model.from_pretrained(tmp_path, dtype=torch.float32)
    prompts = random_prompts(2)
    check(reference, prompts, news_of(tmp_path, prompts))


def test_a_family_with_a_file_of_its_own_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = LLAMA.write(tmp_path, "llama3-rope")
    prompts = random_prompts(3)
    assert open_checkpoint(tmp_path).config.family == "generic"
    found = news_of(tmp_path, prompts)
    monkeypatch.undo()
    assert open_checkpoint(tmp_path).config.family == "llama"
    own = news_of(tmp_path, prompts)
    check(reference, prompts, found)
    assert [[o.token_ids for o in outs] for outs in found] == [
        [o.token_ids for o in outs] for outs in own
    ]


def write_settings(folder: Path, model_type: str, **changes: Any) -> None:
    AutoConfig.for_model(model_type, **changes).save_pretrained(folder)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("t5", {}, "an encoder beside its decoder"),
        ("vit", {}, "no decoder that writes text"),
        ("gemma3", {}, "parts beside its text decoder"),
        ("mamba", {"num_hidden_layers": 2}, "'linear_attention'"),
        ("lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "'conv'"),
        ("xglm", {"num_layers": 2}, "do not attend by transformers' interface"),
        ("falcon", {"num_hidden_layers": 2}, "takes no other"),
        ("doge", {"num_hidden_layers": 2}, "masks attention by means of its own"),
        ("helium", {"num_hidden_layers": 2, "is_causal": False}, r"\d+% off"),
        ("gemma4_text", {"num_hidden_layers": 6}, "different shapes"),
        ("granitemoe", {"num_hidden_layers": 2}, "all experts in one tensor"),
        ("diffllama", {"num_hidden_layers": 2}, "attend more than once"),
        (
            "helium",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "'dynamic'",
        ),
    ],
)
def test_what_cannot_run_is_refused_by_name(
    model_type: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    write_settings(tmp_path, model_type, **changes)
    with pytest.raises(ModelError, match=f"'{model_type}' is not supported.*{reason}"):
        open_checkpoint(tmp_path)


def test_a_refusal_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_settings(tmp_path, "mamba", num_hidden_layers=2)
    monkeypatch.setattr(sys, "argv", ["sl-serve", "generate", str(tmp_path), "--prompt", "Hello"])
    with pytest.raises(SystemExit) as exited:
        main()
    err = " ".join(capfd.readouterr().err.split())
    assert exited.value.code == 2
    assert "'mamba' is not supported" in err and "Traceback" not in err


def test_what_is_misunderstood_shows_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here: windows."""
    MODELS["exaone4"].write(tmp_path)
    monkeypatch.setattr(tap, "_mask", lambda **_: None)
    with pytest.raises(ModelError, match=r"logits that are \d+% off"):
        open_checkpoint(tmp_path)


def test_its_weights_are_not_calibrated(tmp_path: Path) -> None:
    MODELS["arcee"].write(tmp_path)
    windows = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(UserError, match=r"transformers' modules cannot be calibrated.*--weights"):
        quantise_model(open_checkpoint(tmp_path), "int4", windows, tmp_path / "out", lambda: None)
    assert not (tmp_path / "out").exists()


def test_code_of_the_folder_is_not_run(tmp_path: Path) -> None:
    MODELS["arcee"].write(tmp_path)
    (tmp_path / "modeling.py").write_text("raise AssertionError('it was run')")
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    classes = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    path.write_text(json.dumps(settings | {"auto_map": classes}))
    assert open_checkpoint(tmp_path).config.family == "generic"


def test_settings_come_from_transformers(tmp_path: Path) -> None:
    """What config.json leaves out is what transformers takes for it."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    write_settings(tmp_path, "helium", num_hidden_layers=2, vocab_size=64, **sizes)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    for name in ("eos_token_id", "bos_token_id", "max_position_embeddings"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings))
    expected, config = HeliumConfig(), open_dummy(str(tmp_path)).config
    assert config.eos_token_ids == (expected.eos_token_id,)
    assert config.bos_token_id == expected.bos_token_id
    assert config.max_positions == expected.max_position_embeddings
    assert (config.n_layers, config.hidden_size, config.vocab_size) == (2, 64, 64)


@pytest.mark.parametrize("model_type", ["arcee", "olmo3", "gpt_bigcode", "apertus"])
def test_the_planner_leaves_room_for_what_a_module_makes(model_type: str, tmp_path: Path) -> None:
    MODELS[model_type].write(tmp_path)
    config = open_checkpoint(tmp_path).config
    check_planned(config, EngineConfig(), 300)


def test_random_weights_of_settings_alone(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    write_settings(tmp_path, "apertus", num_attention_heads=4, **sizes)
    config = EngineConfig(load_format="dummy", kv_memory_bytes=4 << 20, queue=UNBOUNDED_QUEUE)
    sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, logprobs=0)
    with LLM(str(tmp_path), config) as llm:
        (found,) = llm.generate([[5, 3, 200]], sampling)
    assert len(found.token_ids) == 4
    assert all(math.isfinite(entry.logprob) for entry in found.logprobs)
