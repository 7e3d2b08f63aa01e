"""What bench/gpu_audit.py launches of kernels/triton/losses.py."""

import math

import torch

DTYPES = (torch.float32,)  # the public functions make fp32 of everything a token wide
TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM, SEQ_MEAN_TOKEN_MEAN = range(3)
_, K2, K3, ABS = range(4)
# One launch up to 64k tokens, two beyond; a batch that starts at an odd address; less than one vector.
SHAPES = ((64, 1024), (129, 1003), (3, 17), (1, 1))
OPTIONS = ((0.2, 0.2, math.inf, 20.0, 0.0, 0.0), (0.1, 0.3, 3.0, 10.0, 0.01, 0.05))
PPO = {  # which of the optional tensors are given, and the options that choose between binaries
    "": {},
    "[everything]": {"given": ("weights", "advantage_stats", "entropy", "ref_log_probs", "denominator")},
    "[sequence mean]": {"given": ("entropy", "ref_log_probs"), "estimator": ABS, "aggregation": SEQ_MEAN_TOKEN_MEAN},
    "[GSPO]": {"given": ("weights", "entropy", "ref_log_probs"), "sequence": True, "aggregation": SEQ_MEAN_TOKEN_MEAN},
    "[no gradient]": {"given": ("entropy", "ref_log_probs"), "estimator": K2, "needs_grad": False},
}
VALUE = {
    "": {"clip": 0.2},
    "[no clip, sequence sum]": {"clip": math.inf, "aggregation": SEQ_MEAN_TOKEN_SUM},
    "[sequence mean]": {"clip": 0.2, "aggregation": SEQ_MEAN_TOKEN_MEAN},
}


def batches():
    for i, (B, T) in enumerate(SHAPES):
        skip = i % 2  # odd ones are not aligned
        floats = [torch.zeros(B * T + skip)[skip:].view(B, T) for _ in range(6)]
        yield floats, torch.ones(B, T, dtype=torch.bool), torch.tensor(OPTIONS[i % 2])


def ppo(ops, given=(), estimator=K3, sequence=False, aggregation=TOKEN_MEAN, needs_grad=True):
    for (log_probs, old, advantages, weights, entropy, ref), mask, options in batches():
        optional = {
            "weights": weights,
            "advantage_stats": torch.ones(2),
            "entropy": entropy,
            "ref_log_probs": ref,
            "denominator": torch.tensor(3.0),
        }
        optional = [x if name in given else None for name, x in optional.items()]
        choices = (estimator, sequence, aggregation, needs_grad)
        yield ops.ppo_loss, (log_probs, old, advantages, mask, *optional, options, *choices)


def value(ops, clip, aggregation=TOKEN_MEAN, needs_grad=True):
    for (values, old, returns, *_), mask, _ in batches():
        old = None if math.isinf(clip) else old
        yield ops.value_loss, (values, old, returns, mask, None, torch.tensor([clip]), aggregation, needs_grad)


def launches(ops, dtype):
    """{op: [(function, args) that differ in all that must not matter]}."""
    calls = {f"ppo_loss{name}": list(ppo(ops, **options)) for name, options in PPO.items()}
    return calls | {f"value_loss{name}": list(value(ops, **options)) for name, options in VALUE.items()}
