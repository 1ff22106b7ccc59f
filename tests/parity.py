"""Comparison of what an engine said with a reference model's own logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from sl_serve.core import TokenOut


class Divergence(NamedTuple):
    """A token that the reference, given the same tokens before it, would not have chosen."""

    request: int
    position: int  # of the output
    gap: float  # between the reference's best logit and that of the token


@dataclass
class Report:
    n_tokens: int = 0
    worst_output: float = 0.0  # largest difference of a chosen token's log probability
    worst_prompt: float = 0.0
    divergences: list[Divergence] = field(default_factory=list)


@torch.inference_mode()
def compare(
    reference: PreTrainedModel, prompts: Sequence[list[int]], news: Sequence[Sequence[TokenOut]]
) -> Report:
    """One forward pass of the reference per request, over prompt and output together."""
    report = Report()
    for i, (prompt, outs) in enumerate(zip(prompts, news, strict=True)):
        output = [t for out in outs for t in out.token_ids]
        logits = reference(torch.tensor([prompt + output])).logits[0].float()
        logprobs = torch.log_softmax(logits, dim=-1)
        said = [lp.logprob for out in outs for lp in out.logprobs]
        prompt_said = next(out.prompt_logprobs for out in outs if out.prompt_logprobs)
        for position, token in enumerate(output):
            line = logits[len(prompt) - 1 + position]
            gap = float(line.max() - line[token])
            if int(line.argmax()) != token:
                report.divergences.append(Divergence(i, position, gap))
            expected = float(logprobs[len(prompt) - 1 + position, token])
            report.worst_output = max(report.worst_output, abs(expected - said[position]))
        for position in range(1, len(prompt)):
            entry = prompt_said[position]
            assert entry is not None and entry.token_id == prompt[position]
            expected = float(logprobs[position - 1, prompt[position]])
            report.worst_prompt = max(report.worst_prompt, abs(expected - entry.logprob))
        report.n_tokens += len(output)
    return report
