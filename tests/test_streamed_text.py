"""`scripts/prove detokenise` takes more texts."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Backend

from sl_serve.tokenizer import Tokenizer
from tests.streamed_text import KINDS, check, multilingual_texts, random_texts


@pytest.fixture(scope="module", params=KINDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return KINDS[request.param]()


@pytest.mark.parametrize("texts", [random_texts, multilingual_texts])
def test_streamed_text_joined_equals_decoding_at_once(backend: Backend, texts) -> None:  # type: ignore[no-untyped-def]
    tokenizer = Tokenizer(backend)
    n_tokens = [check(tokenizer, backend, text) for text in texts(400, seed=2)]
    assert sum(n_tokens) > 400


def test_bytes_stand_in_for_what_the_vocabulary_cannot_spell(backend: Backend) -> None:
    tokenizer = Tokenizer(backend)
    text = "naïve 你好 🦜 \u0b95\u0bcd"
    assert tokenizer.decode(tokenizer.encode(text)) == text
