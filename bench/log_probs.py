"""token_log_probs against eager PyTorch, interleaved: `python bench/log_probs.py [rows [vocabulary]]`.

Every line: median, min and max of the repetitions, the ratio to ours, and the most memory one call adds. "read" is
torch's maximum over the same bytes, a measure of what reading them once costs.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch

from fastrlhf import backend_table
from fastrlhf import functional as F

REPETITIONS = 9


def eager(logits, tokens):
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(-1, tokens[..., None])[..., 0]


def eager_with_entropy(logits, tokens):
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(-1, tokens[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def forward(function, logits, tokens):
    with torch.no_grad():
        function(logits, tokens)


def forward_backward(function, logits, tokens):
    results = function(logits, tokens)
    torch.autograd.grad(torch.stack(results if isinstance(results, tuple) else (results,)).sum(), logits)


def extra_memory(work) -> float:
    """MiB by which the resident set grew at its highest during work() (Linux; nan elsewhere)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
        before = resident("VmRSS")
        work()
        return (resident("VmHWM") - before) / 1024
    except OSError:
        return float("nan")


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])


def measure(title: str, contenders: dict) -> None:
    """Contenders run A B C, then C B A, and so on, so that nobody has the quiet moments to himself.

    Each is a pair: what prepares its input, untimed, and what is timed on it.
    """
    names = list(contenders)
    times = {name: [] for name in names}
    for name in names:
        prepare, work = contenders[name]
        work(prepare())
    for repetition in range(REPETITIONS):
        for name in names if repetition % 2 == 0 else reversed(names):
            prepare, work = contenders[name]
            logits = prepare()
            start = time.perf_counter()
            work(logits)
            times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: sorted(times[name])[REPETITIONS // 2] for name in names}
    print(f"\n{title}")
    for name in names:
        low, high, ratio = min(times[name]), max(times[name]), medians[name] / medians["ours"]
        prepare, work = contenders[name]
        memory = extra_memory(partial(work, prepare()))
        print(f"  {name:<12}{medians[name]:9.2f} ms  ({low:.2f} to {high:.2f}) {ratio:7.2f}x {memory:9.1f} MiB")


def compare(what: str, ours, theirs, in_place, logits, tokens) -> None:
    scratch = torch.empty_like(logits)
    even = logits.numel() // 2 * 2
    words = logits.flatten()[:even].view(torch.float32)  # one pass over the same bytes

    def as_it_is():
        return logits

    def leaf():
        return logits.detach().requires_grad_()

    def refilled():
        """The same logits as the result of an operation, in memory that the gradient may be written over."""
        anchor = torch.zeros((), dtype=logits.dtype, requires_grad=True)
        return scratch.detach().copy_(logits).add_(anchor)

    measure(
        f"{what}, forward, {logits.dtype}",
        {
            "ours": (as_it_is, lambda x: forward(ours, x, tokens)),
            "eager": (as_it_is, lambda x: forward(theirs, x, tokens)),
            "read": (as_it_is, lambda x: words.amax()),
        },
    )
    measure(
        f"{what}, forward + backward, {logits.dtype}",
        {
            "ours": (leaf, lambda x: forward_backward(ours, x, tokens)),
            "eager": (leaf, lambda x: forward_backward(theirs, x, tokens)),
            "in place": (refilled, lambda x: forward_backward(in_place, x, tokens)),
        },
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=int, nargs="?", default=512)
    parser.add_argument("vocabulary", type=int, nargs="?", default=49152)
    options = parser.parse_args(arguments)
    rows, vocabulary = options.rows, options.vocabulary
    print(f"{rows} x {vocabulary}, {torch.get_num_threads()} threads, {backend_table()['token_log_probs']['cpu']}")
    for dtype in (torch.float32, torch.bfloat16):
        logits, tokens = (3 * torch.randn(rows, vocabulary)).to(dtype), torch.randint(0, vocabulary, (rows,))
        in_place = partial(F.token_log_probs, inplace_backward=True)
        compare("log-probs", F.token_log_probs, eager, in_place, logits, tokens)
        in_place = partial(F.token_log_probs_and_entropy, inplace_backward=True)
        compare("+ entropy", F.token_log_probs_and_entropy, eager_with_entropy, in_place, logits, tokens)


if __name__ == "__main__":
    main()
