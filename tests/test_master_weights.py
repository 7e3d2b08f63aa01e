"""fp32 masters behind half-precision weights."""

import pytest
import torch
from torch import nn

from fastrlhf.trainers.master_weights import MasterWeights

AdamW = MasterWeights.over(torch.optim.AdamW)
SGD = MasterWeights.over(torch.optim.SGD)


def test_updates_below_a_bf16_ulp_are_not_lost():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = SGD([weight], lr=1e-3)  # bf16 next to 1 has steps of 2^-8 = 3.9e-3
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    torch.testing.assert_close(weight.float(), torch.full((3,), 0.9), rtol=0, atol=2**-9)


def test_fp32_parameters_are_stepped_as_they_are():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    theirs.load_state_dict(ours.state_dict())
    a, b = AdamW(ours.parameters(), lr=0.1), torch.optim.AdamW(theirs.parameters(), lr=0.1)
    for _ in range(3):
        for model, optimizer in ((ours, a), (theirs, b)):
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(ours.weight, theirs.weight)


def test_a_scheduler_reaches_the_masters():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = SGD([{"params": [weight], "weight_decay": 0.0}], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        scheduler.step()
    assert weight.tolist() == [-1, -1]


def test_state_continues_bit_for_bit():
    def run(steps, optimizer, weight):
        for step in steps:
            weight.grad = torch.full_like(weight, 0.01 * (step + 1))
            optimizer.step()

    start = torch.linspace(-1, 1, 7).bfloat16()
    straight = nn.Parameter(start.clone())
    run(range(10), AdamW([straight], lr=1e-3), straight)

    first = nn.Parameter(start.clone())
    optimizer = AdamW([first], lr=1e-3)
    run(range(5), optimizer, first)
    second = nn.Parameter(first.detach().clone())
    resumed = AdamW([second], lr=1e-3)
    resumed.load_state_dict(optimizer.state_dict())
    run(range(5, 10), resumed, second)
    assert torch.equal(straight, second)
    assert torch.equal(resumed.pairs[0][1].bfloat16(), second)


def test_state_of_fp32_weights_is_refused():
    plain = nn.Parameter(torch.zeros(2))
    plain.grad = torch.ones(2)
    saved = torch.optim.AdamW([plain])
    saved.step()
    half = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="none fp32 master weights where this optimizer has 1"):
        AdamW([half]).load_state_dict(saved.state_dict())


def test_zero_grad():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = SGD([weight], lr=1.0)
    weight.grad = torch.ones_like(weight)
    optimizer.zero_grad()
    assert weight.grad is None
