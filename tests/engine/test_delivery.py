from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from sl_serve.core import (
    FinishReason,
    Request,
    RowWork,
    SamplingParams,
    TokenLogprob,
    TokenOut,
    Usage,
)
from sl_serve.delivery import Delivery
from sl_serve.logits import RowResult
from sl_serve.sampling import SampledToken
from sl_serve.token_bytes import byte_alphabet
from sl_serve.tokenizer import Tokenizer

FEW = settings(derandomize=True, max_examples=150, deadline=None)
MAX_MODEL_LEN = 100
WORDS = ["ab", "aba", "bc", "c d", "the end", "en"]
EOS, STOP_WORD = 256 + len(WORDS), 256 + WORDS.index("the end")


def make_tokenizer() -> Tokenizer:
    """Ids below 256 are single bytes, then WORDS, then the end-of-text token."""
    alphabet = {byte: char for char, byte in byte_alphabet().items()}
    pieces = [alphabet[byte] for byte in range(256)]
    pieces += ["".join(alphabet[byte] for byte in word.encode()) for word in WORDS]
    backend = Backend(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return Tokenizer(backend, eos_token_ids=(EOS,))


TOKENIZER = make_tokenizer()


def ids(text: str) -> list[int]:
    """One token per byte."""
    return list(text.encode())


class Owner:
    """A request, its delivery, and everything that was heard."""

    def __init__(
        self, prompt: str | bytes = "xyz", max_model_len: int = MAX_MODEL_LEN, **params: Any
    ) -> None:
        self.heard: list[TokenOut] = []
        prompt_ids = ids(prompt) if isinstance(prompt, str) else list(prompt)
        self.request = Request("r", prompt_ids, SamplingParams(**params), lambda _: None)
        self.delivery = Delivery(self.request, TOKENIZER, max_model_len)

    def hear(self, news: TokenOut | None) -> bool:
        """True when it is the last."""
        if news is not None:
            self.heard.append(news)
        return news is not None and news.finish_reason is not None

    def work(self, start: int, stop: int) -> RowWork:
        samples = stop == self.request.n_tokens
        return RowWork(self.request, 0, 0, start, stop - start, samples)

    def prompt_chunk(self, start: int, stop: int, run: int = 0) -> bool:
        """A step over [start, stop) of the prompt that draws no token; `run` marks its numbers."""
        found = [
            TokenLogprob(t, -float(run * 100 + position))
            for position, t in enumerate(self.request.prompt_ids[start + 1 : stop + 1], start + 1)
        ]
        return self.hear(self.delivery.feed(RowResult(self.work(start, stop), found, None)))

    def token(self, token_id: int, logprob: TokenLogprob | None = None) -> bool:
        work = self.work(self.request.n_tokens - 1, self.request.n_tokens)
        return self.hear(self.delivery.feed(RowResult(work, [], SampledToken(token_id, logprob))))

    def tokens(self, token_ids: list[int]) -> bool:
        """Feeds them all; none but the last may end the request. True when it did."""
        ended = [self.token(t) for t in token_ids]
        assert True not in ended[:-1]
        return ended[-1]

    @property
    def text(self) -> str:
        return "".join(news.text for news in self.heard)

    @property
    def last(self) -> TokenOut:
        return self.heard[-1]


def test_each_token_is_told_with_its_text_and_numbers() -> None:
    owner = Owner()
    assert not owner.tokens(ids("hi"))
    assert [(n.request_id, n.token_ids, n.text) for n in owner.heard] == [
        ("r", (ord("h"),), "h"),
        ("r", (ord("i"),), "i"),
    ]
    assert [n.usage for n in owner.heard] == [Usage(3, 1), Usage(3, 2)]
    assert all(n.finish_reason is None and n.prompt_logprobs is None for n in owner.heard)


def test_tokens_become_the_requests_output() -> None:
    owner = Owner()
    owner.tokens(ids("hi"))
    assert owner.request.output_ids == ids("hi")


def test_the_end_of_text_ends_the_request_without_text() -> None:
    owner = Owner()
    assert owner.tokens([*ids("hi"), EOS])
    assert owner.text == "hi"
    assert (owner.last.token_ids, owner.last.usage) == ((EOS,), Usage(3, 3))
    assert (owner.last.finish_reason, owner.last.stop_reason) == (FinishReason.STOP, None)


def test_ignore_eos_goes_on() -> None:
    owner = Owner(ignore_eos=True)
    assert not owner.tokens([EOS, *ids("hi")])
    assert owner.text == "hi"


def test_a_stop_id_ends_the_request_without_its_text() -> None:
    owner = Owner(stop_token_ids=(STOP_WORD,))
    assert owner.tokens([*ids("hi"), STOP_WORD])
    assert owner.text == "hi"
    assert (owner.last.finish_reason, owner.last.stop_reason) == (FinishReason.STOP, STOP_WORD)


def test_a_stop_id_is_shown_when_asked_for() -> None:
    owner = Owner(stop_token_ids=(STOP_WORD,), include_stop_str_in_output=True)
    assert owner.tokens([*ids("hi "), STOP_WORD])
    assert owner.text == "hi the end"


def test_the_end_of_text_as_a_stop_id_counts_although_it_is_ignored() -> None:
    owner = Owner(stop_token_ids=(EOS,), ignore_eos=True)
    assert owner.token(EOS)
    assert (owner.last.finish_reason, owner.last.stop_reason) == (FinishReason.STOP, EOS)


@pytest.mark.parametrize(
    ("token_ids", "include", "text"),
    [
        ([*ids("one en"), *ids("d two")], False, "one "),
        ([*ids("one "), 256 + WORDS.index("en"), *ids("d two")], False, "one "),
        ([*ids("one "), STOP_WORD], False, "one the "),
        ([*ids("one en"), *ids("d two")], True, "one end"),
        ([*ids("one "), STOP_WORD], True, "one the end"),
    ],
)
def test_a_stop_string_over_several_tokens_ends_the_request(
    token_ids: list[int], include: bool, text: str
) -> None:
    owner = Owner(stop=("end",), include_stop_str_in_output=include)
    fed = 0
    while not owner.token(token_ids[fed]):
        fed += 1
    assert owner.text == text
    assert (owner.last.finish_reason, owner.last.stop_reason) == (FinishReason.STOP, "end")
    assert owner.last.usage == Usage(3, fed + 1)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """By definition: the stop that is complete first, the longest of those; where it ends."""
    ends = [
        (start + len(stop), -len(stop), stop)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start)
    ]
    return (min(ends)[0], min(ends)[2]) if ends else None


ASCII_TOKENS = st.lists(
    st.sampled_from([*b"abcde ", *range(256, 256 + len(WORDS))]), min_size=1, max_size=20
)
STOPS = st.lists(st.text("abcde ", min_size=1, max_size=4), max_size=3)


@FEW
@given(ASCII_TOKENS, STOPS, st.booleans())
def test_text_ends_at_the_first_stop_string_however_it_is_cut_into_tokens(
    token_ids: list[int], stops: list[str], include: bool
) -> None:
    owner = Owner(stop=tuple(stops), include_stop_str_in_output=include, max_tokens=len(token_ids))
    for token_id in token_ids:
        if owner.token(token_id):
            break
    whole = TOKENIZER.decode(token_ids)
    found = first_stop(whole, stops)
    if found is None:
        assert (owner.text, owner.last.finish_reason) == (whole, FinishReason.LENGTH)
    else:
        end, stop = found
        assert owner.text == whole[: end if include else end - len(stop)]
        assert (owner.last.finish_reason, owner.last.stop_reason) == (FinishReason.STOP, stop)
        n_tokens = len(owner.request.output_ids)
        assert len(TOKENIZER.decode(token_ids[: n_tokens - 1])) < end
        assert len(TOKENIZER.decode(token_ids[:n_tokens])) >= end


def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    owner = Owner(stop=("b",), min_tokens=4)
    assert not owner.tokens(ids("abbbac"))
    assert owner.token(ord("b"))
    assert owner.text == "abbbac"


def test_stop_strings_count_from_the_token_after_min_tokens_on() -> None:
    owner = Owner(stop=("b",), min_tokens=3)
    assert owner.tokens(ids("bbab"))
    assert (owner.text, owner.last.stop_reason) == ("bba", "b")


def test_a_character_that_is_unfinished_at_min_tokens_is_shown_whole() -> None:
    owner = Owner(stop=("b",), min_tokens=2)
    assert owner.tokens(ids("a€b"))
    assert owner.text == "a€"


@pytest.mark.parametrize("token_id", [EOS, STOP_WORD])
def test_ids_that_end_do_not_before_min_tokens(token_id: int) -> None:
    owner = Owner(stop_token_ids=(STOP_WORD,), min_tokens=3)
    assert not owner.tokens([token_id, token_id])
    assert owner.token(token_id)


def test_max_tokens_end_with_length() -> None:
    owner = Owner(max_tokens=3)
    assert owner.tokens(ids("abc"))
    assert (owner.last.finish_reason, owner.last.stop_reason) == (FinishReason.LENGTH, None)
    assert (owner.text, owner.last.usage) == ("abc", Usage(3, 3))


@pytest.mark.parametrize("max_tokens", [None, 50])
def test_the_context_bounds_the_output(max_tokens: int | None) -> None:
    owner = Owner(max_tokens=max_tokens, max_model_len=7)
    assert owner.delivery.max_tokens == 4
    assert owner.tokens(ids("abcd"))
    assert owner.last.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("last", [EOS, ord("c")])
def test_a_stop_with_the_last_token_is_a_stop(last: int) -> None:
    owner = Owner(max_tokens=3, stop=("c",))
    assert owner.tokens([*ids("ab"), last])
    assert owner.last.finish_reason is FinishReason.STOP


def test_a_chunk_that_does_not_finish_the_prompt_is_no_news() -> None:
    owner = Owner(prompt="abcdef")
    assert not owner.prompt_chunk(0, 4)
    assert owner.heard == []


def test_max_tokens_zero_ends_with_the_prompt_and_no_token() -> None:
    owner = Owner(prompt="abcdef", max_tokens=0)
    assert not owner.prompt_chunk(0, 4)
    assert owner.prompt_chunk(4, 6)
    assert len(owner.heard) == 1
    assert (owner.last.token_ids, owner.text) == ((), "")
    assert (owner.last.finish_reason, owner.last.usage) == (FinishReason.LENGTH, Usage(6, 0))


def prompt_numbers(owner: Owner) -> list[float | None]:
    """Log probabilities of the prompt as told with the first news, and with no other."""
    first, *others = owner.heard
    assert all(news.prompt_logprobs is None for news in others)
    assert first.prompt_logprobs is not None
    found = first.prompt_logprobs
    tokens = [t for t, known in zip(owner.request.prompt_ids, found, strict=True) if known]
    assert [known.token_id for known in found if known] == tokens
    return [None if known is None else known.logprob for known in found]


def test_prompt_logprobs_are_collected_over_chunks() -> None:
    owner = Owner(prompt="abcdef", prompt_logprobs=0)
    owner.prompt_chunk(0, 2)
    owner.prompt_chunk(2, 3)
    owner.prompt_chunk(3, 6)
    owner.tokens(ids("xy"))
    assert prompt_numbers(owner) == [None, -1.0, -2.0, -3.0, -4.0, -5.0]


def test_prompt_logprobs_come_with_the_end_when_no_token_is_asked_for() -> None:
    owner = Owner(prompt="abcd", prompt_logprobs=0, max_tokens=0)
    assert owner.prompt_chunk(0, 4)
    assert prompt_numbers(owner) == [None, -1.0, -2.0, -3.0]


@pytest.mark.parametrize("parked_at", [1, 3, 5])
def test_prompt_logprobs_of_a_row_parked_in_its_prompt_are_those_computed_last(
    parked_at: int,
) -> None:
    owner = Owner(prompt="abcdef", prompt_logprobs=0)
    owner.prompt_chunk(0, parked_at)
    owner.prompt_chunk(0, 2, run=1)  # parked: from position 0 again, in other chunks
    owner.prompt_chunk(2, 6, run=1)
    owner.token(ord("x"))
    assert prompt_numbers(owner) == [None, -101.0, -102.0, -103.0, -104.0, -105.0]


def test_prompt_logprobs_are_not_told_again_after_parking_in_the_output() -> None:
    owner = Owner(prompt="abcd", prompt_logprobs=0)
    owner.prompt_chunk(0, 4)
    owner.tokens(ids("xy"))
    owner.prompt_chunk(0, 4, run=1)
    owner.tokens(ids("z"))
    assert prompt_numbers(owner) == [None, -1.0, -2.0, -3.0]
    assert owner.text == "xyz"


def test_a_prompt_of_one_token_has_one_entry() -> None:
    owner = Owner(prompt="a", prompt_logprobs=3)
    owner.token(ord("x"))
    assert prompt_numbers(owner) == [None]


def test_a_tokens_logprob_is_passed_on() -> None:
    owner = Owner(logprobs=1)
    known = TokenLogprob(ord("a"), -0.5, ((ord("a"), -0.5),))
    owner.token(ord("a"), known)
    owner.token(ord("b"))
    assert [news.logprobs for news in owner.heard] == [(known,), ()]


def test_the_beginning_of_a_stop_string_is_held_and_flushed_at_the_end() -> None:
    owner = Owner(stop=("abc",), max_tokens=3)
    assert owner.tokens(ids("zab"))
    assert [news.text for news in owner.heard] == ["z", "", "ab"]


def test_what_is_held_is_flushed_before_a_stop_id() -> None:
    owner = Owner(stop=("abc",))
    assert owner.tokens([*ids("zab"), EOS])
    assert owner.text == "zab"


def test_an_unfinished_character_is_flushed_as_a_replacement() -> None:
    owner = Owner(max_tokens=3)
    assert owner.tokens([ord("a"), *"€".encode()[:2]])
    assert [news.text for news in owner.heard] == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_an_abort_tells_what_was_held() -> None:
    owner = Owner(stop=("abc",))
    owner.tokens(ids("zab"))
    owner.hear(owner.delivery.end(FinishReason.ABORT))
    assert owner.text == "zab"
    assert (owner.last.token_ids, owner.last.finish_reason) == ((), FinishReason.ABORT)
    assert owner.last.usage == Usage(3, 3)


def test_an_end_before_the_first_token_has_no_text() -> None:
    owner = Owner(prompt="a€".encode()[:2])
    owner.hear(owner.delivery.end(FinishReason.ERROR, "the engine failed"))
    assert (owner.text, owner.last.error) == ("", "the engine failed")
    assert (owner.last.finish_reason, owner.last.usage) == (FinishReason.ERROR, Usage(2, 0))


def test_a_character_begun_by_the_prompt_is_finished_by_the_output() -> None:
    owner = Owner(prompt="a€".encode()[:2])
    owner.tokens(list("€".encode()[1:]))
    assert owner.text == "€"
