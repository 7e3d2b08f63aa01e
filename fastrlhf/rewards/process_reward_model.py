"""A trained process reward model as a reward function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastrlhf.batching import text_batches
from fastrlhf.data.encode import Encoder
from fastrlhf.data.steps import split_steps, step_places
from fastrlhf.fused_layers import fuse_layers
from fastrlhf.grouping import batches_of
from fastrlhf.loading import load_reward_model, load_tokenizer, tokenizer_with_pad
from fastrlhf.rewards.detailed_scores import DetailedScores
from fastrlhf.rewards.settings import RewardSettings
from fastrlhf.rewards.text_scores import score_in_fp32, scores_by_place, takes_packing


class ProcessRewardModel:
    """`f(prompts, completions, **columns)` that rewards every step of a completion when it ends (Lightman et al. 2023,
    arXiv:2305.20050; with PPO: Wang et al. 2024, arXiv:2312.08935).

    model: what ProcessRewardTrainer made: the model, or its hub id or folder. processing_class: its tokenizer; the one
        beside the model when None. batch_size: most texts scored at a time. options: for `from_pretrained`.
    The reward of a step is the probability that it is right. The scores returned are 0: all reward is in `steps`.
    """

    def __init__(
        self,
        model: str | nn.Module,
        processing_class: PreTrainedTokenizerBase | None = None,
        batch_size: int = 64,
        **options: Any,
    ) -> None:
        name = model if isinstance(model, str) else model.config.name_or_path
        if processing_class is None and name:
            processing_class = load_tokenizer(name, "reward_funcs")
        self.settings = RewardSettings.load(name) if name else RewardSettings("process")
        if self.settings.heads != "process":
            raise ValueError(f"reward_funcs: {name!r} is no process reward model, its head is {self.settings.heads!r}")
        model = score_in_fp32(load_reward_model(model, "reward_funcs", **options))
        self.model = fuse_layers(model).eval().requires_grad_(False)
        self.packed = takes_packing(self.model)
        self.tokenizer = tokenizer_with_pad(processing_class, self.model, unlike_eos=True)
        self.encoder = Encoder(self.tokenizer)
        self.batch_size = batch_size
        self.__name__ = "process_reward_model"

    def to(self, device: torch.device) -> ProcessRewardModel:
        self.model.to(device)
        return self

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> DetailedScores:
        steps = [
            list(zip(ends, probabilities, strict=True))
            for ends, probabilities in zip(*self.probabilities(prompts, completions), strict=True)
        ]
        return DetailedScores([0.0] * len(completions), steps=steps)

    @torch.no_grad()
    def probabilities(self, prompts: list[Any], completions: list[Any]) -> tuple[list[list[int]], list[list[float]]]:
        """Of each completion, where its steps end, in characters, and the probability of each that it is right."""
        texts = [self.encoder.render(p, c, row) for row, (p, c) in enumerate(zip(prompts, completions, strict=True))]
        sequences = [ids for ids, _ in self.encoder.texts(texts)]
        contents = [_content(completion) for completion in completions]
        ends = [split_steps(content, self.settings.separator) for content in contents]
        places = [
            step_places(self.encoder, text, content, end, ids, row) if end else []
            for row, (text, content, end, ids) in enumerate(zip(texts, contents, ends, sequences, strict=True))
        ]
        found: list[list[float]] = [[] for _ in completions]
        with_steps = [i for i in range(len(places)) if places[i]]
        for batch in batches_of([sequences[i] for i in with_steps], self.batch_size, self.packed):
            rows = [with_steps[i] for i in batch]
            scores = self._scores([sequences[i] for i in rows], [places[i] for i in rows])
            for i, values in zip(rows, scores.split([len(places[i]) for i in rows]), strict=True):
                found[i] = torch.sigmoid(values).tolist()
        return ends, found

    def _scores(self, sequences: list[list[int]], places: list[list[int]]) -> Tensor:
        device = next(self.model.parameters()).device
        batches = text_batches(sequences, self.tokenizer.pad_token_id, places, packed=self.packed)
        return scores_by_place(self.model, [batch.to(device) for batch in batches])[:, 0]


def _content(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
