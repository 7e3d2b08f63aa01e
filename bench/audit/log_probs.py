"""What bench/gpu_audit.py launches of kernels/triton/log_probs.py."""

import torch


def bytes_needed(dtype):
    """{op: {kernel: [(bytes read, bytes written) for a column, ...]}}."""
    read = dtype.itemsize
    forward, backward = {"_forward_kernel": [(read, 0)]}, {"_backward_kernel": [(read, read)]}
    return {
        "token_log_probs": forward,
        "token_log_probs_and_entropy": forward,
        "token_log_probs_backward": backward,
        "token_log_probs_and_entropy_backward": backward,
    }


def launches(ops, dtype):
    """{op: [(function, args) that differ in all that must not matter]}."""

    def rows(V, n=3, skip=0):
        return torch.zeros(n * V + skip, dtype=dtype)[skip:].view(n, V)

    sliced = torch.zeros(2, 4, 40, dtype=dtype)[:, :-1]
    far = torch.zeros(1, 8, dtype=dtype).expand(2, 70_000, 8)
    cases = [(rows(4096), 1.0), (rows(151_936), 0.7), (rows(50_257), 1), (rows(1), 2.0), (rows(16), 1 / 3)]
    cases += [(rows(1000, skip=1), 1.0), (rows(17, n=1), 0.1), (sliced, 1.0), (far, 1.0)]
    launches = {name: [] for name in vars(ops) if name.startswith("token_log_probs") and not name.endswith("_")}
    for logits, temperature in cases:
        temperature = torch.tensor(temperature)
        tokens = torch.zeros(logits.shape[:-1], dtype=torch.int64)
        x, two = torch.zeros(tokens.shape), torch.zeros(*tokens.shape, 2)
        in_place = logits.clone()
        calls = {
            "token_log_probs": (logits, tokens, temperature),
            "token_log_probs_and_entropy": (logits, tokens, temperature),
            "token_log_probs_backward": (x, logits, tokens, two, temperature),
            "token_log_probs_and_entropy_backward": (x, x, logits, tokens, two, x, temperature),
        }
        for name, args in calls.items():
            launches[name].append((getattr(ops, name), args))
            if name.endswith("backward"):
                args = tuple(in_place if arg is logits else arg for arg in args)
                launches[name].append((getattr(ops, name + "_"), args))
    return launches
