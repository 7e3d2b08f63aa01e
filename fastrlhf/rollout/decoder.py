"""A model's forward over rows of tokens and a paged KV cache: prompts, and single tokens of many sequences, in one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrlhf import backends
from fastrlhf.functional.decoding import PAGE, new_cache
from fastrlhf.rollout.architectures import LayerSpec, NotDrivenError, specification
from fastrlhf.rollout.linears import Linear, Norm, PackedLinear, PlainLinear

ops = torch.ops.fastrlhf


class Decoder:
    """Any model that `specification` knows, in `dtype`: that of the products' operands and of the KV cache.

    On CPU, the linear layers run over packed copies of the weights, and everything between them is fp32; elsewhere by
    torch, over the model's own weights and in their dtype. `update` reads the weights; `allocate` makes the cache.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.spec = specification(model)
        self.device = next(model.parameters()).device
        self.packed = self.device.type == "cpu" and not backends.REFERENCE_FORCED
        self.layers = [Layer(spec, self) for spec in self.spec.layers]
        self.head = self.linear([self.spec.head], norm=self.spec.final_norm)
        self.final_norm = Norm(self.spec.final_norm)

    def linear(self, *args, **kwargs) -> Linear:
        return (PackedLinear if self.packed else PlainLinear)(*args, dtype=self.dtype, **kwargs)

    @torch.no_grad()
    def update(self) -> None:
        """Reads the weights of the model as they are now."""
        for layer in self.layers:
            layer.update()
        self.head.update()
        self.final_norm.update()

    def release_weights(self) -> None:
        """Until the next `update`."""
        for layer in self.layers:
            layer.release_weights()
        self.head.release_weights()

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows now: embeddings may be resized."""
        return self.model.config.vocab_size

    def page_bytes(self) -> int:
        """Of the KV cache, for PAGE positions."""
        return len(self.layers) * 2 * PAGE * self.spec.kv_heads * self.spec.head_dim * self.dtype.itemsize

    @torch.no_grad()
    def allocate(self, pages: int, positions: int) -> None:
        """A cache of so many pages, and the rotary angles of so many positions."""
        size = (pages, self.spec.kv_heads, self.spec.head_dim, self.dtype, self.device)
        self.cache = [new_cache(*size) for _ in self.layers]
        at = torch.arange(max(positions, 1), device=self.device)[None]
        self.angles: dict[str | None, tuple[Tensor | None, Tensor | None]] = {None: (None, None)}
        for kind, rope in self.spec.ropes.items():
            cos, sin = rope(at)
            r = cos.shape[-1] // 2
            self.angles[kind] = tuple(x[0, :, :r].float().contiguous() for x in (cos, sin))

    def free(self) -> None:
        self.cache = []

    def copy_page(self, source: int, target: int) -> None:
        for keys, values in self.cache:
            keys[target] = keys[source]
            values[target] = values[source]

    @torch.no_grad()
    def __call__(self, tokens: Tensor, sequence: Tensor, position: Tensor, pages: Tensor) -> Tensor:
        """What stands before the final norm at each of the rows [N, H].

        tokens: [N]. sequence: [N], rows of `pages`. position: [N], each token's place in its sequence; all places
        before it have come earlier, or come in the same call. pages: [sequences, most pages of one], int32.
        On CUDA nothing here waits for the device, so that a call can be captured in a graph.
        """
        x = self.spec.embed(tokens, position)
        x = x.float() if self.packed else x.to(self.dtype)
        where = (pages, sequence, position)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            x = layer(x, cache, where, self.angles[layer.spec.rope])
        return x

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """[N, V], of what a call returned. fp32 on CPU, elsewhere in the decoder's dtype."""
        logits = self.head(x)
        if self.spec.logit_softcap is not None:
            logits = self.spec.logit_softcap * torch.tanh(logits / self.spec.logit_softcap)
        return logits

    @torch.no_grad()
    def check(self) -> None:
        """Raises NotDrivenError if the model gives other logits: its configuration may have what is not known here."""
        length = min(PAGE + 3, self.spec.context or PAGE + 3)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocabulary, (length,), generator=generator).to(self.device)
        self.update()
        self.allocate(2, length)
        pages = torch.tensor([[0, 1]], dtype=torch.int32, device=self.device)
        at = torch.arange(length, device=self.device)
        ours = self.logits(self(tokens, torch.zeros_like(at), at, pages)).float()
        self.free()
        with as_it_generates(self.model):
            wanted = self.model(tokens[None], use_cache=False).logits[0]
        # Rounding of a whole forward, which in 16 bits may be much; a wrong formula is off by as much as the logits.
        tolerance = 1e-3 if self.dtype == wanted.dtype == torch.float32 else 0.3
        good = ours.shape == wanted.shape
        if good:
            finite = wanted.isfinite()
            error = torch.where(ours == wanted, 0.0, ours - wanted.float()).square().mean().sqrt().item()
            good = error <= tolerance * wanted[finite].float().std(correction=0).item()
        if not good:
            raise NotDrivenError(self.model, "its logits are not what the decoder makes of its weights")


@contextmanager
def as_it_generates(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and outside of autocast."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True


class Layer:
    """One block of the decoder."""

    def __init__(self, spec: LayerSpec, decoder: Decoder) -> None:
        self.spec = spec
        mlp_in = [spec.up] if spec.gate is None else [spec.gate, spec.up]
        self.qkv = decoder.linear(spec.qkv, norm=spec.norm)
        self.output = decoder.linear([spec.output])
        self.up = decoder.linear(mlp_in, norm=spec.mlp_norm, activation=spec.activation, gated=spec.gate is not None)
        self.down = decoder.linear([spec.down])
        self.head_norms = [None if norm is None else Norm(norm) for norm in (spec.q_norm, spec.k_norm)]
        self.post_norms = [
            None if norm is None else Norm(norm) for norm in (spec.post_attention_norm, spec.post_mlp_norm)
        ]
        softcap = float("inf") if spec.softcap is None else spec.softcap
        eps = spec.q_norm.eps if spec.q_norm else 0.0
        self.numbers = torch.tensor([spec.scale, softcap, eps], dtype=torch.float32)

    def update(self) -> None:
        for part in (self.qkv, self.output, self.up, self.down, *self.head_norms, *self.post_norms):
            if part is not None:
                part.update()

    def release_weights(self) -> None:
        for linear in (self.qkv, self.output, self.up, self.down):
            linear.release_weights()

    def __call__(
        self, x: Tensor, cache: tuple[Tensor, Tensor], where: tuple[Tensor, ...], angles: tuple[Tensor | None, ...]
    ) -> Tensor:
        q_norm, k_norm = (None if norm is None else norm.weight for norm in self.head_norms)
        mixed = ops.paged_attention(
            self.qkv(x), *cache, *where, *angles, q_norm, k_norm, self.numbers, self.spec.window
        )
        inner = self.up(x) if self.spec.parallel else None
        x = self._add(x, self.output, mixed, self.post_norms[0])
        return self._add(x, self.down, self.up(x) if inner is None else inner, self.post_norms[1])

    @staticmethod
    def _add(x: Tensor, linear: Linear, inputs: Tensor, norm: Norm | None) -> Tensor:
        if norm is None:
            return linear(inputs, residual=x)
        return x + norm(linear(inputs)).to(x.dtype)
