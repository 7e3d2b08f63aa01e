"""A token from each row of logits, with its log-probability."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrlhf import backends  # noqa: F401  (loads the ops)
from fastrlhf.functional import _checks as check
from fastrlhf.functional._autograd import checked_once

ops = torch.ops.fastrlhf


def sample_tokens(
    logits: Tensor,
    *,
    seed: int | Tensor,
    sequence: Tensor,
    position: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draw a token from each row, and give its log-prob under softmax(logits / temperature), unfiltered.

    logits: [B, V], fp32, bf16 or fp16; rows may be strided, the last dimension contiguous.
    seed: an int in [0, 2^63), or int64 [B]. sequence, position: [B], int64: which sequence a row belongs to and where
        in it the token will stand. The three are all that the random number hangs on, and the number and the row are
        all that the token hangs on: not the other rows of the batch, nor the number of threads.
    temperature: a positive normal fp32 number, or 0 for the most likely token (the first of equals), whose log-prob is
        then given at temperature 1.
    top_k: keep the k most likely tokens; 0 keeps all. Under torch.compile, a new k compiles anew. top_p: of those, keep
        the fewest most likely ones with a mass of at least top_p (Holtzman et al. 2020). min_p: of those, keep the ones
        at least min_p times as likely as the most likely (Nguyen et al. 2024). Tokens as likely as the last one kept
        are kept too.
    Returns (tokens [B] int64, log_probs [B] fp32 in nats); no gradient. The log-probs are those of `token_log_probs`,
    to the bit on CPU. Raises ValueError on shapes, dtypes, devices and options that don't match, and on CPU for a row
    without a distribution (a nan, +inf, nothing but -inf); elsewhere such a row's log-prob is nan.

    One uniform number u in [0, 1) with 53 bits a row, by Philox4x32-10 (Salmon et al. 2011) with the seed as key and
    (position, sequence) as counter. The token is the first one, in the order of the vocabulary, at which the sum of the
    kept probabilities exceeds u times all of it: no noise as wide as the vocabulary exists.
    """
    check.tensor("logits", logits, dims=2)
    check.vocabulary("logits", logits)
    rows = logits.shape[:1]
    if isinstance(seed, Tensor):
        _per_row("seed", seed, logits)
    elif isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed!r}, wanted an int in [0, 2^63) or a tensor")
    else:
        seed = torch.full(rows, seed, dtype=torch.int64, device=logits.device)
    _per_row("sequence", sequence, logits)
    _per_row("position", position, logits)
    with torch.no_grad():
        return ops.sample_tokens(logits, seed, sequence, position, *_options(temperature, top_k, top_p, min_p))


def _per_row(name: str, x: Tensor, logits: Tensor) -> None:
    check.tensor(name, x, dtypes=(torch.int64,))
    check.same_device(name, x, "logits", logits)
    if x.shape != logits.shape[:1]:
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, wanted {tuple(logits.shape[:1])}, one for each row of logits"
        )


@checked_once
def _options(temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, int]:
    """As the raw op takes them."""
    if isinstance(temperature, bool) or temperature != 0:
        check.temperature(temperature)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k < 2**63:
        raise ValueError(f"top_k: got {top_k!r}, wanted an int in [0, 2^63) (0 keeps all)")
    check.number("top_p", top_p, least=check.FP32.tiny, most=1)
    check.number("min_p", min_p, least=0, most=1)
    return check.scalars(temperature, top_p, min_p), top_k


def _shapes(logits, seed, sequence, position, numbers, top_k):
    return torch.empty_like(sequence), logits.new_empty(logits.shape[:1], dtype=torch.float32)


torch.library.register_fake("fastrlhf::sample_tokens", _shapes)
