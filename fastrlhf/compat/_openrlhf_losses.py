"""OpenRLHF's losses. `fastrlhf.compat.openrlhf` says more about OpenRLHF."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastrlhf import functional as F
from fastrlhf.compat._common import aggregate, cast, fits
from fastrlhf.compat._patch import original

LOSSES = "openrlhf.models.loss"


def aggregate_loss(
    loss: Tensor,
    loss_mask: Tensor,
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    *,
    exact_dtype: bool = False,
) -> Tensor:
    """The loss [B, T] as a scalar, with gradient: its mean over tokens, or over the means of the sequences.

    batch_num_tokens, global_batch_size: those of the global batch, instead of this one's; then times dp_size.
    """
    counts = (dp_size, batch_num_tokens, global_batch_size)
    if loss_mask is None or loss.dim() != 2 or not fits(loss, mask=loss_mask):
        return original(f"{LOSSES}.aggregate_loss")(loss, loss_mask, token_level_loss, *counts)
    loss_mask = loss_mask.to(torch.bool)
    return cast(aggregate(loss, loss_mask, *aggregation_of(token_level_loss, *counts)), exact_dtype, loss)


def aggregation_of(
    token_level_loss: bool,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> tuple[str, float | Tensor | None]:
    """(aggregation, denominator), as our losses take them."""
    count = batch_num_tokens if token_level_loss else global_batch_size
    return "token-mean" if token_level_loss else "seq-mean-token-mean", None if count is None else count / dp_size


class SFTLoss(nn.Module):
    """Mean of -log p over tokens, or over the means of the sequences."""

    exact_dtype = False

    def __init__(self, token_level_loss: bool = True):
        super().__init__()
        self.token_level_loss = token_level_loss

    def forward(
        self,
        per_token_logps: Tensor,
        loss_mask: Tensor,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        """per_token_logps, loss_mask: [B, T]. The counts are those of `aggregate_loss`. Returns a scalar, fp32."""
        counts = (dp_size, batch_num_tokens, global_batch_size)
        return -aggregate_loss(per_token_logps, loss_mask, self.token_level_loss, *counts, exact_dtype=self.exact_dtype)


class PolicyLoss(nn.Module):
    """PPO's clipped loss, or GSPO's ("gspo"), with correction for what the rollout engine computed differently.

    is_correction_level: "token" or "seq" gates tokens or sequences by the ratio of old to rollout probability, by the
        KL divergence ("binary_kl") or the total variation ("tv") of a token against all others (is_correction_gating);
        outside is_correction_threshold = (low, high) they are dropped ("mask"; the others are weighted by their ratio),
        or the ratio that weights them is held inside ("clip").
    """

    exact_dtype = False

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: list = (0.5, 5.0),
    ) -> None:
        super().__init__()
        self.clip_eps_low = clip_eps_low
        self.clip_eps_high = clip_eps_high
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.dual_clip = dual_clip
        self.policy_loss_type = policy_loss_type
        self.is_correction_level = is_correction_level
        self.is_correction_mode = is_correction_mode
        self.is_correction_gating = is_correction_gating
        self.is_correction_threshold = is_correction_threshold
        choices = {
            "is_correction_level": ("off", "token", "seq"),
            "is_correction_mode": ("mask", "clip"),
            "is_correction_gating": ("ratio", "binary_kl", "tv"),
        }
        for name, wanted in choices.items():
            if getattr(self, name) not in wanted:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted one of {', '.join(map(repr, wanted))}")
        if dual_clip is not None and dual_clip <= 1.0:
            raise AssertionError(f"dual_clip: got {dual_clip}, wanted a number > 1")
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError(
                f"is_correction_mode: got 'clip' with is_correction_level={is_correction_level!r} and "
                f"is_correction_gating={is_correction_gating!r}, wanted 'token' and 'ratio' with it"
            )
        if is_correction_gating != "ratio" and is_correction_level != "off" and is_correction_threshold[0] > 0:
            raise ValueError(
                f"is_correction_threshold: got {is_correction_threshold}, wanted a lower bound of 0, because "
                f"is_correction_gating={is_correction_gating!r} is bounded from above only"
            )

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Everything [B, T]. Returns (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio), scalars on the device, the
        last two None without a correction. The counts are those of `aggregate_loss`."""
        counts = (dp_size, batch_num_tokens, global_batch_size)
        tensors = (log_probs, old_log_probs, advantages)
        if log_probs.dim() != 2 or not fits(*tensors, rollout_log_probs, mask=action_mask):
            return original(f"{LOSSES}.PolicyLoss").forward(self, *tensors, action_mask, rollout_log_probs, *counts)
        if self.policy_loss_type not in ("ppo", "gspo"):
            raise ValueError(f"policy_loss_type: got {self.policy_loss_type!r}, wanted 'ppo' or 'gspo'")
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.to(torch.bool)
        gspo, correct = self.policy_loss_type == "gspo", self.is_correction_level != "off"
        weights = vllm_kl = filtered = None
        if correct and not gspo:
            weights, vllm_kl, filtered = self._correction(old_log_probs, rollout_log_probs, mask)
        aggregation, denominator = aggregation_of(self.token_level_loss, *counts)
        loss, stats = F.ppo_loss(
            log_probs,
            rollout_log_probs if correct and gspo else old_log_probs,
            advantages,
            mask,
            clip_low=self.clip_eps_low,
            clip_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
            log_ratio_clamp=None if gspo else 20.0,
            ratio_level="sequence" if gspo else "token",
            weights=weights,
            ref_log_probs=old_log_probs,  # so that the statistics have the mean of the log-ratios
            kl_estimator="k1",
            aggregation=aggregation,
            denominator=denominator,
        )
        results = (loss, stats.clip_fraction, -stats.kl, vllm_kl, filtered)
        return tuple(x if x is None else cast(x, self.exact_dtype, *tensors) for x in results)

    @torch.no_grad()
    def _correction(self, old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """(weights [B, T], mean of rollout - old log-probs, fraction of tokens or sequences outside the thresholds)."""
        (low, high), by_sequence = self.is_correction_threshold, self.is_correction_level == "seq"
        old, rollout = old_log_probs.float(), rollout_log_probs.float()
        log_ratio = old - rollout
        if self.is_correction_gating == "ratio":
            statistic = (_row_means(log_ratio, mask) if by_sequence else log_ratio).exp()
        else:
            p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
            if self.is_correction_gating == "binary_kl":
                statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            else:
                statistic = (p - q).abs()
            statistic = _row_means(statistic, mask) if by_sequence else statistic
        inside = (statistic >= low) & (statistic <= high)
        if self.is_correction_mode == "clip":
            weights = statistic.clamp(min=low, max=high)
        else:
            weights = torch.where(inside, log_ratio.exp(), 0.0)
        outside = (~inside).float()
        filtered = outside.mean() if by_sequence else F.masked_mean(outside, mask)
        return weights, -F.masked_mean(log_ratio, mask), filtered


def _row_means(x: Tensor, mask: Tensor) -> Tensor:
    """[B, 1], nan for a sequence without tokens, which is filtered."""
    return torch.where(mask.any(-1), F.masked_mean(x, mask, dim=-1), torch.nan).unsqueeze(-1)


class ValueLoss(nn.Module):
    """Half the squared error, with clip_eps clipped around the old values."""

    exact_dtype = False

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps = clip_eps
        self.token_level_loss = token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        """Everything [B, T]. The counts are those of `aggregate_loss`. Returns a scalar, fp32."""
        counts = (dp_size, batch_num_tokens, global_batch_size)
        if values.dim() != 2 or self.clip_eps == 0 or not fits(values, old_values, returns, mask=action_mask):
            theirs = original(f"{LOSSES}.ValueLoss").forward
            return theirs(self, values, old_values, returns, action_mask, *counts)
        mask = torch.ones_like(values, dtype=torch.bool) if action_mask is None else action_mask
        aggregation, denominator = aggregation_of(self.token_level_loss, *counts)
        options = {"clip": self.clip_eps, "aggregation": aggregation, "denominator": denominator}
        loss, _ = F.value_loss(values, old_values, returns, mask, **options)
        return cast(loss, self.exact_dtype, values, old_values, returns)


class PairWiseLoss(nn.Module):
    """Bradley-Terry: the mean of -log sigmoid(chosen - reject - margin)."""

    exact_dtype = False

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """Everything in one shape. Returns a scalar, fp32."""
        if not fits(chosen_reward, reject_reward, margin):
            return original(f"{LOSSES}.PairWiseLoss")()(chosen_reward, reject_reward, margin)
        pairs = (chosen_reward.flatten(), reject_reward.flatten())
        loss, _ = F.pairwise_reward_loss(*pairs, margin=None if margin is None else margin.flatten())
        return cast(loss, self.exact_dtype, chosen_reward, reject_reward, margin)


class LogExpLoss(nn.Module):
    """The mean of log(1 + exp(reject - chosen)); there is no margin in it."""

    exact_dtype = False

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """chosen_reward, reject_reward: in one shape. Returns a scalar, fp32."""
        if not fits(chosen_reward, reject_reward):
            return original(f"{LOSSES}.LogExpLoss")()(chosen_reward, reject_reward, margin)
        loss, _ = F.pairwise_reward_loss(chosen_reward.flatten(), reject_reward.flatten())
        return cast(loss, self.exact_dtype, chosen_reward, reject_reward)


class DPOLoss(nn.Module):
    """DPO, conservative with label_smoothing, or IPO."""

    exact_dtype = False

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.ipo = ipo

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Everything [B]. Returns (loss, rewards of the chosen, rewards of the rejected), the last two [B], fp32."""
        pairs = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
        smooth = 0.0 if self.ipo else self.label_smoothing
        if policy_chosen_logps.dim() != 1 or not fits(*pairs) or not 0 <= smooth < 0.5 or self.beta <= 0:
            return original(f"{LOSSES}.DPOLoss").forward(self, *pairs)
        variant = "ipo" if self.ipo else "sigmoid"
        loss, _ = F.dpo_loss(*pairs, beta=self.beta, variant=variant, label_smoothing=smooth)
        chosen, rejected = (
            self.beta * F.kl_divergence(policy.detach(), reference.detach())
            for policy, reference in zip(pairs[:2], pairs[2:], strict=True)
        )
        return tuple(cast(x, self.exact_dtype, *pairs) for x in (loss, chosen, rejected))
