"""The small version of `scripts/prove headers`."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.weights.fuzz.case import damaged, judge, try_checkpoint
from tests.weights.fuzz.processes import Limits, Verdict, verdicts
from tests.weights.fuzz.sample import Sample

N_CASES = 400


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    # Here, since the child processes import this file too, and that takes transformers.
    from tests.weights.fuzz.make_samples import make_samples

    return make_samples()


def test_samples_are_accepted_before_they_are_damaged(
    samples: list[Sample], tmp_path: Path
) -> None:
    for sample in samples:
        folder = tmp_path / sample.name
        folder.mkdir()
        assert try_checkpoint(sample.write(folder)) == (True, "")


def test_the_same_number_gives_the_same_case(samples: list[Sample]) -> None:
    assert damaged(samples, 0, 7) == damaged(samples, 0, 7)
    assert damaged(samples, 0, 7).files != damaged(samples, 1, 7).files


def test_damaged_headers_are_accepted_or_refused_with_a_sentence(
    samples: list[Sample], tmp_path: Path
) -> None:
    found = list(verdicts(partial(judge, samples, 0, tmp_path), range(N_CASES), 2))
    assert sorted(verdict.number for verdict in found) == list(range(N_CASES))
    assert {verdict.number: verdict.failure for verdict in found if verdict.failure} == {}
    n_accepted = sum(verdict.accepted for verdict in found)
    assert N_CASES / 20 < n_accepted < N_CASES / 2  # neither without effect nor only nonsense


def hostile(number: int) -> Verdict:
    """What a defect could do to its process, by number."""
    if number == 1:
        os.abort()
    if number == 3:
        time.sleep(60)
    if number == 4:
        bytearray(1 << 30)
    return Verdict(number, True)


def test_the_death_of_a_process_is_the_failure_of_its_case() -> None:
    found = {v.number: v for v in verdicts(hostile, range(6), 1, Limits(0.2, 1 << 28))}
    assert [number for number in range(6) if found[number].accepted] == [0, 2, 5]
    assert signal.SIGABRT.name in found[1].failure
    assert "0.2 s" in found[3].failure
    assert "exit code" in found[4].failure
