"""What a request must be before it may wait for a row."""

from __future__ import annotations

from sl_serve.core import Request
from sl_serve.errors import RequestError


def check_request(request: Request, vocab_size: int, max_model_len: int) -> None:
    """Raise RequestError, with the numbers, for what could never run."""
    n_prompt = request.n_prompt
    if n_prompt == 0:
        raise RequestError("the prompt is empty; it needs at least one token", "prompt")
    lowest, highest = min(request.prompt_ids), max(request.prompt_ids)
    if lowest < 0 or highest >= vocab_size:
        bad = lowest if lowest < 0 else highest
        raise RequestError(f"token id {bad} is outside the vocabulary of {vocab_size}", "prompt")
    needs = n_prompt + (0 if request.sampling.max_tokens == 0 else 1)
    if needs > max_model_len:
        raise RequestError(
            f"the prompt has {n_prompt} tokens, the context {max_model_len}; shorten the prompt",
            "prompt",
            "context_length_exceeded",
        )
