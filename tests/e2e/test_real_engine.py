"""The whole path on a tiny model: HTTP, queue, packer, sweep, sampler, stream."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import LlamaForCausalLM

from sl_serve.engine import Engine
from tests.e2e.serving import serving
from tests.models import EOS
from tests.server.conftest import LiveServer

N_REQUESTS = 200


@pytest.fixture(scope="module")
def live(tiny: tuple[Path, LlamaForCausalLM]) -> Iterator[tuple[LiveServer, Engine]]:
    with serving(tiny[0]) as both:
        yield both


def greedy_reference(reference: LlamaForCausalLM, prompt: list[int], n: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def test_openai_completion_is_transformers_text(
    live: tuple[LiveServer, Engine], tiny: tuple[Path, LlamaForCausalLM]
) -> None:
    server, running = live
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    prompt = list(b"The sweep passes")
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
    )
    expected = greedy_reference(tiny[1], prompt, 12)
    assert answer.choices[0].text == running.tokenizer.decode(expected)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    client.close()


def test_openai_chat_streamed_equals_whole(live: tuple[LiveServer, Engine]) -> None:
    client = openai.OpenAI(base_url=f"{live[0].url}/v1", api_key="unused")
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Say something"}],
        "max_completion_tokens": 30,
        "temperature": 0.8,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    client.close()


def test_echoed_logprobs_are_those_of_transformers(
    live: tuple[LiveServer, Engine], tiny: tuple[Path, LlamaForCausalLM]
) -> None:
    """What evaluation harnesses ask: a list of token lists, echo, logprobs, one token."""
    prompts = [[3, 60, 9, 200, 41], [5, 6, 7]]
    body = {
        "model": "tiny",
        "prompt": prompts,
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "temperature": 0,
        "seed": 1234,
    }
    answer = httpx.post(f"{live[0].url}/v1/completions", json=body, timeout=60).json()
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        with torch.inference_mode():
            logits = tiny[1](torch.tensor([prompt])).logits[0]
        expected = torch.log_softmax(logits, -1)
        said = choice["logprobs"]["token_logprobs"]
        assert said[0] is None
        assert len(said) == len(prompt) + 1
        for i, token in enumerate(prompt[1:]):
            assert said[i + 1] == pytest.approx(float(expected[i, token]), abs=1e-4)
            top = choice["logprobs"]["top_logprobs"][i + 1]
            is_greedy = int(expected[i].argmax()) == token
            assert (max(top.values()) == said[i + 1]) == is_greedy


async def one_client(client: httpx.AsyncClient, n: int, rng: random.Random) -> str:
    """One request of some kind; every third hangs up after a random moment."""
    body: dict[str, object] = {"model": "tiny", "max_tokens": rng.randrange(1, 40), "seed": n}
    body["stream"] = rng.random() < 0.5
    if rng.random() < 0.5:
        path = "/v1/completions"
        body["prompt"] = "x" * rng.randrange(1, 90)
        body["n"] = rng.randrange(1, 4)
    else:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "y" * rng.randrange(1, 60)}]
    patience_s = rng.uniform(0, 0.4) if n % 3 == 0 else 60.0
    try:
        async with asyncio.timeout(patience_s):
            answer = await client.post(path, json=body)
    except TimeoutError:
        return "hung up"
    assert answer.status_code == 200, answer.text
    if body["stream"]:
        assert answer.text.rstrip().endswith("data: [DONE]")
    return "answered"


async def test_a_mixed_load_with_hang_ups_leaves_nothing_behind(
    tiny: tuple[Path, LlamaForCausalLM],
) -> None:
    rng = random.Random(1)
    with serving(tiny[0]) as (server, running):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60) as client:
            clients = [one_client(client, n, rng) for n in range(N_REQUESTS)]
            outcomes = await asyncio.gather(*clients)
        assert outcomes.count("hung up") > N_REQUESTS // 6
        assert outcomes.count("answered") >= N_REQUESTS * 2 // 3
        assert await asyncio.to_thread(running.drain, 30)
        snapshot = running.snapshot()
        assert (snapshot.n_running, snapshot.n_waiting, snapshot.waiting_tokens) == (0, 0, 0)
        assert snapshot.kv_used_bytes == 0
        assert not server.app.state.context.jobs


def test_eos_is_not_shown(live: tuple[LiveServer, Engine]) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 5, "logit_bias": {"256": 100}}
    answer = httpx.post(f"{live[0].url}/v1/completions", json=body, timeout=60).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert EOS not in choice["text"]
    assert answer["usage"]["completion_tokens"] == 1
