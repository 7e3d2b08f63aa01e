"""A trained reward model as a reward function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastrlhf.data.cells import chat_of
from fastrlhf.data.encode import Encoder
from fastrlhf.data.turns import turn_ends
from fastrlhf.fused_layers import fuse_layers
from fastrlhf.grouping import batches_of
from fastrlhf.loading import load_reward_model, load_tokenizer, tokenizer_with_pad
from fastrlhf.rewards.combine import DISAGREEMENT, combine
from fastrlhf.rewards.detailed_scores import DetailedScores
from fastrlhf.rewards.normalization import EPS
from fastrlhf.rewards.settings import SETTINGS_FILE, RewardSettings
from fastrlhf.rewards.text_scores import score_in_fp32, sequence_scores, takes_packing


class RewardModel:
    """`f(prompts, completions, **columns) -> list[float]` by a reward model that RewardTrainer made, or any sequence
    classification model with one label.

    model: the model, or its hub id or folder. processing_class: its tokenizer; the one beside the model when None.
    batch_size: most texts scored at a time: in one row that has what they begin with once, if packed texts do not
        disturb each other in the model, else padded. options: for `from_pretrained`, when model is a string.
    calibrated: scores as log-odds, divided by the temperature that `RewardTrainer.calibrate` fitted.
    ensemble, std_coef: how the heads of an ensemble become one score (`combine`), around their means on held-out texts
        where it was calibrated.
    objective_weights: of a model with objectives, one weight each; 1 each when None. The score is the weighted sum of
        the objectives, each normalised by mean and standard deviation on held-out texts where it was calibrated;
        with `calibrated`, each in log-odds. `parts` of the result has each objective's own.
    What `reward_model.json` in the model's folder says of its heads is followed; a model without is a single head.
    Prompt and completion become the very tokens that RewardTrainer would make of them (fastrlhf.data.encode), EOS
    included, whether or not the response came to one. A model that scores every turn sums over those of the completion.
    One call at a time: packed texts are told apart through the model.
    """

    def __init__(
        self,
        model: str | nn.Module,
        processing_class: PreTrainedTokenizerBase | None = None,
        batch_size: int = 64,
        *,
        calibrated: bool = False,
        ensemble: str = "mean",
        std_coef: float = 1.0,
        objective_weights: list[float] | None = None,
        **options: Any,
    ) -> None:
        if processing_class is None and isinstance(model, str):
            processing_class = load_tokenizer(model, "reward_funcs")
        name = model if isinstance(model, str) else model.config.name_or_path
        self.settings = RewardSettings.load(name) if name else RewardSettings()
        heads = len(self.settings.names)
        model = load_reward_model(model, "reward_funcs", num_labels=heads, **options)
        self.model = fuse_layers(score_in_fp32(model)).eval().requires_grad_(False)
        self.packed = takes_packing(self.model)
        self.tokenizer = tokenizer_with_pad(processing_class, self.model, unlike_eos=True)
        self.encoder = Encoder(self.tokenizer)
        self.max_length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        self.batch_size = batch_size
        self.calibrated, self.ensemble, self.std_coef = calibrated, ensemble, std_coef
        self.weights = torch.tensor(objective_weights or [1.0] * heads)
        self.__name__ = "reward_model"
        if calibrated and not self.settings.temperatures:
            raise ValueError(
                f"calibrated=True: {name!r} has no temperatures in its {SETTINGS_FILE}; RewardTrainer.calibrate fits "
                "them on held-out pairs"
            )
        if len(self.weights) != heads or (objective_weights and self.settings.heads != "objectives"):
            raise ValueError(
                f"objective_weights: {len(self.weights)} given, wanted one for each objective of {name!r}, which has "
                + (", ".join(self.settings.names) if self.settings.heads == "objectives" else "none")
            )

    def to(self, device: torch.device) -> RewardModel:
        self.model.to(device)
        return self

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        scores = self.head_scores(prompts, completions)
        if self.settings.heads == "ensemble":
            scores, std = combine(scores, self.ensemble, self.std_coef)
            return DetailedScores(scores.tolist(), parts={DISAGREEMENT: std.tolist()})
        if self.settings.heads == "objectives":
            parts = {name: column.tolist() for name, column in zip(self.settings.names, scores.unbind(1), strict=True)}
            return DetailedScores((scores @ self.weights).tolist(), parts)
        return scores[:, 0].tolist()

    def head_scores(self, prompts: list[Any], completions: list[Any]) -> Tensor:
        """[n, heads], fp32, on the CPU: as the heads gave them, then calibrated or normalised as the class says."""
        scores, settings = self._raw_scores(prompts, completions), self.settings
        if settings.means and settings.heads != "single":
            scores = scores - torch.tensor(settings.means)
        if self.calibrated:
            return scores / torch.tensor(settings.temperatures)
        if settings.stds and settings.heads == "objectives":
            return scores / (torch.tensor(settings.stds) + EPS)
        return scores

    @torch.no_grad()
    def _raw_scores(self, prompts: list[Any], completions: list[Any]) -> Tensor:
        texts = [self.encoder.render(p, c, row) for row, (p, c) in enumerate(zip(prompts, completions, strict=True))]
        encoded = self.encoder.texts(texts)
        sequences = [tokens for tokens, _ in encoded]
        longest = max(map(len, sequences))
        if longest > self.max_length:
            raise ValueError(
                f"the reward model takes {self.max_length} tokens (max_position_embeddings), a text has {longest}; "
                "shorten prompts or response_length"
            )
        turns = None
        if self.settings.turns == "all":
            turns = [
                [end for end in turn_ends(self.encoder, text, chat_of(p, c), ids, row) if end >= start]
                for row, (text, (ids, start), p, c) in enumerate(zip(texts, encoded, prompts, completions, strict=True))
            ]
        scores = torch.empty(len(sequences), len(self.settings.names))
        for batch in batches_of(sequences, self.batch_size, self.packed):
            scores[batch] = sequence_scores(
                self.model,
                [sequences[i] for i in batch],
                self.tokenizer.pad_token_id,
                turns and [turns[i] for i in batch],
                packed=self.packed,
            ).cpu()
        return scores
