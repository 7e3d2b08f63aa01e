"""How far log-probs, entropies and gradients are from fp64: ours, eager PyTorch in the same dtype, and the peers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrlhf.bench.peers import contenders
from fastrlhf.bench.settings import FLOATS, Setting, generator, sizes

OP = "token_log_probs_and_entropy"
SCALES = (1, 10, 100)
RESULTS = ("log_prob", "entropy", "gradient")


def measure(setting: Setting) -> list[dict[str, Any]]:
    """One row for each dtype and scale: {contender: {result: largest absolute error}}.

    Logits are drawn from a normal distribution of deviation 1, 10 and 100 and rounded to the dtype first, so that
    everybody, fp64 included, starts from the same numbers. The gradient is that of the log-probs and the entropies
    with random weights, relative to its largest entry.
    """
    random, shape = generator(setting), (min(setting.rows, 256), setting.vocabularies[0])
    on_device = {"generator": random, "device": setting.device}
    tokens = torch.randint(shape[1], shape[:1], **on_device)
    grads = [torch.randn(shape[0], **on_device) for _ in range(2)]
    rows = []
    for dtype in ("fp32", "bf16"):
        for scale in SCALES:
            logits = (scale * torch.randn(shape, **on_device)).to(FLOATS[dtype])
            exact = _exact(logits.double(), tokens, [g.double() for g in grads])
            errors = {}
            for name, run in contenders(OP).items():
                if isinstance(run, str) or run.compiled:
                    errors[name] = {"cannot": run if isinstance(run, str) else "the formulas of eager"}
                    continue
                try:
                    errors[name] = _errors(run.ready(), logits, tokens, grads, exact)
                except Exception as error:  # a peer's failure is a result
                    errors[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            rows.append({"shape": sizes(*shape), "dtype": dtype, "scale": scale, "results": errors})
    return rows


def _exact(logits: Tensor, tokens: Tensor, grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """In fp64, by the closed formula of the gradient."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    gradient = -p * grads[0][:, None] - grads[1][:, None] * p * (log_p + entropy[:, None])
    gradient.scatter_add_(1, tokens[:, None], grads[0][:, None])
    return log_p.gather(1, tokens[:, None])[:, 0], entropy, gradient


def _errors(work, logits: Tensor, tokens: Tensor, grads: list[Tensor], exact: tuple[Tensor, ...]) -> dict[str, float]:
    leaf = logits.clone().requires_grad_()
    log_probs, entropy = work(leaf, tokens)
    (gradient,) = torch.autograd.grad(
        [(x.float() * g).sum() for x, g in zip((log_probs, entropy), grads, strict=True)], leaf
    )
    errors = [(x.detach().double() - y).abs().max() for x, y in zip((log_probs, entropy, gradient), exact, strict=True)]
    errors[2] = errors[2] / exact[2].abs().max()
    return dict(zip(RESULTS, map(float, errors), strict=True))
