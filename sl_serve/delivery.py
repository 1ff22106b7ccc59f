"""What a request's owner is to hear: tokens turned into text, stops noticed, log probabilities
kept. `Deliveries` tells it."""

from __future__ import annotations

from sl_serve.core import FinishReason, Request, TokenLogprob, TokenOut, Usage
from sl_serve.detokenizer import Detokenizer
from sl_serve.logits import RowResult
from sl_serve.sampling import SampledToken
from sl_serve.tokenizer import Tokenizer


class Delivery:
    """One request's way out of the engine. Used by the engine thread alone."""

    def __init__(self, request: Request, tokenizer: Tokenizer, max_model_len: int) -> None:
        self.request = request
        self._tokenizer = tokenizer
        sampling = request.sampling
        room = max_model_len - request.n_prompt
        self.max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._eos_ids = frozenset(() if sampling.ignore_eos else tokenizer.eos_token_ids)
        # Until min_tokens are out, stop strings are not looked for.
        self._detokenizer = self._new_detokenizer(request.prompt_ids)
        self._watch_stops()
        self._prompt_logprobs: list[TokenLogprob] = []
        self._prompt_pending = sampling.prompt_logprobs is not None

    def feed(self, result: RowResult) -> TokenOut | None:
        """Take in a step's result. None where there is no news; the last has a finish reason."""
        if self._prompt_pending:
            # By position, because a parked row computes its prompt again.
            self._prompt_logprobs[result.work.start :] = result.prompt_logprobs
        if result.sampled is not None:
            return self._add_token(result.sampled)
        if self.max_tokens == 0 and result.work.samples:
            return self.end(FinishReason.LENGTH)
        return None

    def end(self, reason: FinishReason, error: str | None = None) -> TokenOut:
        """The last news."""
        text = self._detokenizer.flush() if self.request.output_ids else ""
        return self._news(text=text, finish_reason=reason, error=error)

    def _add_token(self, token: SampledToken) -> TokenOut:
        token_id = token.token_id
        self.request.output_ids.append(token_id)
        constraint = self.request.constraint
        if constraint is not None:
            constraint.accept(token_id)
            if constraint.failure is not None:
                return self.end(FinishReason.ERROR, constraint.failure)
        text = ""
        stop: str | int | None = None
        reason: FinishReason | None = None
        enough = len(self.request.output_ids) >= self.request.sampling.min_tokens
        if token_id in self._stop_ids or token_id in self._eos_ids:
            reason = FinishReason.STOP if enough else None
            stop = token_id if token_id in self._stop_ids else None
            if self.request.sampling.include_stop_str_in_output:
                text = self._detokenizer.feed(token_id).text
        else:
            text, stop = self._detokenizer.feed(token_id)
            reason = FinishReason.STOP if stop is not None else None
        if constraint is not None and constraint.is_done:  # whatever min_tokens and ignore_eos say
            reason = FinishReason.STOP
        if reason is None and len(self.request.output_ids) >= self.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            text += self._detokenizer.flush()
        elif len(self.request.output_ids) == self.request.sampling.min_tokens:
            self._watch_stops()
        logprobs = () if token.logprob is None else (token.logprob,)
        return self._news((token_id,), text, logprobs, finish_reason=reason, stop_reason=stop)

    def _watch_stops(self) -> None:
        sampling = self.request.sampling
        if len(self.request.output_ids) >= sampling.min_tokens:
            so_far = self.request.token_ids(0, self.request.n_tokens)
            self._detokenizer = self._new_detokenizer(
                so_far, sampling.stop, sampling.include_stop_str_in_output
            )

    def _new_detokenizer(
        self, so_far: list[int], stop: tuple[str, ...] = (), include_stop: bool = False
    ) -> Detokenizer:
        skip_special = self.request.sampling.skip_special_tokens
        return self._tokenizer.detokenizer(so_far, stop, include_stop, skip_special)

    def _news(
        self,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[TokenLogprob, ...] = (),
        finish_reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> TokenOut:
        prompt_logprobs = (None, *self._prompt_logprobs) if self._prompt_pending else None
        self._prompt_pending = False
        return TokenOut(
            self.request.request_id,
            token_ids,
            text,
            logprobs,
            prompt_logprobs,
            finish_reason,
            stop_reason,
            error,
            Usage(self.request.n_prompt, len(self.request.output_ids)),
        )
