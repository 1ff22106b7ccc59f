"""Short versions of the proofs of scripts/prove: malformed, disconnects, overload, soak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from transformers import LlamaForCausalLM

from tests.e2e.disconnects import PHASES, departures
from tests.e2e.malformed import GOOD, MAKERS, case, complaint, without_ids
from tests.e2e.overload import overload
from tests.e2e.serving import serving
from tests.e2e.soak import soak

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tiny: tuple[Path, LlamaForCausalLM]) -> Path:
    return tiny[0]


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    with serving(folder) as (live, _), httpx.Client(base_url=live.url, timeout=120) as client:
        yield client


def test_malformed_requests_are_refused_and_change_nothing(client: httpx.Client) -> None:
    def good_answers() -> list[bytes]:
        return [without_ids(client.post(p, json=body).content) for p, body in GOOD.items()]

    before, kinds = good_answers(), Counter[str]()
    for number in range(300):
        odd = case(1, number)
        kinds[odd.kind] += 1
        answer = client.request(odd.method, odd.path, content=odd.raw)
        content_type = answer.headers["content-type"]
        assert complaint(odd, answer.status_code, content_type, answer.text) is None, (number, odd)
    assert kinds.keys() >= {maker.__name__ for maker in MAKERS} | {"hostile", "route"}
    assert good_answers() == before


def test_rows_are_free_within_two_steps_after_their_clients_left(folder: Path) -> None:
    left = list(departures(folder, 12, seed=1))
    assert {(d.phase, d.is_stream) for d in left} == {(p, s) for p in PHASES for s in (True, False)}
    assert all(d.n_steps <= 2 for d in left)


async def test_overload_is_served_or_refused(folder: Path) -> None:
    load = await overload(folder, 400)
    assert load.complaints == []
    assert load.statuses.keys() == {200, 429}
    assert load.statuses.total() == 400


async def test_a_mixture_of_everything(folder: Path) -> None:
    found = await soak(folder, 300, seed=1)
    assert found.complaints == []
    assert found.outcomes.total() == 300
    assert len(found.outcomes) == 4
    assert found.n_files_left == 0
    assert max(s.n_threads for s in found.samples) <= found.samples[-1].n_threads + 2
