"""Two processes (gloo, CPU) against one with twice the batch."""

import socket

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from distributed_worker import RANKS, main, rollouts

from fastrlhf import functional as F
from fastrlhf.trainers.reductions import any_rank, gather_varying, global_advantage_stats, max_over_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(main, (port, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def test_rows_of_different_counts(ranks):
    wanted = {
        "rows": torch.tensor([[0.0, 1], [10, 11], [12, 13], [14, 15]]),
        "some": torch.ones(2, 2),
        "none": torch.zeros(0, 2),
    }
    own = {"rows": [slice(0, 1), slice(1, 4)], "some": [slice(0, 0), slice(0, 2)], "none": [slice(0, 0)] * 2}
    for rank, results in enumerate(ranks):
        for name, rows in wanted.items():
            gathered, mine = results["reductions"][name]
            assert torch.equal(gathered, rows) and mine == own[name][rank]


def test_advantages_are_whitened_by_the_tokens_of_all_ranks(ranks):
    (scores, *first), (more, *second) = rollouts()
    both = [torch.cat([x, torch.nn.functional.pad(y, (0, 3))]) for x, y in zip(first, second, strict=True)]
    whole = F.rollout_advantages(torch.cat([scores, more]), *both, kl_coef=0.1).advantage_stats
    for results in ranks:
        torch.testing.assert_close(results["reductions"]["stats"], whole, rtol=1e-6, atol=1e-7)


def test_flags_and_numbers(ranks):
    for results in ranks:
        assert results["reductions"]["any"] == [False, True, True]
        assert results["reductions"]["max"] == 3
        assert results["reductions"]["mean"].tolist() == [1.5, 3.0]


def test_one_process_gets_back_what_it_gave():
    accelerator = Accelerator(cpu=True)
    x, stats = torch.ones(2), torch.ones(2)
    rows, own = gather_varying(x, accelerator)
    assert rows is x and own == slice(0, 2)
    assert global_advantage_stats(stats, x[None], x[None], accelerator) is stats
    assert any_rank(True, accelerator) is True and max_over_ranks(2, accelerator) == 2
