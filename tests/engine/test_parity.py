"""Against transformers, in float32: tokens, and log probabilities of prompt and output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sl_serve.core import SamplingParams, TokenOut
from sl_serve.device import Device
from tests.engine.running import config, engine, random_prompts, requests_for
from tests.models import TINY_MODELS
from tests.parity import Divergence, compare


def news_of(
    folder: Path,
    prompts: list[list[int]],
    sampling: SamplingParams,
    chunk: int = 32,
    device: Device | None = None,
) -> list[list[TokenOut]]:
    settings = config(max_rows=8, prefill_chunk_tokens=chunk)
    with engine(folder, settings, device) as running:
        requests, answers = requests_for(prompts, sampling)
        running.submit(requests)
        answers.wait()
    return answers.news


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_short_weights_are_computed_with_in_float32(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    TINY_MODELS[family](tmp_path).to(dtype).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    sampling = SamplingParams(
        max_tokens=12, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    prompts = random_prompts(4)
    report = compare(reference, prompts, news_of(tmp_path, prompts, sampling))
    assert report.worst_output < 1e-4
    assert report.worst_prompt < 1e-4
    assert [d for d in report.divergences if d.gap > 1e-4] == []


def test_smollm2_equals_transformers(smollm2_path: Path) -> None:
    """The small version of `scripts/prove parity`."""
    prompts = random_prompts(3, longest=24)
    sampling = SamplingParams(
        max_tokens=8, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0
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
