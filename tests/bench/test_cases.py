from __future__ import annotations

import pytest

from bench.cases import CASES, Case, find_case
from bench.errors import BenchError
from bench.measurement import check_outputs, peak_rss_bytes


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_prompts_are_fixed_distinct_and_in_range(case: Case) -> None:
    prompts = case.prompts()
    assert prompts == case.prompts()
    assert [len(p) for p in prompts] == [case.prompt_tokens] * case.n_requests
    everything = {tuple(p) for p in prompts + case.warm_up_prompts()}
    assert len(everything) == 2 * case.n_requests
    low, high = case.token_ids
    assert all(low <= token < high for prompt in prompts for token in prompt)


def test_the_prompts_of_a_case_never_change() -> None:
    assert find_case("smollm2-128x128-n256").prompts()[0][:3] == [41824, 31344, 25172]


def test_an_unknown_case_names_the_known() -> None:
    with pytest.raises(BenchError, match="tiny-16x8-n8"):
        find_case("huge")


def test_outputs_of_the_wrong_shape_are_refused() -> None:
    case = find_case("tiny-16x8-n8")
    good = [[0] * 8 for _ in range(8)]
    check_outputs(case, good)
    with pytest.raises(BenchError, match="7 requests were answered instead of 8"):
        check_outputs(case, good[:7])
    with pytest.raises(BenchError, match="request 3 got 7 tokens instead of 8"):
        check_outputs(case, [*good[:3], [0] * 7, *good[4:]])


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_rss_bytes()
    block = bytearray(before + 2**20)
    block[::4096] = b"x" * len(block[::4096])  # touch every page
    assert peak_rss_bytes() > before + 2**20
    assert len(block) > before
