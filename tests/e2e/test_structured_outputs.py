"""Forms of outputs over HTTP on a tiny random model, whose own mind is nothing but noise."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
import torch
import xgrammar
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import pre_tokenizers
from transformers import LlamaForCausalLM

from sl_serve.engine import Engine
from sl_serve.grammar.vocabulary import special_text, vocabulary_of
from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.checkpoint import open_checkpoint
from tests.e2e.serving import SETTINGS
from tests.engine.running import config, engine
from tests.server.conftest import LiveServer

HI: Any = [{"role": "user", "content": "hi"}]
# A model that is noise loves blanks as it loves everything; its answers are to fit its context.
BLANKS = "\u0120\u010a\u0109"  # space, line end, tab, as a byte-level vocabulary writes them
NO_BLANKS = {
    str(i): -100
    for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    if char in BLANKS
}


@pytest.fixture(scope="module")
def live(tiny: tuple[Path, LlamaForCausalLM]) -> Iterator[tuple[LiveServer, Engine]]:
    settings = replace(SETTINGS, tool_parser="hermes")
    plan = replace(config(max_rows=8, n_sub_batches=2, prefill_chunk_tokens=64), n_threads=1)
    with engine(tiny[0], plan) as running, LiveServer(running, settings) as server:
        yield server, running


@pytest.fixture(scope="module")
def sdk(live: tuple[LiveServer, Engine]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live[0].url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


class Wheel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inches: int = Field(ge=10, le=32)


class Bike(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["road", "gravel"]
    wheels: list[Wheel] = Field(min_length=2, max_length=2)
    motor: bool | None


def test_the_packages_parse_helper(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.parse(
        model="tiny",
        messages=HI,
        response_format=Bike,
        n=3,
        seed=1,
        max_tokens=180,
        logit_bias=NO_BLANKS,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert choice.message.parsed is not None
        assert len(choice.message.parsed.wheels) == 2


class Ride(BaseModel):
    """Goes by bike."""

    bike: Bike
    km: Literal[5, 10]


def test_the_packages_tools_helper(sdk: openai.OpenAI) -> None:
    asked: Any = {
        "model": "tiny",
        "messages": HI,
        "tools": [openai.pydantic_function_tool(Ride)],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 1,
        "max_tokens": 220,
        "logit_bias": NO_BLANKS,
    }
    answer = sdk.chat.completions.parse(**asked)
    [call] = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Ride)
    with sdk.chat.completions.stream(**asked) as stream:
        names = [e.name for e in stream if e.type == "tool_calls.function.arguments.delta"]
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert set(names) == {"Ride"}
    assert len(names) > 10
    assert streamed.function.arguments == call.function.arguments


CHOICES = ["yes", "yes, of course", "no", "never", "perhaps"]


def best_choice(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: list[int]) -> list[int]:
    """Greedy, filtered in plain Python: the likeliest token that leads to one of the texts."""
    texts = [text.encode() for text in CHOICES]
    [end] = tokenizer.eos_token_ids
    tokens = {i: tokenizer.shown_bytes(i) for i in range(tokenizer.vocab_size)}
    ids: list[int] = []
    while True:
        so_far = b"".join(tokens[i] for i in ids)
        allowed = [
            i for i, t in tokens.items() if t and any(x.startswith(so_far + t) for x in texts)
        ]
        if not allowed:
            return ids
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ids])).logits[0, -1]
        best = max(allowed + [end] * (so_far in texts), key=lambda i: float(logits[i]))
        if best == end:
            return ids
        ids.append(best)


def test_greedy_choices_are_those_of_a_filter_in_plain_python(
    live: tuple[LiveServer, Engine], tiny: tuple[Path, LlamaForCausalLM]
) -> None:
    prompts = [[3, 60, 9 + i, 20, 41 * i % 90] for i in range(12)]
    body = {
        "model": "tiny",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 30,
        "structured_outputs": {"choice": CHOICES},
    }
    answer = httpx.post(f"{live[0].url}/v1/completions", json=body, timeout=60).json()
    tokenizer = live[1].tokenizer
    said = [choice["text"] for choice in answer["choices"]]
    expected = [best_choice(tiny[1], tokenizer, prompt) for prompt in prompts]
    assert said == [tokenizer.decode(ids) for ids in expected]
    assert len(set(said)) > 1


async def test_constrained_and_free_requests_side_by_side(
    live: tuple[LiveServer, Engine],
) -> None:
    """Free answers are the same beside constrained ones and without them."""
    free = {"model": "tiny", "prompt": "abc", "max_tokens": 20, "seed": 4, "ignore_eos": True}
    forms: list[dict[str, Any]] = [
        {"structured_outputs": {"regex": r"\d{4}-[a-f]{3}"}},
        {"structured_outputs": {"json": Bike.model_json_schema()}},
    ]
    async with httpx.AsyncClient(base_url=live[0].url, timeout=60) as client:

        async def ask(body: dict[str, Any]) -> str:
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            text: str = response.json()["choices"][0]["text"]
            return text

        alone = await ask(free)
        crowd = [
            {**free, "seed": i, "max_tokens": 180, "logit_bias": NO_BLANKS, **forms[i % 2]}
            for i in range(6)
        ]
        texts = await asyncio.gather(ask(free), *map(ask, crowd), ask(free))
    assert texts[0] == texts[-1] == alone
    assert all(re.fullmatch(r"\d{4}-[a-f]{3}", text) for text in texts[1:-1:2])
    for text in texts[2:-1:2]:
        Bike.model_validate(json.loads(text))


def test_the_vocabulary_is_the_one_that_the_compilers_package_reads(smollm2_path: Path) -> None:
    """Ours comes from the tokenizer's decoder; theirs from the pieces as the file has them."""
    with closing(open_checkpoint(smollm2_path)) as checkpoint:
        tokenizer = checkpoint.load_tokenizer()
    size = tokenizer.vocab_size
    ours = vocabulary_of(tokenizer, size)
    pieces = [tokenizer._backend.id_to_token(i) for i in range(size)]
    theirs = xgrammar.TokenizerInfo(pieces, xgrammar.VocabType.BYTE_LEVEL).decoded_vocab
    n_special = 0
    for i in range(size):
        if i in ours.eos_token_ids:
            assert ours.tokens[i] == b""
        elif tokenizer.shown_bytes(i):
            assert ours.tokens[i] == theirs[i]
        else:
            n_special += 1
            assert ours.tokens[i] == special_text(theirs[i])
    assert 0 < n_special < 100
