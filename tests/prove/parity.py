"""Greedy tokens and log probabilities of SmolLM2 against transformers, 64 prompts x 64 tokens.

Usage: scripts/prove parity [N_PROMPTS] [N_TOKENS]

Lists every divergence with its logit gap (the reference's best logit less that of our token, given
the same tokens before it) and fails when a gap or a difference of log probabilities exceeds 1e-3.
The prompts are pieces of this repository's own documents, of unequal length.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from sl_serve.config import EngineConfig
from sl_serve.core import SamplingParams
from sl_serve.llm import UNBOUNDED_QUEUE
from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.locate import resolve_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.engine.running import engine, requests_for  # noqa: E402
from tests.engine.test_parity import load_gguf_reference  # noqa: E402
from tests.parity import compare  # noqa: E402

LIMIT = 1e-3


def document_prompts(tokenizer: Tokenizer, n: int) -> list[list[int]]:
    """Pieces of 4 to 100 tokens."""
    documents = sorted(ROOT.glob("docs/*.md"))
    ids = [i for d in documents for i in tokenizer.encode(d.read_text(), add_special_tokens=False)]
    lengths = [4 + (37 * i) % 97 for i in range(n)]
    starts = [(i * len(ids)) // (n + 1) for i in range(n)]
    return [ids[s : s + length] for s, length in zip(starts, lengths, strict=True)]


def main(n_prompts: int = 64, n_tokens: int = 64) -> int:
    console = Console()
    path = resolve_model("smollm2")
    sampling = SamplingParams(
        max_tokens=n_tokens, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    with engine(path, EngineConfig(queue=UNBOUNDED_QUEUE)) as running:
        prompts = document_prompts(running.tokenizer, n_prompts)
        requests, answers = requests_for(prompts, sampling)
        with console.status(f"{n_prompts} prompts x {n_tokens} tokens"):
            running.submit(requests)
            answers.wait(3600)
    with console.status("transformers' logits for the same tokens"):
        report = compare(load_gguf_reference(path), prompts, answers.news)
    for divergence in report.divergences:
        console.print(f"divergence: {divergence}")
    console.print(
        f"{report.n_tokens} tokens, {len(report.divergences)} divergences, worst difference of "
        f"log probabilities: output {report.worst_output:.2e}, prompt {report.worst_prompt:.2e}"
    )
    gaps = [d.gap for d in report.divergences]
    return int(max([report.worst_output, report.worst_prompt, *gaps]) > LIMIT)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
