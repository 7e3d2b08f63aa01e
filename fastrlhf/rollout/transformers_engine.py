"""Rollouts by `model.generate` of transformers: the slow way, for any model that has one."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from fastrlhf import functional as F
from fastrlhf.rollout.stopping import Stop
from fastrlhf.rollout.types import FinishReason, Rollout, RolloutInterrupted, SamplingParams, check_prompts


class Response(NamedTuple):
    tokens: list[int]
    log_probs: Tensor
    finish_reason: FinishReason


class TransformersEngine:
    """Samples responses with `model.generate`, for any causal language model of transformers.

    tokenizer: its eos_token ends a response, its pad_token fills prompts on the left. Only lengths tell padding from
        text, so the two may be the same token.
    Prompts of similar length are decoded together, to pad little; a batch runs until its last response has ended.
    Random numbers are torch's: what a response is depends on its batch.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def update_weights(self) -> None:
        """Nothing: `generate` runs the model itself."""

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], sampling: SamplingParams, *, seeds: list[int] | None = None
    ) -> Rollout:
        """As `RolloutEngine.generate`, but `seeds` raises ValueError: a batch has one generator."""
        if seeds is not None:
            raise ValueError("seeds: the transformers engine samples a batch from one generator; use the native engine")
        config = self.model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        check_prompts(prompts, sampling, None, config.vocab_size, context)
        every = [prompt for prompt in prompts for _ in range(sampling.n)]
        order = sorted(range(len(every)), key=lambda i: (len(every[i]), i))
        responses: dict[int, Response] = {}
        with ExitStack() as stack:
            stack.enter_context(self._plain_model())
            if sampling.seed is not None:
                stack.enter_context(torch.random.fork_rng())
                torch.manual_seed(sampling.seed)
            try:
                for start in range(0, len(order), sampling.batch_size):
                    batch = order[start : start + sampling.batch_size]
                    decoded = self._decode([every[i] for i in batch], sampling, context)
                    responses.update(zip(batch, decoded, strict=True))
            except KeyboardInterrupt as interrupt:
                done = sorted(responses)
                raise RolloutInterrupted(_rollout(every, responses, done), done) from interrupt
        return _rollout(every, responses, range(len(every)))

    @contextmanager
    def _plain_model(self):
        """In evaluation mode, and without a generation config of its own.

        generate fills what its config leaves open from the model's: a repetition penalty there would sample from
        another distribution than the one that log-probs are taken of.
        """
        training, own = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            self.model.generation_config = own
            self.model.train(training)

    def _decode(self, prompts: list[list[int]], sampling: SamplingParams, context: int | None) -> list[Response]:
        width = max(len(prompt) for prompt in prompts)
        limit = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - width)
        if limit == 0:
            return [Response([], torch.empty(0), "length") for _ in prompts]
        pad = self.tokenizer.pad_token_id
        device = next(self.model.parameters()).device
        input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        stop = Stop(self.tokenizer, sampling)
        ends = sorted(stop.tokens)
        config = GenerationConfig(
            do_sample=not sampling.greedy,
            max_new_tokens=limit,
            pad_token_id=pad,
            eos_token_id=ends or None,
            use_cache=True,
        )
        if not sampling.greedy:
            config.update(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p or None,
            )
        taken = _TakenLogProbs(sampling.temperature or 1.0)
        processors: list[LogitsProcessor] = [taken]
        if sampling.min_new_tokens and ends:
            processors.append(MinNewTokensLengthLogitsProcessor(width, sampling.min_new_tokens, ends, device=device))
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=(torch.arange(width, device=device) >= width - lengths).long(),
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=[_StopStrings(stop, width, limit)] if sampling.stop else None,
        )
        log_probs = taken.finish(output).cpu()
        return [
            _cut(tokens, row, stop, limit) for tokens, row in zip(output[:, width:].tolist(), log_probs, strict=True)
        ]


class _TakenLogProbs(LogitsProcessor):
    """Log-probs of the tokens that were taken, from the logits as they were before anything changed them."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.logits: Tensor | None = None
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self.logits = scores
        return scores

    def _take(self, input_ids: Tensor) -> None:
        if self.logits is not None:
            self.columns.append(F.token_log_probs(self.logits, input_ids[:, -1], temperature=self.temperature))

    def finish(self, output: Tensor) -> Tensor:
        """[B, T], of the tokens that `generate` returned."""
        self._take(output)
        return torch.stack(self.columns, 1)


class _StopStrings(StoppingCriteria):
    def __init__(self, stop: Stop, width: int, limit: int) -> None:
        self.stop, self.width, self.limit = stop, width, limit

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        rows = input_ids[:, self.width :].tolist()
        return torch.tensor([self.stop.reason(row, self.limit) is not None for row in rows], device=input_ids.device)


def _cut(tokens: list[int], log_probs: Tensor, stop: Stop, limit: int) -> Response:
    """A response up to where it ended; what follows is padding."""
    for length in range(1, len(tokens) + 1):
        reason = stop.reason(tokens[:length], limit)
        if reason is not None:
            return Response(tokens[:length], log_probs[:length], reason)
    raise RuntimeError(f"generate returned {len(tokens)} of {limit} tokens and no end among them")


def _rollout(prompts: list[list[int]], responses: dict[int, Response], indices) -> Rollout:
    chosen = [responses[i] for i in indices]
    return Rollout(
        [prompts[i] for i in indices],
        [response.tokens for response in chosen],
        [response.finish_reason for response in chosen],
        torch.cat([response.log_probs for response in chosen]) if chosen else torch.empty(0),
    )
