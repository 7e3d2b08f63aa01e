"""What bench/gpu_audit.py launches of kernels/triton/sampling.py."""

import torch


def bytes_needed(dtype):
    """{op: {kernel: [(bytes read, bytes written) for a column, ...]}}.

    The loop over the masses of what the filters leave is not among them: it stores a number a turn.
    """
    one = [(dtype.itemsize, 0)]
    return {
        "sample_tokens": {"_statistics_kernel": one},
        "sample_tokens[filters]": {"_statistics_kernel": one, "_filter_kernel": one},
    }


def launches(ops, dtype):
    """{op: [(function, args) that differ in all that must not matter]}."""

    def rows(V, n=3, skip=0):
        return torch.zeros(n * V + skip, dtype=dtype)[skip:].view(n, V)

    cases = [rows(4096), rows(151_936), rows(50_257), rows(1), rows(16), rows(1000, skip=1), rows(17, n=1)]
    cases += [torch.zeros(3, 40, dtype=dtype)[:, :-1], torch.zeros(1, 300_000, dtype=dtype).expand(70_000, -1)]
    calls = {"sample_tokens": [], "sample_tokens[filters]": []}
    for i, logits in enumerate(cases):
        key = torch.zeros(len(logits), dtype=torch.int64)
        temperature = (1.0, 0.7, 2.0)[i % 3]
        for numbers, top_k in (((temperature, 1.0, 0.0), 0), ((0.0, 1.0, 0.0), 0)):
            calls["sample_tokens"].append((ops.sample_tokens, (logits, key, key, key, torch.tensor(numbers), top_k)))
        for numbers, top_k in (((temperature, 0.9, 0.1), 40), ((temperature, 1.0, 0.05), 0), ((1.0, 0.5, 0.0), 16)):
            args = (logits, key, key, key, torch.tensor(numbers), top_k)
            calls["sample_tokens[filters]"].append((ops.sample_tokens, args))
    return calls
