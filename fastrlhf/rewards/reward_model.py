"""A trained reward model as a reward function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastrlhf.batching import group_by_length, pad_right
from fastrlhf.data.cells import chat_of
from fastrlhf.data.encode import Encoder
from fastrlhf.data.turns import turn_ends
from fastrlhf.fused_layers import fuse_layers
from fastrlhf.loading import load_reward_model, load_tokenizer, tokenizer_with_pad
from fastrlhf.rewards.combine import DISAGREEMENT, combine
from fastrlhf.rewards.detailed_scores import DetailedScores
from fastrlhf.rewards.normalization import EPS
from fastrlhf.rewards.settings import SETTINGS_FILE, RewardSettings


def score_in_fp32(model: nn.Module) -> nn.Module:
    """Let a half-precision sequence classifier compute its score in fp32; in bf16 scores near 3 are 0.016 apart."""
    head = getattr(model, "score", None)
    if isinstance(head, nn.Linear) and head.weight.dtype != torch.float32:
        head.float()
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    return model


def text_scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, turns: Tensor | None = None) -> Tensor:
    """Scores [b, heads], fp32, of texts that are padded on the right.

    model: a sequence classifier, under whatever wrappers. turns: [t, 2], row and position of the turns' ends; a text's
    score is then the sum of those at the ends of its turns, which is what preferences between whole conversations tell
    of (Christiano et al. 2017, arXiv:1706.03741, equation 1): turns that two of them share cancel.
    """
    if turns is None:
        return model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
    at_turns = position_scores(model, input_ids, attention_mask, turns)
    return at_turns.new_zeros(len(input_ids), at_turns.shape[1]).index_add(0, turns[:, 0], at_turns)


def position_scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, places: Tensor) -> Tensor:
    """Scores [t, heads], fp32, at places [t, 2], each a row and a position.

    transformers' classifiers compute the score at every position and return the last one's: they are taken from the
    score head, the model's own forward left as it is, with its wrappers. Raises ValueError for a model without a head
    named `score`.
    """
    head = next((module for name, module in model.named_modules() if name.split(".")[-1] == "score"), None)
    if head is None:
        raise ValueError(f"model: {type(model).__name__} has no head named `score` to take the scores at turns from")
    kept: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        model(input_ids=input_ids, attention_mask=attention_mask)
    finally:
        handle.remove()
    return kept[-1][places[:, 0], places[:, 1]].float()


def sequence_scores(
    model: nn.Module, sequences: list[list[int]], pad_token_id: int, turns: list[list[int]] | None = None
) -> Tensor:
    """Scores [n], or [n, heads] of several heads, fp32, by forwards over groups of similar length (little padding).

    turns: of each sequence, the positions whose scores are summed; the last one's when None.
    """
    device = next(model.parameters()).device
    groups = group_by_length([len(sequence) for sequence in sequences])
    scores = []
    for group in groups:
        input_ids, attention_mask = pad_right([sequences[i] for i in group], pad_token_id)
        places = None
        if turns is not None:
            places = torch.tensor([(row, at) for row, i in enumerate(group) for at in turns[i]], device=device)
        scores.append(text_scores(model, input_ids.to(device), attention_mask.to(device), places))
    order = torch.tensor([i for group in groups for i in group], device=device)
    return torch.cat(scores)[order.argsort()].squeeze(-1)


class RewardModel:
    """`f(prompts, completions, **columns) -> list[float]` by a reward model that RewardTrainer made, or any sequence
    classification model with one label.

    model: the model, or its hub id or folder. processing_class: its tokenizer; the one beside the model when None.
    batch_size: most texts scored at a time. options: for `from_pretrained`, when model is a string.
    calibrated: scores as log-odds, divided by the temperature that `RewardTrainer.calibrate` fitted.
    ensemble, std_coef: how the heads of an ensemble become one score (`combine`), around their means on held-out texts
        where it was calibrated.
    objective_weights: of a model with objectives, one weight each; 1 each when None. The score is the weighted sum of
        the objectives, each normalised by mean and standard deviation on held-out texts where it was calibrated;
        with `calibrated`, each in log-odds. `parts` of the result has each objective's own.
    What `reward_model.json` in the model's folder says of its heads is followed; a model without is a single head.
    Prompt and completion become the very tokens that RewardTrainer would make of them (fastrlhf.data.encode), EOS
    included, whether or not the response came to one. A model that scores every turn sums over those of the completion.
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
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = torch.empty(len(sequences), len(self.settings.names))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            values = sequence_scores(
                self.model,
                [sequences[i] for i in batch],
                self.tokenizer.pad_token_id,
                turns and [turns[i] for i in batch],
            )
            scores[batch] = values.reshape(len(batch), -1).cpu()
        return scores
