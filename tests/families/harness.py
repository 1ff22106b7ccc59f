"""What every family is held to: transformers in float32, on tiny random checkpoints.

A family's test file names its classes of transformers, its settings and its variants, and gets the
tests of `FamilyTests`. Every log probability at every position is compared, so a rule that goes
wrong for one token in a thousand shows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sl_serve.core import SamplingParams, TokenOut
from sl_serve.device import Device, SimDevice
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.requantised import with_weights
from tests.engine.running import config, engine, random_prompts, requests_for
from tests.models import VOCAB_SIZE, with_lively_vectors, write_tokenizer

N_OUTPUT = 6
EVERYTHING = SamplingParams(
    max_tokens=N_OUTPUT,
    temperature=0,
    ignore_eos=True,
    logprobs=VOCAB_SIZE,
    prompt_logprobs=VOCAB_SIZE,
)
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough that near-ties are rare
    "eos_token_id": 256,
    "bos_token_id": 257,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Tiny:
    """Tiny checkpoints of one family. `variants`: name -> changes of settings; the empty name is
    the family as `settings` has it."""

    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    settings: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return self.config.model_type

    @property
    def names(self) -> list[str]:
        return ["", *self.variants]

    def write(self, folder: Path, variant: str = "") -> PreTrainedModel:
        """Saves it as a Hugging Face folder; returns the reference."""
        settings = {**COMMON, **self.settings, **(self.variants[variant] if variant else {})}
        torch.manual_seed(zlib.crc32(variant.encode()))
        model = with_lively_vectors(self.model(self.config(**settings)))
        model.save_pretrained(folder)
        write_tokenizer(folder)
        return model


# The reference's parameters and a checkpoint's name -> what that is of them.
Find = Callable[[Mapping[str, torch.Tensor], str], torch.Tensor]


class FamilyTests:
    """Derive from it with `tiny` set; `variant` runs through its names (conftest.py)."""

    tiny: ClassVar[Tiny]
    # Where transformers' parameters are not the checkpoint's tensors.
    find: ClassVar[Find] = staticmethod(lambda parameters, name: parameters[name])

    def test_every_log_probability_at_every_position(self, variant: str, tmp_path: Path) -> None:
        """Prompts as a whole; then a few tokens at a time, layers streamed through two slots of a
        simulated device."""
        reference = self.tiny.write(tmp_path, variant)
        prompts = random_prompts(3)
        check(reference, prompts, news_of(tmp_path, prompts))
        check(reference, prompts, news_of(tmp_path, prompts, 7, SimDevice()))

    def test_short_weights(self, short_weights: str, tmp_path: Path) -> None:
        """As transformers computes with the numbers that our blocks stand for."""
        reference = self.tiny.write(tmp_path)
        prompts = random_prompts(3)
        with_numbers_of(reference, tmp_path, short_weights, self.find)
        check(reference, prompts, news_of(tmp_path, prompts, weights=short_weights), 1e-3)


def news_of(
    folder: Path,
    prompts: list[list[int]],
    chunk: int = 512,
    device: Device | None = None,
    weights: str = "auto",
) -> list[list[TokenOut]]:
    settings = config(max_rows=8, prefill_chunk_tokens=chunk)
    with engine(folder, settings, device, weights=weights) as running:
        requests, answers = requests_for(prompts, EVERYTHING)
        running.submit(requests)
        answers.wait()
    return answers.news


def check(
    reference: PreTrainedModel,
    prompts: Sequence[list[int]],
    news: Sequence[Sequence[TokenOut]],
    tolerance: float = 1e-4,
) -> None:
    for prompt, outs in zip(prompts, news, strict=True):
        said = [p for p in outs[0].prompt_logprobs or () if p] + [n.logprobs[0] for n in outs]
        output = [t for n in outs for t in n.token_ids]
        assert len(said) == len(prompt) - 1 + N_OUTPUT
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + output])).logits[0, :-1].float()
        expected = torch.log_softmax(logits, dim=-1)
        found = torch.empty(expected.shape)
        for line, entry in zip(found, said, strict=True):
            ids, values = zip(*entry.top, strict=True)
            line[list(ids)] = torch.tensor(values)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 10)
        chosen = logits[len(prompt) - 1 :]
        gaps = chosen.max(-1).values - chosen.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert gaps.max() < 10 * tolerance, "another token than the reference's"


def with_numbers_of(reference: PreTrainedModel, folder: Path, weights: str, find: Find) -> None:
    """The reference's parameters become what the checkpoint's are in so few bits."""
    checkpoint = with_weights(open_checkpoint(folder), weights)
    changed = 0
    with torch.no_grad():
        parameters = reference.state_dict()
        for name in checkpoint.names():
            if checkpoint.format(name).dtype is None:
                numbers, transposed = checkpoint.read(name), checkpoint.config.transposed
                as_there = numbers.t() if name.endswith(transposed) else numbers
                find(parameters, name).copy_(as_there)
                changed += 1
    checkpoint.close()
    assert changed, "nothing became shorter"
