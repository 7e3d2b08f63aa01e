"""`bench compat`: on its inputs, ours and the framework's own give the same; and the way from its rows to the page."""

from __future__ import annotations

import pytest
import torch
from compat_peers import PEERS

from fastrlhf.bench import compat, compat_training, readme, records
from fastrlhf.bench.measure import Contender, Stopwatch
from fastrlhf.bench.settings import TINY

MASKED = ("compute_gae_advantage_return", "get_advantages_and_returns")
pytestmark = pytest.mark.usefixtures("peers")


@pytest.fixture(scope="module")
def rows(peers):
    return list(compat.rows(TINY))


def test_the_same_results(rows):
    compared, mask = 0, compat.INPUTS[compat.TOKENS](TINY)["mask"]
    for row in rows:
        ours, theirs = row.contenders[compat.OURS], row.contenders[compat.THEIRS]
        if isinstance(theirs, str):
            assert not (PEERS / "trl").is_dir() or "not installed" not in theirs
            continue
        results = [list(tensors(x.work(x.prepare()))) for x in (ours, theirs)]
        for a, b in zip(*results, strict=True):
            if a.shape == mask.shape and row.op in MASKED:
                a, b = a * mask, b * mask  # under the mask, ours has 0, and theirs what was left
            torch.testing.assert_close(a.float(), b.float(), atol=1e-4, rtol=1e-3)
        compared += 1
    if (PEERS / "trl").is_dir():
        assert compared == len(compat.SWAPS)


def tensors(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for part in x:
            yield from tensors(part)


def test_the_targets_of_the_issue(rows):
    wanted = {
        "selective_log_softmax": 5,
        "selective_log_softmax_and_entropy": 20,
        "compute_gae_advantage_return": 100,
        "compute_policy_loss_vanilla": 30,
        "get_advantages_and_returns": 50,
        "PolicyLoss": 30,
        "log_probs_from_logits": 10,
        "generalized_advantage_estimate": 40,
        "LigerFusedLinearGRPOLoss": 1.8,
    }
    assert {row.op: row.targets[compat.THEIRS] for row in rows if row.op in wanted} == wanted


def test_from_rows_to_the_page(monkeypatch, tmp_path):
    run = {"ms": [9.0, 2.0, 2.0], "peak_mib": 500.0, "bound": 6, "logs": [{"loss": 2.0}]}
    monkeypatch.setattr(compat_training, "run", lambda plan: run | {"ms": [9.0, 4.0 - 2 * plan.patched]})
    swaps = [
        compat.Row("f", "TRL `f`", "2 × 3", "fp32", {compat.OURS: fake(), compat.THEIRS: "not installed"}, None, {}),
        compat.Row(
            "g", "TRL `g`", "2 × 3", "fp32", {compat.OURS: fake(), compat.THEIRS: fake()}, None, {"unpatched": 99}
        ),
    ]
    monkeypatch.setattr(compat, "rows", lambda setting: iter(swaps))
    monkeypatch.setattr(compat, "roll_call", lambda: {"TRL": {"version": "1.16.0"}})
    content = {**records.environment("cpu"), "family": "compat", "peers": {}, "complete": True}
    content["rows"] = list(compat.measured(TINY, Stopwatch(), None))
    assert [row["op"] for row in content["rows"]] == ["f", "g", "TRL SFT", "TRL DPO", "TRL GRPO"]
    records.write(tmp_path / "device" / "compat.json", content)
    page = readme.with_tables("a\n<!-- compat tables -->\nold\n<!-- /compat tables -->\nb\n", tmp_path)
    assert (
        "| a step of TRL's GRPOTrainer, 4 × 16 tokens, vocabulary 300 | 2 ms | 4 ms | 2× | 500 | 500 | 0e+00 |" in page
    )
    assert "× [99]" in page
    assert "old" not in page
    for block in page.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    assert readme.compat_tables(tmp_path / "nowhere") == readme.NOTHING


def fake() -> Contender:
    return Contender(lambda _: torch.ones(1))


def test_trainings_that_logged_nothing_in_common_are_an_error():
    with pytest.raises(ValueError, match="nothing that can be compared"):
        compat_training.difference([{"loss": 1.0}], [{"other": 1.0}])
    assert compat_training.difference([{"loss": 1.0}, {"loss": 0.0}], [{"loss": 1.1}, {"loss": 1e-6}]) == pytest.approx(
        0.1 / 1.1
    )


def test_a_training_that_fails_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="SFT's process ended"):
        compat_training.run(compat_training.Plan("SFT", False, TINY.training, 0))
