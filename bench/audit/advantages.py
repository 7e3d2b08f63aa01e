"""What bench/gpu_audit.py launches of kernels/triton/advantages.py."""

import torch

DTYPES = (torch.float32,)  # others are converted before they get here


def launches(ops, dtype):
    """{op: [(function, args) that differ in all that must not matter]}."""

    def rows(B, T, skip=0):
        return torch.zeros(B, T + skip, dtype=dtype)[:, skip:]

    calls = {}

    def add(op, function, *args):
        calls.setdefault(op, []).append((function, args))

    cases = [rows(512, 1024), rows(4, 4096), rows(3, 1000, skip=1), rows(1, 1), rows(2, 1023), rows(70_000, 16)]
    for i, x in enumerate(cases):
        mask, last, mode = torch.ones(x.shape, dtype=torch.bool), torch.zeros(len(x)), i % 3
        discounts = torch.tensor([1.0 - i / 100, 0.95])
        add("gae", ops.gae, x, x, mask, None, discounts, mode % 2)
        add("gae[no mask]", ops.gae, x, x, None, None, discounts, mode)
        add("gae[bootstrap]", ops.gae, x, x, mask, last, discounts, mode % 2)
        options = torch.cat([torch.tensor([i / 10, 5.0]), discounts])
        rollout = (last, x, x, x, mask)
        add("rollout_advantages", ops.rollout_advantages, *rollout, None, None, options, i % 4, mode)
        add("rollout_advantages[all]", ops.rollout_advantages, *rollout, x, last, options, i % 4, mode)
        flat, flat_mask = x.reshape(-1), mask.reshape(-1)
        for ends in (torch.int32, torch.int64):
            ends_of = torch.arange(len(x) + 1).mul(x.shape[1]).to(ends)
            name = f"gae_packed[{str(ends).removeprefix('torch.')}]"
            add(name, ops.gae_packed, flat, flat, ends_of, flat_mask, None, discounts, mode % 2)
    return calls
