"""TRL (https://github.com/huggingface/trl), 1.12 to 1.16.

TRL's PPO, whose last release is 1.12, is replaced as a whole by `fastrlhf.PPOTrainer`; of it, only the masked
statistics are here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf import functional as F
from fastrlhf.compat._common import cast, entropy, rows
from fastrlhf.compat._heads import in_one_dtype, mean_logit
from fastrlhf.compat._patch import original
from fastrlhf.functional._checks import FLOATS

PACKAGE = "trl"
VERSIONS = ">=1.12,<1.17"
UTILS = "trl.trainer.utils"
PPO = "trl.experimental.ppo.ppo_trainer"

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
ROWS_BYTES = 28 << 20  # of logits at a time, for the outputs that need all of them


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    *,
    exact_dtype: bool = False,
) -> Tensor:
    """Log-probability of each index under softmax(logits / temperature).

    logits: [..., V]. index: [...], or [..., K] for K of each row. row_mask: [...], a row under a 0 is not read: 0.
    Returns the shape of index, fp32; with exact_dtype in the dtype of the logits.
    """
    _check(temperature)
    if not _ours(logits, index, row_mask):
        options = {} if temperature == 1.0 and row_mask is None else {"temperature": temperature, "row_mask": row_mask}
        return original(f"{UTILS}.selective_log_softmax")(logits, index, **options)
    log_probs = F.token_log_probs(rows(logits), _only(index, row_mask), temperature=temperature)
    return cast(log_probs, exact_dtype, logits)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128, *, exact_dtype: bool = False) -> Tensor:
    """Entropy of softmax(logits), in nats: [..., V] to [...], fp32; with exact_dtype in the dtype of the logits.

    chunk_size is not needed: there is no copy of the logits to keep small.
    """
    if logits.dtype not in FLOATS:
        return original(f"{UTILS}.entropy_from_logits")(logits, chunk_size)
    return cast(entropy(logits), exact_dtype, logits)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    *,
    exact_dtype: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both of softmax(logits / temperature), in one pass; arguments and dtypes as of `selective_log_softmax`.

    entropy_requires_grad: False cuts the entropy off the graph.
    """
    _check(temperature)
    if not _ours(logits, index, row_mask):
        theirs = original(f"{UTILS}.selective_log_softmax_and_entropy")
        return theirs(logits, index, entropy_requires_grad, temperature, row_mask)
    results = F.token_log_probs_and_entropy(rows(logits), _only(index, row_mask), temperature=temperature)
    log_probs, entropies = (cast(x, exact_dtype, logits) for x in results)
    return log_probs, entropies if entropy_requires_grad else entropies.detach()


def _check(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature}, wanted a positive number")


def _ours(logits: Tensor, index: Tensor, row_mask: Tensor | None) -> bool:
    """Whether there is one index to a row, in dtypes that our kernels take."""
    shapes = (index.shape, *(() if row_mask is None else (row_mask.shape,)))
    return logits.dtype in FLOATS and all(shape == logits.shape[:-1] for shape in shapes)


def _only(index: Tensor, row_mask: Tensor | None) -> Tensor:
    return index if row_mask is None else torch.where(row_mask == 0, -100, index)


class ChunkedLogProbFunction:
    """What `add_fused_lm_head` (1.15 and later) scores tokens with: log-probs from hidden states."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of z = softcap tanh(scale x W^T / softcap) / T.

        hidden [N, H], weight [V, H], bias [V], targets [N]; chunk_size is not needed. Each result is [N], fp32 (is_top1
        bool), or None if `outputs` does not ask for it; the first two carry gradient. The last three cost a product
        more, of which log-probs and entropy need none in memory; without a softcap, mean_logits costs nothing.
        """
        if _theirs(hidden, weight, logit_scale):
            theirs = original("trl.kernels.chunked_logprob.ChunkedLogProbFunction")
            rest = (chunk_size, final_logit_softcapping, logit_scale, outputs)
            return theirs.apply(hidden, weight, bias, targets, temperature, *rest)
        head = _head(hidden, weight, bias, temperature, final_logit_softcapping, logit_scale)
        log_probs, entropy = _log_probs(*head, targets, "entropy" in outputs)
        more = _more(*head, targets, outputs)
        return log_probs, entropy, *(more.get(name) for name in OPTIONAL_OUTPUTS[1:])


class _ChunkedLogProbFunction:
    """The same in 1.12 to 1.14: log-probs and entropies."""

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, *rest) -> tuple[Tensor, Tensor]:
        """apply(hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale).

        1.12 has no bias, and no gradient of the entropy.
        """
        has_bias = rest[0] is None or rest[0].is_floating_point()
        bias, targets, temperature, _, *optional = rest if has_bias else (None, *rest)
        softcap, scale, *_ = (*optional, *(None, 1.0)[len(optional) :])
        if _theirs(hidden, weight, scale):
            return original(f"{UTILS}._ChunkedLogProbFunction").apply(hidden, weight, *rest)
        return _log_probs(*_head(hidden, weight, bias, temperature, softcap, scale), targets, True)


def _theirs(hidden: Tensor, weight: Tensor, scale: float) -> bool:
    """What is left to TRL: fp64, and heads that ZeRO-3 gathers for the backward pass."""
    return hidden.dtype not in FLOATS or hasattr(weight, "ds_id") or scale <= 0


def _head(hidden, weight, bias, temperature, softcap, scale) -> tuple:
    """(hidden, weight, bias) in one dtype, temperature, softcap. A scale of the logits is a part of the last two."""
    scaled_softcap = None if softcap is None else softcap / scale
    return *in_one_dtype(hidden, weight, bias), temperature / scale, scaled_softcap


def _log_probs(hidden, weight, bias, temperature, softcap, targets, with_entropy) -> tuple[Tensor, Tensor | None]:
    options = {"bias": bias, "temperature": temperature, "softcap": softcap}
    if with_entropy:
        return F.linear_token_log_probs_and_entropy(hidden, weight, targets, **options)
    return F.linear_token_log_probs(hidden, weight, targets, **options), None


@torch.no_grad()
def _more(hidden, weight, bias, temperature, softcap, targets, outputs) -> dict[str, Tensor]:
    """Of log_sum_sq_probs, mean_logits and is_top1 those that `outputs` names."""
    wanted = [name for name in OPTIONAL_OUTPUTS[1:] if name in outputs]
    if wanted == ["mean_logits"] and softcap is None:
        return {"mean_logits": mean_logit(hidden, weight, bias) / temperature}
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    count = max(128, ROWS_BYTES // (4 * weight.shape[0]))
    for x, y in zip(hidden.split(count), targets.split(count), strict=True) if wanted else ():
        logits = torch.nn.functional.linear(x, weight, bias).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if "is_top1" in parts:
            parts["is_top1"].append(logits.argmax(-1) == y)
        if "mean_logits" in parts:
            parts["mean_logits"].append(logits.mean(-1) / temperature)
        if "log_sum_sq_probs" in parts:
            logits /= temperature
            parts["log_sum_sq_probs"].append((2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1))
    return {name: torch.cat(found) for name, found in parts.items()}


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean where the mask is 1, over everything or along axis; nan where it is 1 nowhere."""
    if values.dtype not in FLOATS or mask.dtype != torch.bool or mask.shape != values.shape or isinstance(axis, tuple):
        return original(f"{PPO}.masked_mean")(values, mask, axis)
    count = mask.sum() if axis is None else mask.sum(axis)
    return torch.where(count == 0, torch.nan, F.masked_mean(values, mask, axis)).to(values.dtype)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance where the mask is 1. unbiased: divided by n - 1. Raises ValueError if the mask is 1 nowhere."""
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    if unbiased:
        count = mask.sum()
        if count == 0:
            raise ValueError("mask: got no 1 in it, wanted at least two; a larger mini-batch may have them")
        variance = variance * (count / (count - 1))
    return variance


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """All values, whitened by mean and unbiased variance of those where the mask is 1."""
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return whitened if shift_mean else whitened + mean


REPLACEMENTS = {
    f"{UTILS}.selective_log_softmax": selective_log_softmax,
    f"{UTILS}.entropy_from_logits": entropy_from_logits,
    f"{UTILS}.selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
    f"{UTILS}._ChunkedLogProbFunction": _ChunkedLogProbFunction,
    "trl.kernels.chunked_logprob.ChunkedLogProbFunction": ChunkedLogProbFunction,
    f"{PPO}.masked_mean": masked_mean,
    f"{PPO}.masked_var": masked_var,
    f"{PPO}.masked_whiten": masked_whiten,
}
OPTIONAL = {
    f"{UTILS}.selective_log_softmax_and_entropy": ">=1.14",
    f"{UTILS}._ChunkedLogProbFunction": "<1.15",
    "trl.kernels.chunked_logprob.ChunkedLogProbFunction": ">=1.15",
    **dict.fromkeys((f"{PPO}.masked_mean", f"{PPO}.masked_var", f"{PPO}.masked_whiten"), "<1.13"),
}
_ROUNDED = "fp32 inside and out; on CPU, TRL rounds every log-probability to the dtype of the logits"
_PRODUCTS = "log-probs from products in fp32, which TRL rounds to the dtype of the hidden states"
MORE_ACCURATE = {
    f"{UTILS}.selective_log_softmax": _ROUNDED,
    f"{UTILS}.entropy_from_logits": f"{_ROUNDED}; an impossible token adds 0, not nan",
    f"{UTILS}.selective_log_softmax_and_entropy": f"{_ROUNDED}; an impossible token adds 0, not nan",
    f"{UTILS}._ChunkedLogProbFunction": f"{_PRODUCTS}; the entropy has a gradient in 1.12 too",
    "trl.kernels.chunked_logprob.ChunkedLogProbFunction": _PRODUCTS,
}
