"""Two processes (gloo, CPU) against one with twice the batch."""

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from distributed_worker import (
    DPO_RUNS,
    PPO_RUNS,
    RANKS,
    REWARD_RUNS,
    SAMPLING,
    SFT_RUNS,
    dpo,
    main,
    ppo,
    reward,
    rollouts,
    sft,
    steps_of,
    weights,
)
from peft import PeftModel
from safetensors.torch import load_file
from tiny import free_port, save_tiny_models, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fastrlhf import functional as F
from fastrlhf.rollout import create_engine
from fastrlhf.trainers.reductions import any_rank, gather_varying, global_advantage_stats, max_over_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_models(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """What each process found."""
    port = free_port()
    mp.spawn(main, (port, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def close(ours, wanted, **tolerances):
    assert ours.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(ours[name], x, **tolerances, msg=lambda text, name=name: f"{name}: {text}")


def equal(ours, wanted):
    close(ours, wanted, rtol=0, atol=0)


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
            assert torch.equal(gathered, rows)
            assert mine == own[name][rank]


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
    assert rows is x
    assert own == slice(0, 2)
    assert global_advantage_stats(stats, x[None], x[None], accelerator) is stats
    assert any_rank(True, accelerator) is True
    assert max_over_ranks(2, accelerator) == 2


def kind(name):
    return next((kind for kind in ("tied", "lora", "bf16") if kind in name), "plain")


@pytest.fixture(scope="module")
def alone(folder):
    """The runs of one process with twice the batch."""
    options = {"plain": {}, "tied": {}, "lora": {}, "bf16": {"dtype": "bfloat16"}}
    return {name: sft(folder, folder / "alone" / name, **each) for name, each in options.items()}


@pytest.mark.parametrize("name", SFT_RUNS)
def test_sft_is_that_of_one_process_with_twice_the_batch(ranks, alone, name):
    """Losses, norms of gradients and weights: a wrong normaliser or clip shows (TRL #3021, #5890; verl #3741)."""
    one, bf16 = alone[kind(name)], "bf16" in name
    for results in ranks:
        mine = results["sfts"][name]
        for ours, theirs in zip(mine["log"], steps_of(one), strict=True):
            for key in ("loss", "grad_norm", "learning_rate", "step"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-2 if bf16 else 1e-5), key
        # The sum of two halves has another rounding: 1e-7 of a gradient near 1, by epsilon 1e-3, four steps of 0.01.
        # In bf16, gradients have 2^-9, and so have the weights in the end.
        close(mine["weights"], weights(one.scorer.model), **({"rtol": 2**-7, "atol": 1e-3} if bf16 else CLOSE))
        assert mine["loss"] == pytest.approx(one.evaluate(one.train_dataset)["eval_loss"], rel=1e-3 if bf16 else 1e-5)
        assert mine["sharded"] == {"fsdp" in name}
    equal(ranks[0]["sfts"][name]["weights"], ranks[1]["sfts"][name]["weights"])


@pytest.mark.parametrize("name", SFT_RUNS)
def test_a_resumed_run_ends_where_the_uninterrupted_one_did(ranks, name):
    for results in ranks:
        equal(results["sfts"][name]["resumed"], results["sfts"][name]["weights"])


@pytest.mark.parametrize("name", SFT_RUNS)
def test_saved_whole(folder, ranks, alone, name):
    """As one process saves it with transformers or peft: no shards, no second copy of tied weights."""
    saved, by_one = folder / name / "final", folder / "alone" / kind(name) / "final"
    assert {file.name for file in saved.iterdir()} == {file.name for file in by_one.iterdir()}
    (file,) = saved.glob("*.safetensors")
    assert load_file(file).keys() == load_file(by_one / file.name).keys()
    model = AutoModelForCausalLM.from_pretrained(folder / "model" if "lora" in name else saved, dtype="auto")
    if "lora" in name:
        model = PeftModel.from_pretrained(model, saved)
    equal(weights(model), ranks[0]["sfts"][name]["weights"])


def test_other_ways_to_shard_are_refused(ranks):
    for results in ranks:
        for message, said in zip(
            results["refusals"],
            ("SHARDED_STATE_DICT", "over GPUs, not over cpu"),
            strict=True,
        ):
            assert said in message


def test_forwards_give_log_probs_in_fp32(ranks):
    for results in ranks:
        assert results["casts"].dtype == torch.float32
        assert not torch.equal(results["casts"], results["casts"].bfloat16().float())


@pytest.mark.parametrize("name", ["fsdp, tied", "fsdp, lora"])
def test_engines_sample_from_whole_weights(folder, ranks, name):
    """The responses of a model that has the weights of the time and was never sharded."""
    tokenizer = tiny_tokenizer(pad_is_eos=False)
    for results in ranks:
        for step in results["engines"][name]["steps"]:
            assert step["whole"] == {torch.nn.Parameter}
            assert step["sharded"] == {True}
            model = LlamaForCausalLM.from_pretrained(folder / ("tied" if "tied" in name else "model"))
            model.load_state_dict(step["weights"], strict="lora" in name)
            for engine, (responses, log_probs) in zip(("native", "transformers"), step["responses"], strict=True):
                wanted = create_engine(engine, model, tokenizer).generate(results["engines"]["prompts"], SAMPLING)
                assert responses == wanted.responses
                torch.testing.assert_close(log_probs, wanted.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["fsdp, tied", "fsdp, lora"])
def test_rollouts_change_nothing_of_the_training(ranks, name):
    for results in ranks:
        equal(results["engines"][name]["weights"], results["sfts"][name]["weights"])


def test_exported_weights_are_whole(ranks):
    for results in ranks:
        ours = results["engines"]["fsdp, tied"]
        equal(ours["exported"], ours["weights"])


PPO_WAYS = [f"{way}, {name}" for name in PPO_RUNS for way in ("ddp", "fsdp")]
LOGGED = (
    *("loss", "grad_norm", "objective/kl", "objective/scores", "objective/kl_coef", "objective/rlhf_reward"),
    *("loss/policy_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio", "rollout/length"),
)


@pytest.fixture(scope="module")
def ppo_alone(folder):
    return {name: ppo(folder, folder / "alone" / name) for name in PPO_RUNS}


def flat(state):
    """{"outer.inner": number} of dictionaries in a dictionary."""
    inner = {key: flat(x) if isinstance(x, dict) else {"": x} for key, x in state.items()}
    return {f"{key}.{name}": x for key, numbers in inner.items() for name, x in numbers.items()}


@pytest.mark.parametrize("name", PPO_WAYS)
def test_ppo_is_that_of_one_process_with_twice_the_batch(ranks, ppo_alone, name):
    """The same responses, statistics over all of them, losses and weights."""
    one, responses = ppo_alone[name.split(", ")[1]]
    both = [results["ppos"][name] for results in ranks]
    for mine in both:
        for ours, theirs in zip(mine["log"], steps_of(one), strict=True):
            for key in LOGGED:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
        close(mine["weights"], weights(one.scorer), rtol=1e-4, atol=5e-5)
        for part, state in mine["state"].items():
            alone = one._stateful()[part].state_dict()
            assert flat(state) == pytest.approx(flat(alone), rel=1e-5)
        assert mine["sharded"] == {"fsdp" in name} or "fsdp" in name
    equal(both[0]["weights"], both[1]["weights"])
    assert [first + second for first, second in zip(*(mine["responses"] for mine in both), strict=True)] == responses


@pytest.mark.parametrize("name", PPO_WAYS)
def test_resumed_ppo_ends_where_the_uninterrupted_one_did(ranks, name):
    for results in ranks:
        equal(results["ppos"][name]["resumed"], results["ppos"][name]["weights"])


@pytest.mark.parametrize("name", DPO_RUNS)
def test_dpo_is_that_of_one_process_with_twice_the_batch(folder, ranks, name):
    """Reference log-probs, each block of pairs computed by one of the ranks; losses, metrics and weights."""
    one = dpo(folder, folder / "alone" / f"dpo, {name}")
    metrics = one.evaluate()
    for results in ranks:
        mine = results["dpos"][name]
        assert mine["reference"] == list(one.train_dataset["ref_chosen_logps"])
        assert mine["blocks"] == 6 + 2  # of 3 pairs, for training and for evaluation
        for ours, theirs in zip(mine["log"], steps_of(one), strict=True):
            for key in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
        for key in ("eval_loss", "eval_rewards/margins", "eval_logps/rejected"):
            assert mine["eval"][key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-5), key
        close(mine["weights"], weights(one.scorer.model), **CLOSE)
        equal(mine["resumed"], mine["weights"])


@pytest.mark.parametrize("name", REWARD_RUNS)
def test_reward_models_are_those_of_one_process_with_twice_the_batch(folder, ranks, name):
    """Packed texts, and padded ones; pairs, heads of an ensemble, and steps, of which ranks have different numbers."""
    alone = f"reward, {name.removeprefix('fsdp').removeprefix('ddp')}"
    one = reward(folder, folder / "alone" / alone, **({"num_heads": 3} if "heads" in name else {}))
    metrics = one.evaluate()
    for results in ranks:
        mine = results["rewards"][name]
        assert mine["packed"] == ("padded" not in name)
        assert mine["sharded"] == {"fsdp" in name}
        for ours, theirs in zip(mine["log"], steps_of(one), strict=True):
            for key in ("loss", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
        for key in ("eval_loss", "eval_accuracy", "eval_ece"):
            assert mine["eval"][key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-5), key
        close(mine["weights"], weights(one.model), **CLOSE)
        equal(mine["resumed"], mine["weights"])
