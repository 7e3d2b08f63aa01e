"""Attention of packed sequences, each to itself, in models of transformers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from fastrlhf.packing import Packing

NAME = "fastrlhf_packed"
HALF = (torch.bfloat16, torch.float16)
# On CPU in bf16 and fp16, rows below this length cost SDPA 3 to 5 times (forward and backward) what two products and a
# softmax cost: from 192 queries on it takes blocks that suit those dtypes. In fp32 it is never much slower.
SHORT_ROW = 192


class _Current(threading.local):  # autograd recomputes checkpointed layers in threads of its own
    packing: Packing | None = None
    kind: str = ""


_current = _Current()


def packed_attention(model: nn.Module) -> str:
    """Which attention packed sequences get in `model` as it is now, autocast included.

    "flash_attention_2": flash-attn's varlen kernel, on CUDA in bf16 and fp16 where it is installed.
    "padded_sdpa": torch's scaled_dot_product_attention, or with a softcap and for rows shorter than SHORT_ROW on CPU in
        bf16 and fp16, matrix products and a softmax in fp32; both on rows that are padded for the attention alone.
    """
    weight = next(model.parameters())
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if device == "cuda" and dtype in HALF and is_flash_attn_2_available():
        return "flash_attention_2"
    return "padded_sdpa"


@contextmanager
def packed(model: nn.Module, packing: Packing) -> Iterator[None]:
    """Inside it, `model` takes one row of packed sequences: its attention is that of `packing`.

    Layers under activation checkpointing, of transformers or of torch, have it again when the backward pass recomputes
    them. Outside, the model's own attention is as it was.
    """
    modules = list(model.modules())
    configs = {id(m.config): m.config for m in modules if isinstance(getattr(m, "config", None), PreTrainedConfig)}
    kind = packed_attention(model)

    @contextmanager
    def attending() -> Iterator[None]:
        own = [config._attn_implementation_internal for config in configs.values()]
        before = _current.packing, _current.kind
        _current.packing, _current.kind = packing, kind
        for config in configs.values():
            config._attn_implementation_internal = NAME  # the setter would spread it to other models' configurations
        try:
            yield
        finally:
            _current.packing, _current.kind = before
            for config, name in zip(configs.values(), own, strict=True):
                config._attn_implementation_internal = name

    def also_when_recomputed(checkpoint: Callable) -> Callable:
        def checkpoint_packed(function: Callable, *args: Any, **kwargs: Any) -> Any:
            def layer(*args: Any, **kwargs: Any) -> Any:
                with attending():
                    return function(*args, **kwargs)

            return checkpoint(layer, *args, **kwargs)

        return checkpoint_packed

    names = ("_gradient_checkpointing_func", "checkpoint_fn")
    checkpoints = [(vars(m), name, vars(m)[name]) for m in modules for name in names if vars(m).get(name)]
    for attributes, name, checkpoint in checkpoints:
        attributes[name] = also_when_recomputed(checkpoint)
    try:
        with attending():
            yield
    finally:
        for attributes, name, checkpoint in checkpoints:
            attributes[name] = checkpoint


def packed_mask(
    *, mask_function: Callable, device: torch.device, local_size: int | None = None, use_vmap: bool = False, **_: Any
) -> Tensor | None:
    """The mask [1, 1, L, L] of the longest packed sequence, of which those of the others are corners; None if it is
    causal and no more."""
    begin, longest = _current.packing.longest
    causal = not use_vmap and (local_size is None or local_size >= longest)
    if causal or _current.kind == "flash_attention_2":  # which is told its window with every call
        return None
    return sdpa_mask(
        batch_size=1,
        q_length=longest,
        kv_length=longest,
        q_offset=begin,
        kv_offset=begin,
        mask_function=mask_function,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query: [1, h, N, d], key: [1, g, N, d], value: [1, g, N, e], of packed tokens, where g divides h.

    attention_mask: what `packed_mask` made. Returns [1, N, h, e].
    """
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: attention of packed sequences has none")
    packing = _current.packing
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, d]
    # What sequences share is in each of them for the attention alone.
    query, key, value = (packing.by_sequence(x) for x in (query, key, value))
    if _current.kind == "flash_attention_2":
        out = _flash_attention(query, key, value, packing, dropout, scaling, sliding_window, softcap)
        return packing.from_sequences(out)[None], None

    blocks = zip(*(_to_blocks(x, packing) for x in (query, key, value)), strict=True)
    out = []
    for q, k, v in blocks:
        length = q.shape[1]
        mask = None if attention_mask is None else attention_mask[..., :length, :length]
        slow_sdpa = v.device.type == "cpu" and v.dtype in HALF and length < SHORT_ROW
        if softcap is not None or slow_sdpa:
            x = _eager_attention(q, k, v, mask, dropout, scaling, softcap)
        else:
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            x, _ = sdpa_attention_forward(module, *heads_first, mask, dropout, scaling, is_causal=mask is None)
        out.append(x.flatten(0, 1))
    out = out[0] if len(out) == 1 else torch.cat(out)
    places = packing.rows.places
    out = out if places is None else _FromSlots.apply(out, packing.rows.slots, places)
    return packing.from_sequences(out)[None], None


AttentionInterface.register(NAME, packed_attention_forward)
AttentionMaskInterface.register(NAME, packed_mask)


def _to_blocks(x: Tensor, packing: Packing) -> list[Tensor]:
    """[N, heads, d] as one [rows, longest, heads, d] for each block of `packing.rows`."""
    rows = packing.rows
    if rows.slots is not None:
        x = _ToSlots.apply(x, rows.slots, rows.places)
    blocks = x.split([count * longest for count, longest in rows.shapes])
    return [block.unflatten(0, shape) for block, shape in zip(blocks, rows.shapes, strict=True)]


class _ToSlots(torch.autograd.Function):
    """x[slots]. Of the gradient, what stands in the padding is left out: causal rows have none there."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _FromSlots(torch.autograd.Function):
    """x[places]; the gradient of the padding is 0."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.slots = len(slots)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.new_zeros(ctx.slots, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None, None


def _eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """[rows, L, h, e] of query [rows, L, h, d], key [rows, L, g, d] and value [rows, L, g, e]; softmax in fp32.

    The h / g query heads of a key head stand below each other in one product, so that no key is repeated.
    """
    rows, length, heads, _ = query.shape
    groups = key.shape[2]
    each = heads // groups
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    bias = torch.zeros(length, length, dtype=value.dtype, device=query.device)
    bias = bias.masked_fill(~mask.view(length, length), float("-inf")).repeat(each, 1)

    query = query.unflatten(2, (groups, each)).permute(0, 2, 3, 1, 4).reshape(rows * groups, each * length, -1)
    key, value = (x.transpose(1, 2).reshape(rows * groups, length, -1) for x in (key, value))
    key = key.transpose(1, 2)
    if softcap is None:
        scores = torch.baddbmm(bias, query, key, alpha=scaling)
    else:
        scores = softcap * torch.tanh(torch.bmm(query, key) * (scaling / softcap)) + bias
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    out = torch.bmm(functional.dropout(weights, dropout), value)
    return out.view(rows, groups, each, length, -1).permute(0, 3, 1, 2, 4).reshape(rows, length, heads, -1)


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    dropout: float,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    longest = packing.longest[1]
    return flash_attn_varlen_func(
        *(x.to(dtype) for x in (query, key, value)),
        cu_seqlens_q=packing.cu_seqlens,
        cu_seqlens_k=packing.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
    )
