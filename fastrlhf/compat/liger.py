"""Liger (https://github.com/linkedin/Liger-Kernel), 0.8.4 and 0.8.5: GRPO and DPO, from hidden states and from logits.

Liger's functions from logits are Triton kernels for GPUs; ours run on CPU as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastrlhf import functional as F
from fastrlhf.compat import _liger_grpo as grpo
from fastrlhf.compat._heads import in_one_dtype
from fastrlhf.compat._liger_dpo import LigerFusedLinearDPOLoss, liger_fused_linear_dpo
from fastrlhf.compat._patch import original
from fastrlhf.functional._checks import FLOATS

PACKAGE = "liger_kernel"
DISTRIBUTION = "liger-kernel"
VERSIONS = ">=0.8.4,<0.8.6"
CHUNKED = "liger_kernel.chunked_loss"
BASE = f"{CHUNKED}.fused_linear_ppo.LigerFusedLinearPPOBase"


def liger_fused_linear_grpo(
    _input: Tensor,
    weight: Tensor,
    selected_token_ids: Tensor,
    attention_mask: Tensor,
    advantages: Tensor,
    bias: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    beta: float = 0.04,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    temperature: float = 1.0,
    compiled: bool = True,
    use_ref_model: bool = True,
    chunk_size: int = 1,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    num_items_in_batch: float | Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """GRPO and its relatives, from hidden states, with no logits in memory.

    _input [B, T, H], weight [V, H], bias [V], selected_token_ids and attention_mask [B, T], advantages [B]; log-probs
    of the old policy and of the reference [B, T], or the reference's own hidden states and head. vllm_is_ratio: [B],
    [B, 1] or [B, T]. compiled and chunk_size are not needed: nothing is compiled, and the batch is one chunk.
    Returns (loss, metrics): the KL to the reference, where beta is not 0, and the fraction that was clipped. Gradient
    to _input, weight and bias. Where the formula is that of `linear_ppo_loss`, it costs three products, else four.
    """
    options = grpo.GRPO(
        *(loss_type, importance_sampling_level, beta, epsilon_low, epsilon_high, delta, use_bias_correction_kl),
        *(sapo_temperature_pos, sapo_temperature_neg, vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg),
        max_completion_length,
    )
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise ValueError("max_completion_length: got None, wanted a number, because loss_type='dr_grpo'")
    if use_ref_model and ref_per_token_logps is None and ref_input is None:
        raise ValueError("ref_per_token_logps: got None, as is ref_input; wanted one, because use_ref_model=True")
    mask, ratio = attention_mask, grpo.as_columns(vllm_is_ratio, attention_mask)
    # luspo sums over the masked tokens too.
    counts = torch.ones_like(mask, dtype=torch.bool) if loss_type == "luspo" else mask != 0
    tokens = torch.where(counts, selected_token_ids, -100)
    head = in_one_dtype(_input, weight, bias)
    ref = ref_per_token_logps if use_ref_model else None
    if use_ref_model and ref is None:
        with torch.no_grad():
            ref = _log_probs(*in_one_dtype(ref_input, ref_weight, ref_bias), tokens, temperature)
    ref, old = (None if x is None else torch.where(counts, x.float(), 0.0) for x in (ref, old_per_token_logps))
    if options.is_ppo and old is not None and (beta == 0.0 or ref is not None):
        return _by_linear_ppo_loss(
            head, tokens, old, ref, advantages, mask, ratio, temperature, options, num_items_in_batch
        )
    log_probs = _log_probs(*head, tokens, temperature)
    per_token, kl, clipped = options.per_token(log_probs, old, ref, advantages, mask, ratio)
    loss = options.reduce(per_token, mask, num_items_in_batch)
    return loss, tuple(grpo.masked_mean(x, mask) for x in (kl, clipped) if x is not None)


def _by_linear_ppo_loss(head, tokens, old, ref, advantages, mask, ratio, temperature, options, num_items_in_batch):
    """The same for a clipped ratio of tokens: the gradients are ready with the loss."""
    hidden, weight, bias = head
    loss, stats = F.linear_ppo_loss(
        *(hidden, weight, tokens, old, advantages[:, None].expand_as(tokens).float(), mask),
        bias=bias,
        temperature=temperature,
        clip_low=options.epsilon_low,
        clip_high=options.epsilon_high,
        log_ratio_clamp=None,
        weights=None if ratio is None else ratio.float().expand_as(tokens),
        ref_log_probs=ref if options.beta else None,
        kl_coef=options.beta,
        aggregation="seq-mean-token-mean" if options.loss_type == "grpo" else "token-mean",
        denominator=options.denominator(mask, num_items_in_batch),
    )
    return loss, (*((stats.kl,) if options.beta else ()), stats.clip_fraction)


class LigerFusedLinearGRPOLoss(nn.Module):
    """`liger_fused_linear_grpo` with its options kept; `forward` takes the tensors."""

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        options = dict(locals())
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "delta"):
            if options[name] is not None and options[name] <= 0:
                raise ValueError(f"{name}: got {options[name]}, wanted a positive number")
        self._options = [name for name in options if name not in ("self", "__class__")]
        for name in self._options:
            setattr(self, name, options[name])

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return liger_fused_linear_grpo(
            *(_input, lin_weight, selected_token_ids, attention_mask, advantages, bias, ref_per_token_logps),
            *(old_per_token_logps, ref_input, ref_weight, ref_bias),
            vllm_is_ratio=vllm_is_ratio,
            num_items_in_batch=num_items_in_batch,
            **{name: getattr(self, name) for name in self._options},
        )


def chunk_forward(
    input_chunk: Tensor,
    weight: Tensor,
    selected_token_ids: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """LigerFusedLinearPPOBase.chunk_forward: log-probs [B, T] in fp32 from hidden states [B, T, H]."""
    if input_chunk.dtype not in FLOATS:
        return original(f"{BASE}.chunk_forward")(input_chunk, weight, selected_token_ids, bias, temperature)
    return _log_probs(*in_one_dtype(input_chunk, weight, bias), selected_token_ids, temperature)


def one_chunk(cls, ctx, _input: Tensor, *args, chunk_size: int = 1, **options):
    """LigerFusedLinearPPOBase.forward. Its chunks keep the logits small; `chunk_forward` has none, so one is enough."""
    return original(f"{BASE}.forward")(cls, ctx, _input, *args, chunk_size=max(1, _input.shape[0]), **options)


def _log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float) -> Tensor:
    return F.linear_token_log_probs(hidden, weight, tokens, bias=bias, temperature=temperature)


@torch.no_grad()
def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """Log-probs [B, L] in fp32, without gradient, of the last L of input_ids, from logits [B, L + 1, V]."""
    length = logits.shape[1] - 1
    tokens = input_ids[:, -length:]
    if mask is not None:
        tokens = torch.where(mask[:, -length:] != 0, tokens, -100)
    return F.token_log_probs(logits[:, :-1], tokens, temperature=temperature)


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: float | Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
):
    """GRPO and its relatives from logits [B, L + 1, V], of which the last position of each row is not used.

    completion_ids, old_logp, ref_logp, completion_mask: [B, L]; advantages [B]; vllm_is_ratio as above.
    inplace: the gradient is written over the logits, where they are the result of an operation.
    Returns (loss, KL or None, clipped), each [B, L] and 0 under the mask; with reduce (loss, [KL, if beta is not 0,
    clipped fraction]). Gradient to the logits.
    """
    options = grpo.GRPO(
        *(loss_type, importance_sampling_level, beta, eps_low, eps_high, delta, use_bias_correction_kl),
        *(sapo_temperature_pos, sapo_temperature_neg, vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg),
        max_completion_length or completion_ids.shape[1],
    )
    counts = torch.ones_like(completion_ids, dtype=torch.bool) if completion_mask is None else completion_mask != 0
    # With a last token to ignore the logits need not be sliced, and their gradient has all of their shape.
    tokens = nn.functional.pad(torch.where(counts, completion_ids, -100), (0, 1), value=-100)
    inplace = inplace and torch.is_grad_enabled() and logits.requires_grad and not logits.is_leaf
    log_probs = F.token_log_probs(logits, tokens, temperature=temperature, inplace_backward=inplace)[:, :-1]
    old, ref = (None if x is None else torch.where(counts, x.float(), 0.0) for x in (old_logp, ref_logp))
    mask, ratio = counts.float(), grpo.as_columns(vllm_is_ratio, counts)
    per_token, kl, clipped = options.per_token(log_probs, old, ref, advantages, mask, ratio)
    per_token, clipped = (x.expand_as(mask) * mask for x in (per_token, clipped))
    kl = None if kl is None else kl * mask
    if not reduce:
        return per_token, kl, clipped
    metrics = [grpo.masked_mean(x, mask) for x in (kl, clipped) if x is not None]
    return options.reduce(per_token, mask, num_items_in_batch), metrics


REPLACEMENTS = {
    f"{CHUNKED}.grpo_loss.LigerFusedLinearGRPOLoss": LigerFusedLinearGRPOLoss,
    f"{CHUNKED}.functional.liger_fused_linear_grpo": liger_fused_linear_grpo,
    f"{BASE}.chunk_forward": chunk_forward,
    f"{BASE}.forward": one_chunk,
    f"{CHUNKED}.dpo_loss.LigerFusedLinearDPOLoss": LigerFusedLinearDPOLoss,
    f"{CHUNKED}.functional.liger_fused_linear_dpo": liger_fused_linear_dpo,
    "liger_kernel.ops.grpo_loss.fused_selective_log_softmax": fused_selective_log_softmax,
    "liger_kernel.transformers.grpo_loss.triton_grpo_loss": triton_grpo_loss,
}
_PRODUCTS = "logits in fp32, and the weight's gradient summed in fp32, where Liger rounds both to the inputs' dtype"
MORE_ACCURATE = dict.fromkeys([place for place in REPLACEMENTS if place.startswith(CHUNKED)], _PRODUCTS)
