"""Tiny checkpoints that the tests write: random weights, byte-level tokenizer, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

EOS, BOS = "<|end|>", "<|begin|>"
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 272  # 256 bytes, the two special tokens, and some that no text gives


def write_tokenizer(folder: Path) -> None:
    """One token per byte, then the special ones: id 256 ends, 257 begins."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, BOS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": EOS, "bos_token": BOS, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """Four query heads over two key heads; weights large enough that near-ties are rare."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "eos_token_id": 256,
        "bos_token_id": 257,
    }
    torch.manual_seed(0)
    return with_lively_vectors(LlamaForCausalLM(LlamaConfig(**(settings | changes))))


def tiny_opt(**changes: Any) -> OPTForCausalLM:
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "init_std": 0.2,
        "pad_token_id": None,
        "eos_token_id": 256,
        "bos_token_id": 257,
    }
    torch.manual_seed(0)
    return with_lively_vectors(OPTForCausalLM(OPTConfig(**(settings | changes))))


Model = TypeVar("Model", bound=PreTrainedModel)


def with_lively_vectors(model: Model) -> Model:
    """transformers starts norms at 1 and biases at 0: make them matter."""
    with torch.no_grad():
        buffers = [b for name, b in model.named_buffers() if name.endswith("bias")]
        for parameter in [*model.parameters(), *buffers]:
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def write_tiny_llama(folder: Path, **changes: Any) -> LlamaForCausalLM:
    """Save a tiny model as a Hugging Face folder; returns the reference."""
    return _write(folder, tiny_llama(**changes))


def write_tiny_opt(folder: Path, **changes: Any) -> OPTForCausalLM:
    return _write(folder, tiny_opt(**changes))


TINY_MODELS = {"llama": write_tiny_llama, "opt": write_tiny_opt}


def _write(folder: Path, model: Model) -> Model:
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model
