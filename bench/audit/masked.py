"""What bench/gpu_audit.py launches of kernels/triton/masked.py."""

import torch

DTYPES = (torch.float32,)  # others are converted before they get here


def launches(ops, dtype):
    """{op: [(function, args) that differ in all that must not matter]}."""

    def rows(R, C, skip=0):
        x = torch.zeros(R, C + skip, dtype=dtype)[:, skip:]
        return x, torch.ones(x.shape, dtype=torch.bool)

    cases = [rows(512, 1024), rows(1, 4096), rows(1, 1_000_000), rows(3, 8191), rows(1, 1), rows(2, 100, skip=1)]
    eps = torch.tensor(1e-8)
    return {
        "masked_mean": [(ops.masked_mean, case) for case in cases],
        "masked_whiten": [(ops.masked_whiten, (*case, i % 2 == 0, i % 3 == 0, eps)) for i, case in enumerate(cases)],
    }
