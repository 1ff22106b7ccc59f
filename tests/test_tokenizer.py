from __future__ import annotations

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from sl_serve.errors import ModelError, RequestError
from sl_serve.token_bytes import byte_alphabet
from sl_serve.tokenizer import Tokenizer


@pytest.fixture
def backend() -> Backend:
    alphabet = byte_alphabet()
    backend = Backend(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return backend


def test_byte_alphabet_is_the_packages() -> None:
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    for code in range(0x80):
        assert alphabet[encode(chr(code))[0][0]] == code
    assert [alphabet[char] for char in encode("你")[0][0]] == [*"你".encode()]
    assert sorted(alphabet.values()) == [*range(256)]


def test_token_texts_and_bytes(backend: Backend) -> None:
    tokenizer = Tokenizer(backend)
    assert tokenizer.token_text(ord("a")) == "a"
    assert tokenizer.token_text(ord("\n")) == "\n"
    assert tokenizer.token_text(0xE4) == r"bytes:\xe4"
    assert tokenizer.token_bytes(0xE4) == b"\xe4"
    assert tokenizer.token_text(256) == "</s>"
    for unknown in (257, 2**40, -1):
        assert tokenizer.token_bytes(unknown) == b""
        assert tokenizer.decode([unknown, 0x61]) == "a"


def test_ids_of_the_settings_come_first(backend: Backend) -> None:
    special = {"eos_token": "</s>", "bos_token": "absent"}
    assert Tokenizer(backend, special_tokens=special).eos_token_ids == (256,)
    assert Tokenizer(backend, special_tokens=special).bos_token_id is None
    chosen = Tokenizer(backend, special_tokens=special, eos_token_ids=(1, 2), bos_token_id=0)
    assert (chosen.eos_token_ids, chosen.bos_token_id) == ((1, 2), 0)


def test_refusals(backend: Backend) -> None:
    tokenizer = Tokenizer(backend)
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])
    assert tokenizer.chat_template is None
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode("broken \ud800")
    backend.decoder = None
    with pytest.raises(ModelError, match="decoder none"):
        Tokenizer(backend)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace(scheme: str) -> None:
    backend = Backend(models.BPE(vocab={"▁a": 0, "b": 1, "▁": 2}, merges=[]))
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = Tokenizer(backend)
    for ids in ([0, 1, 0], [1, 2], [0]):
        assert tokenizer.decode(ids) == backend.decode(ids)
