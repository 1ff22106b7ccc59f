"""A tokenizer for models that have none: a text's ids are its bytes, an id's text is its number."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from sl_serve.config import ModelConfig
from sl_serve.token_bytes import byte_alphabet
from sl_serve.tokenizer import Tokenizer

_SPACE = "Ġ"  # in a byte-level vocabulary
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def dummy_tokenizer(config: ModelConfig) -> Tokenizer:
    """Bytes are taken modulo a vocabulary that is smaller than theirs."""
    vocab = {char: byte % config.vocab_size for char, byte in byte_alphabet().items()}
    vocab |= {f"{_SPACE}{i}": i for i in range(256, config.vocab_size)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(
        backend,
        eos_token_ids=config.eos_token_ids,
        bos_token_id=config.bos_token_id,
        chat_templates={"default": _CHAT_TEMPLATE},
    )
