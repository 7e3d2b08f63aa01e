"""verl's log-probs and entropies, from logits and from hidden states. `fastrlhf.compat.verl` says more about verl."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor, nn

from fastrlhf import functional as F
from fastrlhf.compat._common import cast, entropy, rows
from fastrlhf.compat._patch import original
from fastrlhf.functional._checks import FLOATS

FUNCTIONAL = "verl.utils.torch_functional"
FUSED = "verl.utils.experimental.torch_functional.FusedLinearForPPO"
KERNEL = "verl.utils.kernel.linear_cross_entropy.linear_cross_entropy"

REDUCTIONS = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}


def logprobs_from_logits(
    logits: Tensor, labels: Tensor, inplace_backward: bool = True, *, exact_dtype: bool = False
) -> Tensor:
    """Log-probability of each label: [..., V] and [...] to [...], fp32; with exact_dtype in the dtype of the logits.

    inplace_backward: allows the gradient to be written over the logits. It is where verl does so, with flash-attn
        installed, on GPUs.
    """
    if logits.dtype not in FLOATS or labels.shape != logits.shape[:-1]:
        return original(f"{FUNCTIONAL}.logprobs_from_logits")(logits, labels, inplace_backward)
    over = inplace_backward and logits.is_cuda and logits.is_contiguous() and logits._base is None
    over = over and not (logits.is_leaf and logits.requires_grad) and _flash_attn()
    log_probs = F.token_log_probs(rows(logits), labels.long(), inplace_backward=over)
    return cast(log_probs, exact_dtype and not _flash_attn(), logits)


def _flash_attn() -> bool:
    """Whether verl would take flash-attn's cross-entropy, which returns fp32 and may write over the logits."""
    disabled = os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") == "1"
    return not disabled and importlib.util.find_spec("flash_attn") is not None


def entropy_from_logits(logits: Tensor, *, exact_dtype: bool = False) -> Tensor:
    """Entropy of softmax(logits), in nats: [..., V] to [...], fp32; with exact_dtype in the dtype of the logits."""
    if logits.dtype not in FLOATS:
        return original(f"{FUNCTIONAL}.entropy_from_logits")(logits)
    return cast(entropy(logits), exact_dtype, logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """`entropy_from_logits`, fp32. chunk_size is not needed: there is no copy of the logits to keep small."""
    if logits.dtype not in FLOATS:
        return original(f"{FUNCTIONAL}.entropy_from_logits_with_chunking")(logits, chunk_size)
    return entropy(logits)


class FusedLinearForPPO(nn.Module):
    """Log-probs and entropies from hidden states. chunk_size is not needed, and both backends are ours."""

    exact_dtype = False

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"impl_backend: got {impl_backend!r}, wanted 'torch' or 'liger'")
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy) of hidden_states [..., H] and vocab_weights [V, H] at input_ids [...], fp32.

        With exact_dtype the entropy has the dtype of the hidden states.
        """
        if hidden_states.dtype not in FLOATS:
            theirs = original(FUSED)(self.chunk_size, self.impl_backend)
            return theirs(hidden_states, vocab_weights, input_ids, temperature)
        log_probs, entropies = F.linear_token_log_probs_and_entropy(
            hidden_states, vocab_weights, input_ids.long(), temperature=temperature
        )
        return log_probs, cast(entropies, self.exact_dtype, hidden_states)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs [N], or their sum or mean; entropies [N]) of N tokens, fp32.

    hidden: [..., H]. weight: [V, H], with a dist_process_group this rank's rows. labels: [...].
    """
    if reduction.lower() not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, wanted 'none', 'sum' or 'mean'")
    hidden, group = hidden.reshape(-1, hidden.shape[-1]), dist_process_group
    if group is not None and hidden.requires_grad:
        # verl leaves the sum over the ranks to Megatron, which makes one of what we have summed already.
        hidden = hidden.view_as(hidden)
        hidden.register_hook(lambda grad: grad / torch.distributed.get_world_size(group))
    log_probs, entropies = F.linear_token_log_probs_and_entropy(
        hidden, weight, labels.reshape(-1).long(), temperature=temperature, group=group
    )
    return REDUCTIONS[reduction.lower()](log_probs), entropies
