"""How far log-probs, entropies and gradients are from fp64: ours, eager PyTorch in the same dtype, and the peers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrlhf.bench.peers import contenders
from fastrlhf.bench.settings import FLOATS, Setting, generator, sizes

OP, LINEAR = "token_log_probs_and_entropy", "linear_token_log_probs_and_entropy"
SCALES = (1, 10, 100)
RESULTS = ("log_prob", "entropy", "gradient")


def measure(setting: Setting) -> list[dict[str, Any]]:
    """One row for each op, dtype and scale: {contender: {result: largest absolute error}}.

    Logits of deviation 1, 10 and 100, or the hidden states and weights of such logits, are drawn from a normal
    distribution and rounded to the dtype first, so that everybody, fp64 included, starts from the same numbers. The
    gradient is that of the log-probs and the entropies with random factors, relative to its largest entry; of hidden
    states and weights, the worse of the two.
    """
    random, rows = generator(setting), []
    n, vocabulary, size = min(setting.rows, 256), setting.vocabularies[0], setting.lm_heads[0][1]
    on_device = {"generator": random, "device": setting.device}
    tokens = torch.randint(vocabulary, (n,), **on_device)
    grads = [torch.randn(n, **on_device) for _ in range(2)]
    for op in (OP, LINEAR):
        shapes = [(n, vocabulary)] if op == OP else [(n, size), (vocabulary, size)]
        deviation = 1 if op == OP else size**-0.5
        for dtype in ("fp32", "bf16"):
            for scale in SCALES:
                leaves = [torch.randn(shape, **on_device) for shape in shapes]
                leaves[-1] *= scale * deviation
                leaves = [x.to(FLOATS[dtype]) for x in leaves]
                about = {"op": op, "shape": sizes(n, vocabulary), "dtype": dtype, "scale": scale}
                rows.append(about | {"results": _of_everyone(op, leaves, tokens, grads)})
    return rows


def _of_everyone(op: str, leaves: list[Tensor], tokens: Tensor, grads: list[Tensor]) -> dict[str, dict[str, Any]]:
    exact = _exact([x.double() for x in leaves], tokens, [g.double() for g in grads])
    errors = {}
    for name, run in contenders(op).items():
        if isinstance(run, str) or run.compiled:
            errors[name] = {"cannot": run if isinstance(run, str) else "the formulas of eager"}
            continue
        try:
            errors[name] = _errors(run.ready(), leaves, tokens, grads, exact)
        except Exception as error:  # a peer's failure is a result
            errors[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return errors


def _exact(leaves: list[Tensor], tokens: Tensor, grads: list[Tensor]) -> tuple[Tensor, ...]:
    """In fp64, by the closed formula of the gradient: log-prob, entropy, and the gradient of each leaf."""
    log_p = (leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].T).log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    gradient = -p * grads[0][:, None] - grads[1][:, None] * p * (log_p + entropy[:, None])
    gradient.scatter_add_(1, tokens[:, None], grads[0][:, None])
    of_leaves = [gradient] if len(leaves) == 1 else [gradient @ leaves[1], gradient.T @ leaves[0]]
    return log_p.gather(1, tokens[:, None])[:, 0], entropy, *of_leaves


def _errors(work, leaves: list[Tensor], tokens: Tensor, grads: list[Tensor], exact: tuple) -> dict[str, float]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    results = work(*leaves, tokens)
    gradients = torch.autograd.grad([(x.float() * g).sum() for x, g in zip(results, grads, strict=True)], leaves)
    errors = [(x.detach().double() - y).abs().max() for x, y in zip((*results, *gradients), exact, strict=True)]
    relative = [error / y.abs().max() for error, y in zip(errors[2:], exact[2:], strict=True)]
    return dict(zip(RESULTS, map(float, (*errors[:2], max(relative))), strict=True))
