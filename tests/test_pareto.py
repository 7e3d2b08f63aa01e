"""The Pareto front of policies with several objectives."""

import json

import pytest
import torch

from fastrlhf.cli import main
from fastrlhf.rewards.pareto import pareto_front, pareto_table, run_objectives


def test_front_by_hand():
    points = torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [2.0, 1.0], [1.0, 3.0]])
    assert pareto_front(points).tolist() == [True, True, True, False, True]


def test_front_by_definition():
    points = torch.randint(0, 4, (60, 3)).float()

    def dominated(i):
        return any((q >= points[i]).all() and (q > points[i]).any() for q in points)

    assert pareto_front(points).tolist() == [not dominated(i) for i in range(60)]


def test_bad_points():
    with pytest.raises(ValueError, match=r"got shape \(2,\)"):
        pareto_front(torch.ones(2))
    with pytest.raises(ValueError, match="without NaN"):
        pareto_front(torch.tensor([[float("nan")]]))


def test_table():
    table = pareto_table({"a": {"x": 1.0, "y": 0.5}, "b": {"x": 2.0, "y": 0.25}, "c": {"x": 0.5, "y": 0.5}}, ["x", "y"])
    assert table.splitlines()[2:] == [
        "| b | 2.000 | 0.250 | ● |",
        "| a | 1.000 | 0.500 | ● |",
        "| c | 0.500 | 0.500 |  |",
    ]
    with pytest.raises(ValueError, match="a has no finite y; it has x"):
        pareto_table({"a": {"x": 1.0}}, ["x", "y"])


def test_runs_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, kl in (("near", 1.0), ("far", 5.0), ("wild", 9.0)):
        (tmp_path / name).mkdir()
        records = [{"step": i, "rewards/kind": min(kl, 6.0) * i, "objective/kl": kl} for i in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*records, {"step": 2}]))
    flags = ["--objectives", "rewards/kind", "objective/kl:min", "--last", "1", "--output_dir", "out"]
    assert main(["pareto", "--runs", "near", "far", "wild", *flags]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2:] == [
        "| wild | 12.000 | -9.000 | ● |",
        "| far | 10.000 | -5.000 | ● |",
        "| near | 2.000 | -1.000 | ● |",
    ]
    assert json.loads((tmp_path / "out" / "pareto.json").read_text())["near"] == {
        "rewards/kind": 2.0,
        "objective/kl:min": -1.0,
    }
    assert run_objectives("near", ["rewards/kind"]) == {"rewards/kind": 1.5}
    with pytest.raises(ValueError, match=r"no record has x; there are objective/kl, rewards/kind, step"):
        run_objectives("near", ["x"])
    with pytest.raises(FileNotFoundError, match="a run's output_dir is wanted"):
        run_objectives("gone", ["x"])
