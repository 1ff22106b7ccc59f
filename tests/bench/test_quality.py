from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from bench import quality_calibrated
from bench.errors import BenchError
from bench.quality import TEXT, variants
from bench.quality_report import BEGIN, END, markdown, update_document
from bench.quality_work import Divergence, Variant, measure
from tests.models import TINY_MODELS

WINDOW, N_TOKENS = 24, 60  # the last window is shorter
VARIANTS = [
    Variant("int8", "float32"),
    Variant("auto", "bfloat16"),
    Variant("int4", "int8"),
    Variant("int4-calibrated", "float32"),
    Variant("int4", "float32", "int8"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    TINY_MODELS["llama"](folder)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_calibrated, "N_TOKENS", 1024)
        return measure(str(folder), TEXT.read_text(), VARIANTS, N_TOKENS, WINDOW)


def test_perplexity_is_that_of_transformers(folder: Path, report: dict[str, Any]) -> None:
    from sl_serve.llm import open_model

    ids = open_model(str(folder)).load_tokenizer().encode(TEXT.read_text())[:N_TOKENS]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
    losses = []
    for start in range(0, N_TOKENS, WINDOW):
        window = torch.tensor(ids[start : start + WINDOW])
        with torch.no_grad():
            logits = model(window[None]).logits[0, :-1]
        losses.append(F.cross_entropy(logits, window[1:], reduction="none"))
    expected = math.exp(torch.cat(losses).mean())
    reference = report["variants"][0]
    assert reference["n"] == N_TOKENS - 3  # a window's first token is not predicted
    assert reference["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert reference["mean_divergence"] == 0.0


def test_shorter_formats_differ_a_little_and_take_fewer_bytes(report: dict[str, Any]) -> None:
    reference, *others = report["variants"]
    assert [Variant(row["weights"], row["kv"], row["activations"]) for row in others] == VARIANTS
    small = [row["mean_divergence"] < 0.01 for row in others]
    assert small == [True, True, False, False, False]
    assert all(0 < row["mean_divergence"] < 0.5 for row in others)
    assert others[0]["weight_bytes"] < reference["weight_bytes"]
    assert others[3]["weight_bytes"] == others[2]["weight_bytes"]
    assert others[1]["kv_token_bytes"] * 2 == reference["kv_token_bytes"]


def test_divergence_is_the_mean_of_kl_divergences() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 30, generator=generator).log_softmax(-1)
    targets = torch.arange(5)
    sums = Divergence()
    sums.add(p[:2], q[:2], targets[:2])
    sums.add(p[2:], q[2:], targets[2:])
    expected = F.kl_div(q.double(), p.double(), reduction="sum", log_target=True)
    assert sums.divergence == pytest.approx(expected.item(), rel=1e-5)
    assert sums.perplexity == pytest.approx(math.exp(F.nll_loss(q, targets)), rel=1e-5)


def test_too_short_a_text_is_refused_with_the_numbers(folder: Path) -> None:
    with pytest.raises(BenchError, match=r"the text has \d+ tokens, 60 are to be read"):
        measure(str(folder), "a word", [], N_TOKENS, WINDOW)


def test_variants_of_the_command_line() -> None:
    assert variants("int8, int4", "bfloat16", "int4:int8", "auto") == [
        Variant("int8", "float32"),
        Variant("int4", "float32"),
        Variant("auto", "bfloat16"),
        Variant("int4", "int8"),
        Variant("auto", "float32", "int8"),
    ]
    with pytest.raises(BenchError, match="--both: 'int4' is not WEIGHTS:KV"):
        variants("", "", "int4", "")
    with pytest.raises(BenchError, match="'int2' is no KV format; there are: auto, float32"):
        variants("", "int2", "", "")


def test_only_the_table_of_a_document_is_replaced(tmp_path: Path, report: dict[str, Any]) -> None:
    document = tmp_path / "quality.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update_document(document, report)
    assert document.read_text() == f"before\n{BEGIN}\n{markdown(report)}\n{END}\nafter\n"
    document.write_text("nothing")
    with pytest.raises(BenchError, match="has no lines"):
        update_document(document, report)


def test_the_published_table_is_that_of_its_run() -> None:
    root = Path(__file__).parents[2]
    published = (root / "docs" / "quality.md").read_text()
    (results,) = (root / "bench" / "results").glob("*-quality-smollm2.json")
    assert markdown(json.loads(results.read_text())) in published
