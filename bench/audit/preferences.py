"""What bench/gpu_audit.py launches of kernels/triton/preferences.py."""

import torch

DTYPES = (torch.float32,)  # the public functions make fp32 of everything
SIZES = (16, 512, 4099, 1)
VARIANTS = ("sigmoid", "robust", "hinge", "ipo")


def pairs(n):
    skip = n % 2  # odd ones are not aligned
    return [torch.zeros(n + skip)[skip:] for _ in range(4)]


def launches(ops, dtype):
    """{op: [(function, args) that differ in all that must not matter]}."""
    calls = {}
    for n in SIZES:
        coef, numbers = torch.tensor([0.01 * (n % 3)]), torch.tensor([0.1 * n, 0.1 * (n % 3)])
        chosen, rejected, margin, _ = pairs(n)
        for name, m, needs_grad in (("", None, True), ("[margin]", margin, True), ("[no gradient]", None, False)):
            call = ops.pairwise_reward_loss, (chosen, rejected, m, coef, needs_grad)
            calls.setdefault(f"pairwise_reward_loss{name}", []).append(call)
        for i, variant in enumerate(VARIANTS):
            call = ops.dpo_loss, (*pairs(n), numbers, i, True)
            calls.setdefault(f"dpo_loss[{variant}]", []).append(call)
    return calls
