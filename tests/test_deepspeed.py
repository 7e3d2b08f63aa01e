"""Two processes under DeepSpeed's ZeRO (gloo, CPU) against one without it and with twice the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_worker import RANKS, REFUSED, RESUMED, RUNS, alone, results
from peft import PeftModel
from safetensors.torch import load_file
from test_distributed import LOGGED, close, equal, flat
from tiny import free_port, save_tiny_models
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

# Beside the environment, where it changes nothing of what other tests import.
DEEPSPEED = Path(sys.prefix) / "deepspeed"

if not DEEPSPEED.is_dir():
    pytest.skip("DeepSpeed is not installed; `make .venv/.deepspeed` does that", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    save_tiny_models(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """What each process found."""
    port = free_port()
    worker = Path(__file__).with_name("deepspeed_worker.py")
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(DEEPSPEED)}
    processes = []
    for rank in range(RANKS):
        with (folder / f"{rank}.log").open("wb") as log:
            command = [sys.executable, worker, str(rank), str(port), folder]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    for rank, process in enumerate(processes):
        failed = process.wait() and (folder / f"{rank}.log").read_text()[-3000:]
        if failed:
            for other in processes:
                other.kill()
            pytest.fail(failed)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def by_one(folder):
    return {name: results(folder, name) for name in sorted(set(map(alone, RUNS)))}


@pytest.mark.parametrize("name", [name for name in RUNS if "bf16" not in name and "engine" not in name])
def test_as_one_process_with_twice_the_batch(ranks, by_one, name):
    """Losses, norms of gradients, weights and, of PPO, responses and what the iterations leave behind."""
    one, ppo = by_one[alone(name)], name.startswith("ppo")
    both = [found[name] for found in ranks]
    for mine in both:
        for ours, theirs in zip(mine["log"], one["log"], strict=True):
            for key in ("learning_rate", *(LOGGED if ppo else ("loss", "grad_norm"))):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
        close(mine["weights"], one["weights"], rtol=1e-4, atol=5e-5)
        if ppo:
            for part, state in mine["state"].items():
                assert flat(state) == pytest.approx(flat(one["state"][part]), rel=1e-5)
        else:
            assert mine["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    if ppo:
        together = [first + second for first, second in zip(*(mine["responses"] for mine in both), strict=True)]
        assert together == one["responses"]
    equal(both[0]["weights"], both[1]["weights"])


@pytest.mark.parametrize("name", [name for name in RUNS if "bf16" in name])
def test_bf16_weights_have_fp32_masters(ranks, by_one, name):
    """To the roundings of bf16, 2^-9: of weights, activations and gradients, but not of what the optimizer adds to.

    The steps are of up to 0.01 and the weights of up to 0.1, so what a step were without masters would show.
    """
    both, one = [found[name] for found in ranks], by_one[alone(name)]
    for mine in both:
        steps = list(zip(mine["log"], one["log"], strict=True))
        for ours, theirs in steps[:1] if name.startswith("ppo") else steps:  # later responses may be others
            for key in ("loss", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=2e-2), key
        if not name.startswith("ppo"):
            close(mine["weights"], one["weights"], rtol=2**-7, atol=5e-3)
            assert mine["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-3)
    equal(both[0]["weights"], both[1]["weights"])


def test_transformers_sample_from_whole_weights(ranks):
    """At the start, from the reference's."""
    for found in ranks:
        log = found["ppo, zero 3, transformers engine"]["log"]
        assert log[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
        assert abs(log[-1]["objective/kl"]) > 1e-4


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_where_the_uninterrupted_one_did(ranks, name):
    for found in ranks:
        equal(found[name]["resumed"], found[name]["weights"])


@pytest.mark.parametrize("name", RUNS)
def test_saved_whole(folder, ranks, by_one, name):
    """As one process saves it with transformers or peft, and as the weights that were trained."""
    saved, wanted = folder / name / "final", folder / alone(name) / "final"
    assert {file.name for file in saved.iterdir()} == {file.name for file in wanted.iterdir()}
    for file in wanted.rglob("*.safetensors"):
        assert load_file(saved / file.relative_to(wanted)).keys() == load_file(file).keys()
    trained = ranks[0][name]["weights"]
    if "reward" in name:
        equal(dict(AutoModelForSequenceClassification.from_pretrained(saved).named_parameters()), trained)
        return
    model = AutoModelForCausalLM.from_pretrained(folder / "model" if "lora" in name else saved, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, saved) if "lora" in name else model
    equal(
        dict(model.named_parameters()), {n.removeprefix("model."): p for n, p in trained.items() if n[:6] == "model."}
    )
    if "value_head.weight" in trained:
        head = load_file(saved / "value_head.safetensors")
        equal(
            {name: x.float() for name, x in head.items()}, {n: trained[f"value_head.{n}"] for n in ("weight", "bias")}
        )


@pytest.mark.parametrize("name", [name for name in RUNS if "zero 3" in name])
def test_zero_3_shards(ranks, by_one, name):
    assert all(found[name]["numel"] == 0 for found in ranks)
    assert by_one[alone(name)]["numel"] > 0


@pytest.mark.parametrize("what", [*REFUSED, "sharded by ZeRO 3 while it was loaded"])
def test_what_would_train_wrongly_is_refused(ranks, what):
    for found in ranks:
        assert what in found["refusals"][what]
