"""Reward functions, reward models as functions, normalisation and calibration."""

import logging
import math
import threading
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import CHAT, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from fastrlhf.data import prepare_preferences
from fastrlhf.rewards import (
    RewardError,
    RewardModel,
    Rewards,
    RunningNormalizer,
    expected_calibration_error,
    normalize,
)
from fastrlhf.rewards.text_scores import score_in_fp32


def length(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def constant(prompts, completions, bonus, **columns):
    return bonus


class TestRewards:
    def test_weighted_sum_and_columns(self):
        rewards = Rewards([length, constant], weights=[2.0, 0.5])
        total, each = rewards(["a", "b"], ["xx", "yyy"], {"bonus": [10, 20]})
        assert total.tolist() == [2 * 2 + 5, 2 * 3 + 10]
        assert {name: values.tolist() for name, values in each.items()} == {"length": [2, 3], "constant": [10, 20]}

    def test_numpy_arrays_and_tensors(self):
        for values in (np.array([1.0, 2.0]), torch.tensor([1.0, 2.0])):
            assert Rewards(lambda prompts, completions, v=values: v)(["a", "b"], ["x", "y"], {})[0].tolist() == [1, 2]

    def test_a_partial_has_the_name_of_its_function(self):
        assert Rewards(partial(constant, bonus=[1.0])).names == ["constant"]

    def test_functions_of_one_name_are_told_apart(self):
        assert Rewards([length, length]).names == ["length_0", "length_1"]

    @pytest.mark.parametrize(
        ("returned", "said"),
        [
            ([1.0], "returned 1 rewards for 2 completions"),
            ([1.0, math.nan], "returned nan for completion 1"),
            ([math.inf, 1.0], "returned inf for completion 0"),
            ([1.0, 1e300], r"returned 1e\+300 for completion 1"),
            ([1.0, "good"], r"returned 'good' \(str\) for completion 1, a number is wanted"),
            ([None, 1.0], "returned None"),
            (3.0, "returned float, a list of 2 numbers"),
        ],
    )
    def test_unusable_returns(self, returned, said):
        def judge(prompts, completions, **columns):
            return returned

        with pytest.raises(RewardError, match=f"judge {said}"):
            Rewards(judge)(["a", "b"], ["x", "y"], {})

    def test_a_raising_function_is_named(self):
        def judge(prompts, completions, **columns):
            raise KeyError("lexicon")

        with pytest.raises(RewardError, match="judge raised KeyError: 'lexicon'"):
            Rewards(judge)(["a"], ["x"], {})

    @pytest.mark.parametrize(
        ("funcs", "weights", "said"),
        [([], None, "empty"), ([length], [1, 2], "2 weights for 1"), ([3], None, "int is neither")],
    )
    def test_bad_arguments(self, funcs, weights, said):
        with pytest.raises(ValueError, match=said):
            Rewards(funcs, weights)

    def test_missing_model(self):
        with pytest.raises(OSError, match=r"reward_funcs='nowhere/at-all' could not be loaded"):
            Rewards("nowhere/at-all")

    def test_a_sum_that_overflows(self):
        def huge(prompts, completions, **columns):
            return [1.0, 3e38]

        with pytest.raises(RewardError, match=r"weighted sum for completion 1 is not finite: 2.0 x 3\.0"):
            Rewards(huge, weights=[2.0])(["a", "b"], ["x", "y"], {})


class Judge:
    """A reward function that does on each call what the next of `acts` says: raise it, wait for it, or return 1s."""

    __name__ = "judge"

    def __init__(self, *acts):
        self.acts = list(acts)
        self.calls = 0
        self.threads = []

    def __call__(self, prompts, completions, **columns):
        self.calls += 1
        self.threads.append(threading.current_thread())
        act = self.acts.pop(0) if self.acts else None
        if isinstance(act, BaseException):
            raise act
        if act is not None:
            act.wait()
        return [1.0] * len(completions)


LONG = 600.0  # seconds that no test waits for


@pytest.fixture
def never():
    """An event that is set when the test is over, so that no thread stays."""
    event = threading.Event()
    yield event
    event.set()


class TestFailures:
    ARGUMENTS = (["a"], ["x"], {})

    @pytest.mark.parametrize("timeout", [None, LONG])
    def test_file_and_line_are_said_and_the_cause_is_kept(self, timeout):
        def broken(prompts, completions, **columns):
            return {}["lexicon"]

        with pytest.raises(RewardError, match=r"broken raised KeyError: 'lexicon'") as raised:
            Rewards(broken, timeout=timeout)(*self.ARGUMENTS)
        line = broken.__code__.co_firstlineno + 1
        assert f"{__file__}:{line}, in broken" in str(raised.value)
        assert isinstance(raised.value.__cause__, KeyError)
        frames = []
        trace = raised.value.__cause__.__traceback__
        while trace:
            frames.append((trace.tb_frame.f_code.co_name, trace.tb_lineno))
            trace = trace.tb_next
        assert frames[-1] == ("broken", line)

    @pytest.mark.parametrize("timeout", [None, LONG])
    def test_wrong_arguments(self, timeout):
        def unary(prompts):
            return []

        with pytest.raises(RewardError, match=r"unary raised TypeError: .*unary"):
            Rewards(unary, timeout=timeout)(*self.ARGUMENTS)

    def test_without_a_timeout_it_runs_in_the_callers_thread(self):
        judge = Judge()
        assert Rewards(judge)(*self.ARGUMENTS)[0].tolist() == [1]
        assert Rewards(judge, timeout=LONG)(*self.ARGUMENTS)[0].tolist() == [1]
        assert judge.threads[0] is threading.main_thread()
        assert judge.threads[1].daemon

    def test_hanging(self, never):
        judge = Judge(never)
        with pytest.raises(RewardError, match=r"judge has not returned after 0.2 seconds \(reward_timeout\)") as raised:
            Rewards(judge, timeout=0.2)(*self.ARGUMENTS)
        assert "in __call__\n    act.wait()" in str(raised.value), "it says where the function hangs"

    def test_no_second_call_beside_one_that_hangs(self):
        release = threading.Event()
        judge = Judge(release)
        rewards = Rewards(judge, timeout=0.05)
        with pytest.raises(RewardError, match="has not returned"):
            rewards(*self.ARGUMENTS)
        for _ in range(2):
            with pytest.raises(RewardError, match="judge was not called: an earlier call still hangs"):
                rewards(*self.ARGUMENTS)
        assert judge.calls == 1
        release.set()
        rewards.calls[0].timeout = LONG
        assert rewards(*self.ARGUMENTS)[0].tolist() == [1]
        assert judge.calls == 2
        assert not judge.threads[0].is_alive()

    @pytest.mark.parametrize("timeout", [None, LONG])
    def test_retries(self, timeout, caplog):
        judge = Judge(ConnectionError("down"), KeyError("x"))
        with caplog.at_level(logging.WARNING, "fastrlhf.rewards"):
            assert Rewards(judge, timeout=timeout, retries=2)(*self.ARGUMENTS)[0].tolist() == [1]
        assert judge.calls == 3
        first, second = (record.getMessage() for record in caplog.records)
        assert first.startswith("retry 1 of 2 after: reward_funcs: judge raised ConnectionError: down")
        assert second.startswith("retry 2 of 2 after: reward_funcs: judge raised KeyError: 'x'")
        assert "raise act" in caplog.text, "the traceback goes to the log"

    def test_retries_run_out(self):
        judge = Judge(*[ConnectionError(str(i)) for i in range(9)])
        with pytest.raises(RewardError, match="ConnectionError: 2"):
            Rewards(judge, retries=2)(*self.ARGUMENTS)
        assert judge.calls == 3

    def test_a_retry_waits_for_the_call_that_hung(self):
        release = threading.Event()
        judge = Judge(release)
        rewards = Rewards(judge, timeout=0.05, retries=1)

        def release_it(record):  # when the warning is logged: between the two attempts
            rewards.calls[0].timeout = LONG
            release.set()
            return True

        log = logging.getLogger("fastrlhf.rewards.calls")
        log.addFilter(release_it)
        try:
            assert rewards(*self.ARGUMENTS)[0].tolist() == [1]
        finally:
            log.removeFilter(release_it)
        assert judge.calls == 2
        assert not judge.threads[0].is_alive()

    def test_only_the_function_that_failed_is_called_again(self):
        steady, shaky = Judge(), Judge(OSError("once"))
        Rewards([steady, shaky], retries=1)(*self.ARGUMENTS)
        assert (steady.calls, shaky.calls) == (1, 2)

    def test_unusable_values_are_not_asked_for_again(self):
        calls = []

        def broken(prompts, completions, **columns):
            calls.append(1)
            return [math.nan]

        with pytest.raises(RewardError, match="broken returned nan for completion 0: 'x'"):
            Rewards(broken, retries=3)(*self.ARGUMENTS)
        assert len(calls) == 1

    @pytest.mark.parametrize("timeout", [None, LONG])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_who_wants_to_stop_is_not_stopped(self, timeout, error):
        judge = Judge(error())
        with pytest.raises(error):
            Rewards(judge, timeout=timeout, retries=5)(*self.ARGUMENTS)
        assert judge.calls == 1

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"timeout": 0}, "reward_timeout=0 must be greater"),
            ({"timeout": math.nan}, "reward_timeout=nan"),
            ({"retries": -1}, "reward_retries=-1 must be at least 0"),
        ],
    )
    def test_bad_limits(self, options, said):
        with pytest.raises(ValueError, match=said):
            Rewards(length, **options)


class TestRewardModel:
    def test_scores_are_the_models_own_on_text_with_eos(self, tmp_path):
        folder = save_tiny_model(tmp_path, reward=True)
        scored = RewardModel(folder, batch_size=2)(["the", "a", ""], [" good film", " bad one and then some", "x"])
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        tokenizer = tiny_tokenizer(pad_is_eos=False)
        for text, score in zip(["the good film", "a bad one and then some", "x"], scored, strict=True):
            tokens = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            torch.testing.assert_close(model(tokens).logits.item(), score, rtol=1e-5, atol=1e-6)

    def test_pad_equal_to_eos_is_replaced(self, tmp_path):
        folder = save_tiny_model(tmp_path, reward=True)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        tokenizer = tiny_tokenizer(pad_is_eos=True)
        tokenizer.add_special_tokens({"unk_token": "<|pad|>"})
        reward_model = RewardModel(model, tokenizer)
        assert reward_model.tokenizer.pad_token == "<|pad|>"
        assert tokenizer.pad_token == "<|im_end|>", "the caller's tokenizer is left as it was"

    def test_too_long(self, tmp_path):
        with pytest.raises(ValueError, match="the reward model takes 512 tokens"):
            RewardModel(save_tiny_model(tmp_path, reward=True))(["a long prompt"], [" and more" * 300])

    @pytest.mark.parametrize("conversation", [False, True])
    def test_it_reads_the_tokens_that_the_reward_trainer_read(self, tmp_path, conversation):
        prompt, chosen, rejected = "the g", "ood film", "x"
        if conversation:
            prompt = [{"role": "user", "content": prompt}]
            chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (chosen, rejected))
        reward_model = RewardModel(save_tiny_model(tmp_path, reward=True, chat=CHAT))
        seen = []
        reward_model.model.register_forward_pre_hook(
            lambda module, args, inputs: seen.append(inputs["input_ids"][0].tolist()), with_kwargs=True
        )
        reward_model([prompt], [chosen])
        rows = Dataset.from_list([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
        assert seen == [prepare_preferences(rows, tiny_tokenizer(CHAT), 512)[0]["chosen_ids"]]

    def test_models_as_objects_bring_their_own_tokenizer(self, tmp_path):
        model = AutoModelForSequenceClassification.from_pretrained(save_tiny_model(tmp_path, reward=True))
        rewards = Rewards(model, processing_class=tiny_tokenizer(bos=True))
        assert rewards.funcs[0].tokenizer.name_or_path == str(tmp_path)

    def test_half_precision_scores_are_fp32(self, tmp_path):
        folder = save_tiny_model(tmp_path, reward=True)
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
        assert score_in_fp32(model)(torch.tensor([[5, 6, 7]])).logits.dtype == torch.float32


class TestNormalization:
    def test_batch(self):
        scores = torch.tensor([1.0, 2.0, 3.0, 6.0])
        torch.testing.assert_close(normalize(scores), (scores - 3) / scores.std())

    def test_equal_scores_become_zero(self):
        assert normalize(torch.full((4,), 7.0)).tolist() == [0, 0, 0, 0]
        assert normalize(torch.tensor([7.0])).tolist() == [0]

    def test_running_is_the_statistics_of_all_so_far(self):
        torch.manual_seed(0)
        batches = [torch.randn(n) * 3 + 50 for n in (5, 1, 17, 8)]
        running, seen = RunningNormalizer(), torch.empty(0)
        for batch in batches:
            result = running(batch)
            seen = torch.cat([seen, batch])
            torch.testing.assert_close(result, (batch - seen.mean()) / seen.std(), rtol=1e-4, atol=1e-4)

    def test_running_state_survives(self):
        first, second = RunningNormalizer(), None
        first(torch.tensor([1.0, 5.0]))
        second = RunningNormalizer(**first.state_dict())
        batch = torch.tensor([2.0, 9.0, 4.0])
        assert first(batch).tolist() == second(batch).tolist()


class TestCalibration:
    def test_by_hand(self):
        # 0.9 right, 0.9 right, 0.9 wrong (said 0.1 of the human's choice), 0.6 right
        probabilities = torch.tensor([0.9, 0.9, 0.1, 0.6])
        assert expected_calibration_error(probabilities) == pytest.approx((3 * (0.9 - 2 / 3) + (1 - 0.6)) / 4, abs=1e-6)

    def test_a_calibrated_model_has_none(self):
        torch.manual_seed(0)
        truth = torch.sigmoid(torch.randn(200_000) * 2)
        chosen_first = torch.rand_like(truth) < truth
        assert expected_calibration_error(torch.where(chosen_first, truth, 1 - truth)) < 0.006

    def test_empty(self):
        with pytest.raises(ValueError, match="probabilities: empty"):
            expected_calibration_error(torch.empty(0))
