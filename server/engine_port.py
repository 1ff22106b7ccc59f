"""All that the front knows of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from sl_serve.core import Request
from sl_serve.stats import EngineSnapshot, MemoryTier, StepStats


class TokenizerPort(Protocol):
    r"""Thread-safe. `token_text` shows a part of a character as bytes:\xNN."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token(self) -> str | None: ...
    @property
    def bos_token(self) -> str | None: ...
    @property
    def pad_token(self) -> str | None: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def tool_template(self) -> str | None:
        """The chat template for requests with tools."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_text(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def shown_bytes(self, token_id: int) -> bytes:
        """As `token_bytes`, but empty for special tokens."""
        ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> str:
        """Raises RequestError where the template refuses the messages or there is none."""
        ...


class EnginePort(Protocol):
    @property
    def tokenizer(self) -> TokenizerPort: ...
    @property
    def max_model_len(self) -> int:
        """Tokens, prompt plus output."""
        ...

    @property
    def vocab_size(self) -> int: ...
    @property
    def n_parameters(self) -> int: ...
    @property
    def max_rows(self) -> int:
        """Requests that run at once."""
        ...

    @property
    def n_sub_batches(self) -> int:
        """They are spread over."""
        ...

    @property
    def memory_tiers(self) -> Sequence[MemoryTier]: ...

    def submit(self, requests: Sequence[Request]) -> None:
        """All or nothing, from any thread, returns at once.

        Raises RequestError, QueueFullError, EngineClosedError or EngineDeadError.
        """
        ...

    def abort(self, request_id: str) -> None:
        """From any thread, any number of times; the request then gets a TokenOut with ABORT."""
        ...

    def snapshot(self) -> EngineSnapshot: ...

    def on_step(self, observer: Callable[[StepStats], None]) -> None:
        """`observer` is called on the engine thread after each step."""
        ...

    def drain(self, timeout_s: float) -> bool:
        """Refuses new work and waits for the running; True if all of it ended. Blocks."""
        ...

    def close(self) -> None: ...
