"""Against transformers, in float32: tokens, and log probabilities of prompt and output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sl_serve.core import SamplingParams, TokenOut
from tests.engine.running import config, engine, random_prompts, requests_for
from tests.models import write_tiny_llama
from tests.parity import Divergence, compare

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 24},
    "linear-rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3-rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def news_of(
    folder: Path, prompts: list[list[int]], sampling: SamplingParams
) -> list[list[TokenOut]]:
    with engine(folder, config(max_rows=8, prefill_chunk_tokens=32)) as running:
        requests, answers = requests_for(prompts, sampling)
        running.submit(requests)
        answers.wait()
    return answers.news


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_llama_equals_transformers(variant: str, tmp_path: Path) -> None:
    reference = write_tiny_llama(tmp_path, **VARIANTS[variant])
    sampling = SamplingParams(
        max_tokens=20, temperature=0, ignore_eos=True, logprobs=2, prompt_logprobs=1
    )
    prompts = random_prompts(6)
    report = compare(reference, prompts, news_of(tmp_path, prompts, sampling))
    assert report.worst_output < 1e-4
    assert report.worst_prompt < 1e-4
    assert [d for d in report.divergences if d.gap > 1e-4] == []


def test_smollm2_equals_transformers(smollm2_path: Path) -> None:
    """The small version of `scripts/prove parity`."""
    prompts = random_prompts(6, longest=40)
    sampling = SamplingParams(
        max_tokens=12, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    reference = load_gguf_reference(smollm2_path)
    report = compare(reference, prompts, news_of(smollm2_path, prompts, sampling))
    assert report.worst_output < 1e-3
    assert report.worst_prompt < 1e-3
    assert [d for d in report.divergences if d.gap > 1e-3] == []


def load_gguf_reference(path: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def test_compare_notices_a_wrong_token(tiny: tuple[Path, LlamaForCausalLM]) -> None:
    folder, reference = tiny
    prompts = random_prompts(1)
    sampling = SamplingParams(max_tokens=4, temperature=0, logprobs=0, prompt_logprobs=0)
    news = news_of(folder, prompts, sampling)
    first = news[0][0]
    wrong = TokenOut(
        first.request_id,
        ((first.token_ids[0] + 1) % 256,),
        "",
        first.logprobs,
        first.prompt_logprobs,
    )
    report = compare(reference, prompts, [[wrong]])
    assert isinstance(report.divergences[0], Divergence)
    assert report.divergences[0].gap > 0
