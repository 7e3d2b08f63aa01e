"""How the tests of the ops judge numbers: by the reference in fp64, with at most twice the error of eager PyTorch."""

import torch

EPS = torch.finfo(torch.float32).eps  # 1.2e-7
MIXED_SHAPES = ((3, 1), (1, 2), (7, 1009), (2, 2048), (5, 2049), (3, 4, 131), (2, 50257))


def worst(x: torch.Tensor, exact: torch.Tensor) -> float:
    return (x.double() - exact).abs().max().item() if x.numel() else 0.0


def assert_as_good_as_eager(ours, eager, exact, slack: float, name: str = "result") -> None:
    """At most twice eager PyTorch's worst error in the same dtype, plus an epsilon derived where the test stands."""
    limit = 2 * worst(eager, exact) + slack
    assert worst(ours, exact) <= limit, f"{name}: error {worst(ours, exact):.3g}, allowed {limit:.3g}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def random_logits(*shape, dtype=torch.float32, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, generator=generator) * scale).to(dtype)
    tokens = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return logits, tokens


def random_tokenwise(count: int, *shape, seed=0):
    """`count` tensors of log-probability-like numbers and a mask with about a third of zeros."""
    generator = torch.Generator().manual_seed(seed)
    base = -3 * torch.rand(*shape, generator=generator)
    others = [base + 0.4 * torch.randn(*shape, generator=generator) for _ in range(count - 1)]
    return base, *others, torch.rand(*shape, generator=generator) > 0.33


def poison(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x with nan, inf and -inf by turns under the zeros of the mask."""
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")])[torch.arange(x.numel()) % 3].reshape(x.shape)
    return torch.where(mask, x, bad.to(x.dtype))


def peak_allocation(function) -> int:
    """Bytes that the hungriest single op (with the ops inside it) allocates on CPU during function()."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return max((event.cpu_memory_usage for event in profiler.events()), default=0)
