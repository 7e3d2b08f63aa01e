"""DPO and its relatives, with Liger's options, from hidden states."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fastrlhf import functional as F
from fastrlhf.compat._heads import in_one_dtype, mean_logit

TYPES = ("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard")
TYPES += ("apo_zero", "apo_down", "discopop")


def liger_fused_linear_dpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    alpha: float = 1.0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """DPO and its relatives, from hidden states, with no logits in memory.

    _input: [2 B, T, H], of the B chosen responses and then of the B rejected ones. target: [2 B, T], already shifted.
    weight [V, H], bias [V]; the reference's in the same shapes. compiled and chunk_size are not needed.
    Returns (loss, (log-probs of the chosen and of the rejected responses [B], mean logit of each, cross entropy of the
    chosen ones, rewards of the chosen and of the rejected ones [B])). The loss alone has a gradient: to _input, weight
    and bias.
    """
    half = target.shape[0] // 2
    counts = target != ignore_index
    tokens = torch.where(counts, target, -100)
    head = in_one_dtype(_input, weight, bias)
    log_probs = _log_probs(head, tokens)
    sums = _of_responses(log_probs, counts, average_log_prob)
    reference = torch.zeros_like(sums)
    if use_ref_model:
        with torch.no_grad():
            ref_log_probs = _log_probs(in_one_dtype(ref_input, ref_weight, ref_bias), tokens)
            reference = _of_responses(ref_log_probs, counts, average_log_prob)
    loss, rewards = _dpo(sums, reference, beta, loss_type, label_smoothing, discopop_tau)
    nll = torch.zeros((), device=loss.device)
    if compute_nll_loss:
        nll = -log_probs[:half].sum() / counts[:half].sum()
        loss = loss + alpha * nll
    means = (mean_logit(x.flatten(0, 1), *head[1:]).mean() for x in head[0].split(half))
    return loss, (*sums.detach().split(half), *means, nll.detach(), *rewards.detach().split(half))


def _log_probs(head: tuple, tokens: Tensor) -> Tensor:
    hidden, weight, bias = head
    return F.linear_token_log_probs(hidden, weight, tokens, bias=bias)


def _of_responses(log_probs: Tensor, counts: Tensor, average: bool) -> Tensor:
    sums = log_probs.sum(-1)
    return sums / counts.sum(-1) if average else sums


class LigerFusedLinearDPOLoss(nn.Module):
    """`liger_fused_linear_dpo` with its options kept; `forward` takes the tensors."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        super().__init__()
        options = dict(locals())
        _check(loss_type, label_smoothing)
        self._options = [name for name in options if name not in ("self", "__class__")]
        for name in self._options:
            setattr(self, name, options[name])

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        options = {name: getattr(self, name) for name in self._options}
        return liger_fused_linear_dpo(_input, lin_weight, target, bias, ref_input, ref_weight, ref_bias, **options)


def _check(loss_type: str, label_smoothing: float) -> None:
    if loss_type not in TYPES:
        raise ValueError(f"loss_type: got {loss_type!r}, wanted one of {', '.join(TYPES)}")
    if loss_type == "exo_pair" and label_smoothing <= 0.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, wanted more than 0, because loss_type='exo_pair'")
    if loss_type == "robust" and not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: got {label_smoothing}, wanted 0 to below 0.5, because loss_type='robust'")


def _dpo(
    log_probs: Tensor, reference: Tensor, beta: float, loss_type: str, label_smoothing: float, discopop_tau: float
) -> tuple[Tensor, Tensor]:
    """(mean loss of the pairs, rewards [2 B]) from log-probs of responses [2 B], the chosen ones first."""
    _check(loss_type, label_smoothing)
    ratios = log_probs - reference
    rewards = beta * ratios
    (a, b), (chosen, rejected) = ratios.chunk(2), rewards.chunk(2)
    h, e = chosen - rejected, label_smoothing
    if loss_type == "sigmoid":  # Rafailov et al. 2023, arXiv:2305.18290, equation 7
        loss = -logsigmoid(h)
    elif loss_type == "hinge":  # Zhao et al. 2023, arXiv:2305.10425, equation 4
        loss = torch.relu(1 - h)
    elif loss_type == "exo_pair":  # Ji et al. 2024, arXiv:2402.00856, equation 16
        loss = torch.sigmoid(h) * (logsigmoid(h) - math.log1p(-e)) + torch.sigmoid(-h) * (logsigmoid(-h) - math.log(e))
    elif loss_type == "nca_pair":  # Chen et al. 2024, arXiv:2402.05369
        loss = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
    elif loss_type == "robust":  # Chowdhury et al. 2024, arXiv:2403.00409
        loss = (e * logsigmoid(-h) - (1 - e) * logsigmoid(h)) / (1 - 2 * e)
    elif loss_type == "bco_pair":  # Jung et al. 2024, arXiv:2404.04656
        loss = -logsigmoid(chosen) - logsigmoid(-rejected)
    elif loss_type == "sppo_hard":  # Wu et al. 2024, arXiv:2405.00675, equation 4.7
        loss = (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2
    elif loss_type == "apo_zero":  # D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7
        loss = 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)
    elif loss_type == "apo_down":  # the same, equation 8
        loss = torch.sigmoid(chosen) + 1 - torch.sigmoid(h)
    else:  # discopop: Lu et al. 2024, arXiv:2406.08414, equation 5
        gate = torch.sigmoid(h / discopop_tau)
        loss = -logsigmoid(h) * (1 - gate) + torch.exp(-h) * gate
    return loss.mean(), rewards
