"""What a model is calibrated with: windows of a text, or of what it writes itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sl_serve.config import EngineConfig
from sl_serve.core import SamplingParams
from sl_serve.errors import UserError
from sl_serve.llm import LLM, UNBOUNDED_QUEUE
from sl_serve.tokenizer import Tokenizer
from sl_serve.weights.checkpoint import Checkpoint

WINDOW_TOKENS = 512
MIN_TOKENS = 2048
SEED = 0

OnTokens = Callable[[int], None]  # hears how many more the model has written


def calibration_windows(
    model: str,
    checkpoint: Checkpoint,
    text: Path | None,
    n_tokens: int,
    config: EngineConfig,
    on_tokens: OnTokens,
) -> torch.Tensor:
    """Token ids (n, length), about `n_tokens` of them: of `text`, or for None written by `model`,
    which is then loaded as `config` says. Raises UserError."""
    length = min(WINDOW_TOKENS, checkpoint.config.max_positions)
    if text is not None:
        return windows_of_text(text, checkpoint.load_tokenizer(), length, n_tokens)
    return windows_drawn(model, config, length, n_tokens, on_tokens)


def windows_of_text(path: Path, tokenizer: Tokenizer, length: int, n_tokens: int) -> torch.Tensor:
    """Ids (n, length), windows spread evenly over the text. Raises UserError."""
    try:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--text {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--text {path}: not a plain text in UTF-8") from None
    if len(ids) < MIN_TOKENS:
        raise UserError(
            f"--text {path}: {len(ids)} tokens, at least {MIN_TOKENS} are needed; give a longer "
            "text, or none, and the model writes its own"
        )
    n_windows = max(1, min(len(ids), n_tokens) // length)
    last = len(ids) - length
    starts = [last * i // max(1, n_windows - 1) for i in range(n_windows)]
    return torch.tensor([ids[start : start + length] for start in starts])


def windows_drawn(
    model: str, config: EngineConfig, length: int, n_tokens: int, on_tokens: OnTokens
) -> torch.Tensor:
    """Ids (n, length) that the model writes, at temperature 1 and with seeds, after a token each
    that is drawn from its vocabulary. Ends of texts are gone past."""
    n_windows = max(1, n_tokens // length)
    config = replace(config, max_model_len=length, queue=UNBOUNDED_QUEUE)
    with LLM(model, config) as llm:
        tokenizer = llm.engine.tokenizer
        n_ids = min(tokenizer.vocab_size, llm.engine.vocab_size)
        with_text = [i for i in range(n_ids) if tokenizer.shown_bytes(i)]
        generator = torch.Generator().manual_seed(SEED)
        drawn = torch.randint(len(with_text), (n_windows,), generator=generator).tolist()
        prompts = [[*tokenizer.encode(""), with_text[i]] for i in drawn]
        n_new = length - len(prompts[0])
        sampling = [
            SamplingParams(max_tokens=n_new, temperature=1.0, seed=SEED + i, ignore_eos=True)
            for i in range(n_windows)
        ]
        llm.engine.on_step(lambda step: on_tokens(step.n_decode_tokens))
        answers = llm.generate(prompts, sampling)
    return torch.tensor(
        [prompt + answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)]
    )
