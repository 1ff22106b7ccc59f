from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from sl_serve.token_bytes import byte_alphabet
from sl_serve.tokenizer import Tokenizer

WORDS = [" hello", "ab", "aba", "bab", "\n\n", " 你", "é", "🚀", "  ", "a b"]


def byte_level() -> Tokenizer:
    """Ids below 256 are single bytes, then WORDS, then a special and a shown added token."""
    alphabet = {byte: char for char, byte in byte_alphabet().items()}
    pieces = ["".join(alphabet[byte] for byte in word.encode()) for word in WORDS]
    vocab = {piece: i for i, piece in enumerate([*(alphabet[b] for b in range(256)), *pieces])}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    backend.add_tokens([AddedToken("<té>", normalized=False)])
    return Tokenizer(backend)


def sentencepiece() -> Tokenizer:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [word.replace(" ", "▁") for word in WORDS]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(backend)


BYTE_LEVEL, SENTENCEPIECE = byte_level(), sentencepiece()
N_IDS = 256 + len(WORDS) + 1
IDS = st.one_of(
    st.integers(256, N_IDS - 1), st.integers(0, 255), st.sampled_from([*b"ab \xe4\xbd\xa0\xff"])
)
STOPS = st.lists(st.text(alphabet="ab \n你é�", min_size=1, max_size=4), max_size=3)


def first_stop(text: str, stops: list[str]) -> tuple[str | None, int, int]:
    """By definition: the stop with the least end, the longest of those; its start and end."""
    found = [
        (start + len(stop), start, stop)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start)
    ]
    end, start, stop = min(found, default=(len(text), len(text), None))
    return stop, start, end


def run(
    tokenizer: Tokenizer, prompt: list[int], ids: list[int], stops: list[str], include: bool
) -> tuple[list[str], str | None]:
    detokenizer = tokenizer.detokenizer(prompt, tuple(stops), include)
    texts = []
    for token_id in ids:
        news = detokenizer.feed(token_id)
        texts.append(news.text)
        if news.stop is not None:
            assert detokenizer.flush() == ""
            return texts, news.stop
    return [*texts, detokenizer.flush()], None


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "pieces"])
@given(ids=st.lists(IDS, max_size=24), stops=STOPS, include=st.booleans())
@settings(max_examples=400, deadline=None)
def test_equals_the_one_shot_text(
    tokenizer: Tokenizer, ids: list[int], stops: list[str], include: bool
) -> None:
    whole = tokenizer.decode(ids)
    texts, reported = run(tokenizer, [], ids, stops, include)
    stop, start, end = first_stop(whole, stops)
    assert "".join(texts) == whole[: end if include else start]
    # A stop string completed by the U+FFFD of an unfinished end comes too late to be reported.
    assert reported == stop or (reported is None and stop is not None and "�" in stop)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "pieces"])
@given(prompt=st.lists(IDS, max_size=8), ids=st.lists(IDS, max_size=8))
@settings(max_examples=300, deadline=None)
def test_continues_the_prompt(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> None:
    """Prompt and output are one text: what a whole prompt leaves over is the output's."""
    texts, _ = run(tokenizer, prompt, ids, [], include=False)
    whole, before = tokenizer.decode(prompt + ids), tokenizer.decode(prompt)
    if not before.endswith("�"):
        assert whole == before + "".join(texts)
    else:
        assert whole.endswith("".join(texts))


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "pieces"])
@given(ids=st.lists(st.integers(256, N_IDS - 1), max_size=12))
def test_decode_equals_the_tokenizers_package(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids)


@given(ids=st.lists(st.integers(0, 255), max_size=12))
def test_invalid_bytes_decode_as_the_package_does(ids: list[int]) -> None:
    assert BYTE_LEVEL.decode(ids) == BYTE_LEVEL._backend.decode(ids)


def test_no_unfinished_character_is_shown() -> None:
    texts, _ = run(BYTE_LEVEL, [], [*"a你".encode(), 0xF0, 0x9F], [], include=False)
    assert texts == ["a", "", "", "你", "", "", "�"]


def test_leading_space_is_kept_after_a_prompt_only() -> None:
    hello, special = 256, N_IDS - 1
    for prompt, text in (([], "hello"), ([special], "hello"), ([257], " hello")):
        assert run(SENTENCEPIECE, prompt, [hello], [], include=False)[0] == [text, ""]
        assert run(BYTE_LEVEL, prompt, [hello], [], include=False)[0] == [" hello", ""]


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    texts, stop = run(BYTE_LEVEL, [], [*b"xab\nab\n\nz"], ["ab\n\n"], include=False)
    assert texts == ["x", "", "", "", "ab\n", "", "", ""]
    assert stop == "ab\n\n"
    texts, _ = run(BYTE_LEVEL, [], [*b"xab"], ["abc"], include=False)
    assert texts == ["x", "", "", "ab"]
    texts, _ = run(BYTE_LEVEL, [], [*b"xab"], ["abc"], include=True)
    assert texts == ["x", "a", "b", ""]


def test_stop_in_the_middle_of_a_token() -> None:
    texts, stop = run(BYTE_LEVEL, [], [256], ["el", "l"], include=False)
    assert (texts, stop) == ([" h"], "el")
    texts, stop = run(BYTE_LEVEL, [], [256], ["ell"], include=True)
    assert (texts, stop) == ([" hell"], "ell")


def test_stop_inside_the_beginning_of_another() -> None:
    texts, stop = run(BYTE_LEVEL, [], [*b"xbac"], ["bacd", "ac"], include=False)
    assert ("".join(texts), stop) == ("xb", "ac")


def test_added_tokens() -> None:
    special, shown = N_IDS - 1, N_IDS
    assert run(BYTE_LEVEL, [], [special, shown, 99999], [], include=False)[0] == [
        "",
        "<té>",
        "",
        "",
    ]
    assert BYTE_LEVEL.token_text(special) == "<end>"


def seconds_to_feed(n_tokens: int, stops: tuple[str, ...]) -> float:
    detokenizer = BYTE_LEVEL.detokenizer(stop=stops)
    start_s = time.thread_time()
    for _ in range(n_tokens):
        detokenizer.feed(ord("a"))
    return time.thread_time() - start_s


@pytest.mark.parametrize("stops", [(), ("a" * 5000 + "b",)], ids=["none", "almost always matching"])
def test_cost_per_token_does_not_grow(stops: tuple[str, ...]) -> None:
    """Processor time, best of three, and a wide margin: a quadratic cost would make the last 16
    times the first."""
    times = [min(seconds_to_feed(n, stops) for _ in range(3)) for n in (5_000, 20_000, 80_000)]
    assert all(later < 10 * earlier for earlier, later in pairwise(times))
    if not stops:
        assert times[-1] / 80_000 < 10e-6
