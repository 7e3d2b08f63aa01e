"""What goes into a rollout and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled.

    max_new_tokens: most tokens of a response; also bounded by the model's context. min_new_tokens: as many come before
        a response may stop.
    temperature: tokens come from softmax(logits / temperature); 0 takes the most likely one.
    top_k, top_p, min_p: only among the k most likely tokens (0: all), then the fewest most likely ones of those with a
        mass of top_p, then those at least min_p times as likely as the most likely. What is sampled through a filter
        comes from another distribution than the one that log-probs and the loss are of.
    n: responses for each prompt.
    stop_token_ids: tokens that end a response as EOS does. stop: strings that do, also across tokens. The response
        keeps the token that ended it.
    seed: of the random numbers; None takes one from torch's generator. A sample depends on the seed, on the number of
        its response and on the position, not on what is decoded beside it.
    batch_size: most responses decoded at a time.
    Raises ValueError for anything out of range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_new_tokens: int = 0
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 0), ("min_new_tokens", 0), ("top_k", 0), ("n", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be at least 0 and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be greater than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be in [0, 1]")
        if self.seed is not None:
            _check_seed("seed", self.seed)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop={self.stop!r} must be a tuple of strings that are not empty")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether tokens come from another distribution than softmax(logits / temperature)."""
        return self.greedy or self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.min_new_tokens > 0


@dataclass
class Rollout:
    """Sampled responses, in the order of their prompts; a prompt that got several stands there several times.

    prompts, responses: token ids; a response keeps the token that ended it.
    finish_reasons: "stop" where a response ended by EOS, a stop token or a stop string, "length" where it was cut.
    log_probs: [N], packed like `tokens`, fp32, in nats, of each token under softmax(logits / temperature), unfiltered
        (temperature 1 where it was 0); None from an engine that gives none.
    hidden: [N, H], fp32, the last hidden state that predicted each token, where the engine was asked for it.
    sampled: [N], bool, False at tokens that the policy did not sample, such as a tool's output; None: it sampled all.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    finish_reasons: list[FinishReason]
    log_probs: Tensor | None = None
    hidden: Tensor | None = None
    sampled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def lengths(self) -> Tensor:
        """Tokens in each response [B], EOS included."""
        return torch.tensor([len(response) for response in self.responses], dtype=torch.long)

    @property
    def tokens(self) -> Tensor:
        """All responses' tokens [N], one response after the other."""
        return torch.tensor([token for response in self.responses for token in response], dtype=torch.long)

    @property
    def cu_seqlens(self) -> Tensor:
        """[B + 1], int32: response b is tokens[cu_seqlens[b] : cu_seqlens[b + 1]]."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).int()

    @property
    def mask(self) -> Tensor:
        """[B, T], 1 at the tokens of each response, in fp32."""
        lengths = self.lengths
        return (torch.arange(max(lengths.tolist(), default=0)) < lengths[:, None]).float()

    @property
    def trained(self) -> Tensor:
        """[B, T], 1 at the tokens that the policy sampled, in fp32."""
        return self.mask if self.sampled is None else self.padded(self.sampled.float().cpu())

    def padded(self, packed: Tensor) -> Tensor:
        """[B, T, ...] of packed [N, ...], with 0 where the mask is 0."""
        result = packed.new_zeros(*self.mask.shape, *packed.shape[1:])
        result[self.mask.bool().to(packed.device)] = packed
        return result

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The responses as text, without special tokens, so that prompt + text is the text of both.

        Decoded behind their prompts: tokenizers of the SentencePiece kind drop the space before a text's first word.
        """
        texts = []
        for prompt, response in zip(self.prompts, self.responses, strict=True):
            before = tokenizer.decode(prompt, skip_special_tokens=True)
            whole = tokenizer.decode([*prompt, *response], skip_special_tokens=True)
            whole_fits = whole.startswith(before)
            texts.append(whole[len(before) :] if whole_fits else tokenizer.decode(response, skip_special_tokens=True))
        return texts


class RolloutEngine(Protocol):
    """What turns prompts into responses."""

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams,
        *,
        seeds: list[int] | None = None,
    ) -> Rollout:
        """`sampling.n` responses a prompt.

        prompts: token ids. seeds: one for each prompt, in place of `sampling.seed`: a prompt's responses then depend on
            its own seed alone, not on its place in the list.
        Raises ValueError for an empty prompt, a token outside the vocabulary or a prompt longer than the context.
        """

    def update_weights(self) -> None:
        """To be called when the model's weights have changed, before the next `generate`."""


class RolloutInterrupted(KeyboardInterrupt):
    """Ctrl-C during `generate`. rollout: the responses finished by then. indices: their places in the whole rollout."""

    def __init__(self, rollout: Rollout, indices: list[int]) -> None:
        super().__init__(f"rollout interrupted: {len(indices)} responses were finished")
        self.rollout = rollout
        self.indices = indices


def check_prompts(
    prompts: list[list[int]], sampling: SamplingParams, seeds: list[int] | None, vocabulary: int, context: int | None
) -> None:
    """Errors of `generate`'s arguments. context: most tokens of a prompt and its response, or None."""
    if not prompts:
        raise ValueError("prompts: there must be at least one")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{i}] is empty; a prompt has at least one token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(f"prompts[{i}] has a token outside the vocabulary of {vocabulary}")
        if context is not None and len(prompt) > context:
            raise ValueError(f"prompts[{i}] has {len(prompt)} tokens, more than the model's context of {context}")
    if seeds is not None:
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds: got {len(seeds)} for {len(prompts)} prompts")
        for i, seed in enumerate(seeds):
            _check_seed(f"seeds[{i}]", seed)
    if any(token < 0 or token >= vocabulary for token in sampling.stop_token_ids):
        raise ValueError(f"stop_token_ids={sampling.stop_token_ids} has a token outside the vocabulary of {vocabulary}")


def _check_seed(name: str, seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name}={seed} must be in [0, 2^63)")


def new_seed() -> int:
    """From torch's generator, so that torch.manual_seed and a resumed run's random state decide."""
    return int(torch.randint(2**63 - 1, ()).item())
