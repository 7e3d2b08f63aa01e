"""The command line: arguments, errors of one line, and each trainer end to end on a model of two layers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import pytest
from tiny import save_tiny_model

from fastrlhf import trainers
from fastrlhf.cli import COMMANDS, main
from fastrlhf.cli_train import load_function, resume_from

REPO = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _apart(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", os.environ.get("THP_MEM_ALLOC_ENABLE", "1"))
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class StubTrainer:
    """Keeps what the CLI did with it."""

    def __init__(self, **options):
        self.options, self.calls = options, []
        StubTrainer.last = self

    def train(self, resume_from_checkpoint):
        self.calls.append(("train", resume_from_checkpoint))

    def save_model(self):
        self.calls.append("save_model")

    def evaluate(self):
        return {"eval_loss": 1.0}

    def calibrate(self):
        return {"eval_loss": 1.0}

    def save_metrics(self, split, metrics):
        self.calls.append((split, metrics))

    def is_world_process_zero(self):
        return True


@pytest.fixture
def stub(monkeypatch):
    for name in ("SFTTrainer", "RewardTrainer", "PPOTrainer", "DPOTrainer"):
        monkeypatch.setattr(trainers, name, StubTrainer)
    return StubTrainer


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "data.jsonl", *({"prompt": f"film {i}"} for i in range(10)))


class TestTop:
    def test_help_is_fast_and_needs_no_torch(self):
        code = "import sys; from fastrlhf.cli import main; main(['--help']); assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
        assert done.returncode == 0, done.stderr
        for command in COMMANDS:
            assert re.search(rf"\n  {command}\s", done.stdout)

    def test_module_can_be_run(self):
        done = subprocess.run([sys.executable, "-m", "fastrlhf", "dance"], capture_output=True, text=True, cwd=REPO)
        assert done.returncode == 2
        assert f"no command 'dance', wanted one of {', '.join(COMMANDS)}" in done.stderr

    def test_flags_are_explained(self, capsys):
        with pytest.raises(SystemExit) as exit_:
            main(["ppo", "--help"])
        assert exit_.value.code == 0
        out = capsys.readouterr().out
        for flag in ("--model", "--dataset", "--reward_functions", "--kl_coef", "--lora_r", "--learning_rate"):
            assert flag in out

    def test_env_names_every_op(self, capsys):
        from fastrlhf.backends import backend_table

        assert main(["env"]) == 0
        out = capsys.readouterr().out
        assert "transformers" in out
        assert len(backend_table()) > 5
        for op in backend_table():
            assert op.split("_backward")[0] in out

    def test_demo_gets_its_own_arguments(self, monkeypatch):
        seen, demo = [], ModuleType("fastrlhf.demo")
        demo.run_from_command_line = seen.append
        monkeypatch.setitem(sys.modules, "fastrlhf.demo", demo)
        assert main(["demo", "--quick", "--output_dir", "x"]) == 0
        assert seen == [["--quick", "--output_dir", "x"]]

    def test_errors_are_one_line_unless_debugged(self, monkeypatch, capsys):
        demo = ModuleType("fastrlhf.demo")

        def fails(_):
            raise OSError("the disk\nis full")

        demo.run_from_command_line = fails
        monkeypatch.setitem(sys.modules, "fastrlhf.demo", demo)
        assert main(["demo"]) == 2
        assert capsys.readouterr().err == "fastrlhf demo: error: the disk is full\n"
        with pytest.raises(OSError, match="is full"):
            main(["demo", "--debug"])
        monkeypatch.setenv("FASTRLHF_DEBUG", "1")
        with pytest.raises(OSError, match="is full"):
            main(["demo"])

    def test_huge_pages_unless_told_otherwise(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "fastrlhf.demo", SimpleNamespace(run_from_command_line=lambda _: None))
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
        main(["demo"])
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
        main(["demo"])
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


class TestArguments:
    def test_flags(self, stub, data):
        flags = ["--model", "some/model", "--dataset", data, "--learning_rate", "1e-6", "--report_to", "none"]
        assert main(["sft", *flags, "--dtype", "bfloat16", "--max-length", "7", "--lora_r", "4"]) == 0
        options = stub.last.options
        assert options["model"] == "some/model"
        assert options["model_init_kwargs"] == {"dtype": "bfloat16"}
        assert (options["args"].learning_rate, options["args"].max_length) == (1e-6, 7)
        assert options["args"].output_dir == "runs/sft"
        assert len(options["train_dataset"]) == 10
        assert options["eval_dataset"] is None
        assert (options["peft_config"].r, options["peft_config"].task_type) == (4, "CAUSAL_LM")
        assert stub.last.calls == [("train", None), "save_model"]

    def test_yaml_and_flags_over_it(self, stub, data, tmp_path):
        (tmp_path / "ppo.yaml").write_text(
            f"model: a/b\ndataset: {data}\nlearning_rate: 1e-5\nkl_coef: 0.1\nreward_models: [m1, m2]\n"
            "reward_weights: [1, -1e-1]\nwhiten_advantages: false\nreport_to: none\nlogging_first_step: true\n"
            "lr_scheduler_kwargs: {power: 2}\neval_split: null\n"
        )
        assert main(["ppo", "ppo.yaml", "--learning_rate", "1e-6", "--reward-models", "m3", "m4"]) == 0
        options = stub.last.options
        args = options["args"]
        assert (args.learning_rate, args.kl_coef, args.reward_weights) == (1e-6, 0.1, [1.0, -0.1])
        assert (args.whiten_advantages, args.logging_first_step) == (False, True)
        assert args.lr_scheduler_kwargs == {"power": 2}
        assert options["reward_funcs"] == ["m3", "m4"]
        assert (options["ref_model"], options["value_model"], options["peft_config"]) == (None, None, None)

    def test_dpo(self, stub, data):
        flags = ["--model", "a/b", "--dataset", data, "--ref_model", "c/d", "--loss_type", "ipo", "--report_to", "none"]
        assert main(["dpo", *flags, "--pair_ties", "drop", "--lora_r", "2"]) == 0
        options = stub.last.options
        assert (options["ref_model"], options["args"].loss_type, options["args"].pair_ties) == ("c/d", "ipo", "drop")
        assert options["peft_config"].task_type == "CAUSAL_LM"

    def test_evaluation(self, stub, data):
        flags = ["reward", "--model", "m", "--dataset", data, "--report_to", "none"]
        assert main([*flags, "--dataset_split", "train[:8]", "--eval_split", "train[8:]", "--lora_r", "1"]) == 0
        assert len(stub.last.options["eval_dataset"]) == 2
        assert stub.last.options["peft_config"].task_type == "SEQ_CLS"
        assert stub.last.calls[1:] == ["save_model", ("eval", {"eval_loss": 1.0})]

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["sft"], "required: --model, --dataset"),
            (["sft", "--model", "m", "--dataset", "d", "--lerning_rate", "1"], "did you mean '--learning_rate'?"),
            (["sft", "--model", "m", "--dataset", "d", "--max_length", "x"], "invalid int value: 'x'"),
            (["sft", "--model", "m", "--dataset", "d", "--dtype", "int4"], "argument --dtype: invalid choice: 'int4'"),
            (["sft", "--model", "m", "--dataset", "d", "--max_length", "0"], "max_length=0 must be greater than 0"),
            (["sft", "--model", "m", "--dataset", "gone.jsonl"], "no such file or folder"),
            (["sft", "--model", "m", "--dataset", "data.jsonl", "--eval_split", "test"], "is a single file"),
            (["ppo", "--model", "m", "--dataset", "data.jsonl"], "no reward: give reward_models"),
            (["sft", "gone.yaml"], "no such file: 'gone.yaml'"),
            (["sft", "config.json"], "neither a flag nor a .yaml file"),
            (["sft", "wrong.yaml"], "unknown name 'learning_rat'; did you mean '--learning_rate'?"),
            (["sft", "list.yaml"], "list given, wanted lines of `name: value`"),
            (["sft", "broken.yaml"], "not valid YAML"),
            (["sft", "null.yaml"], "learning_rate has no value"),
            (["env", "now"], "env takes no arguments"),
        ],
    )
    def test_errors(self, stub, data, tmp_path, capsys, argv, message):
        (tmp_path / "wrong.yaml").write_text("learning_rat: 1")
        (tmp_path / "list.yaml").write_text("- a")
        (tmp_path / "broken.yaml").write_text("a: [")
        (tmp_path / "null.yaml").write_text("learning_rate:")
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"fastrlhf {argv[0]}: error: ")
        assert message in err
        assert err.count("\n") == 1


class TestRewardFunctions:
    def test_from_a_file_and_from_a_module(self, tmp_path):
        (tmp_path / "my_rewards.py").write_text("def length(prompts, completions, **columns): return [1.0]\nX = 3\n")
        assert load_function("my_rewards.py:length")([], []) == [1.0]
        assert load_function("my_rewards:length")([], []) == [1.0]
        with pytest.raises(ValueError, match="has no function 'size'; it has length"):
            load_function("my_rewards.py:size")

    def test_errors(self):
        with pytest.raises(ValueError, match=r"'length' given, wanted package\.module:function or file\.py:function"):
            load_function("length")
        with pytest.raises(FileNotFoundError, match=r"no such file 'gone\.py'"):
            load_function("gone.py:f")
        with pytest.raises(ImportError, match=r"cannot import 'gone_module' for 'gone_module:f'"):
            load_function("gone_module:f")


class TestResume:
    def args(self, wanted=None):
        return SimpleNamespace(output_dir="out", resume_from_checkpoint=wanted)

    def test_from_the_last_complete_checkpoint(self, tmp_path, capsys):
        assert resume_from(self.args()) is None
        for step, complete in ((5, True), (10, True), (15, False)):
            (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
            if complete:
                (tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        assert resume_from(self.args()) == os.path.join("out", "checkpoint-10")
        assert "Continuing from" in capsys.readouterr().out
        assert resume_from(self.args("true")) == os.path.join("out", "checkpoint-10")
        assert resume_from(self.args("none")) is None
        assert resume_from(self.args("out/checkpoint-5")) == "out/checkpoint-5"

    def test_errors(self):
        with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
            resume_from(self.args("true"))
        with pytest.raises(FileNotFoundError, match="'elsewhere': no such folder"):
            resume_from(self.args("elsewhere"))


class TestEndToEnd:
    FLAGS = ("--report_to", "none", "--max_steps", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1")

    def run(self, command, *flags):
        return main([command, "--output_dir", f"out-{command}", *self.FLAGS, *flags])

    def test_sft_then_resume(self, tmp_path, capsys):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = save_tiny_model(tmp_path / "model")
        data = write_rows(
            tmp_path / "sft.jsonl", *({"prompt": "the film", "completion": " was good"} for _ in range(8))
        )
        flags = ("--model", model, "--dataset", data, "--save_steps", "2")
        assert self.run("sft", *flags) == 0
        AutoModelForCausalLM.from_pretrained("out-sft")
        assert AutoTokenizer.from_pretrained("out-sft").eos_token == "<|im_end|>"
        assert self.run("sft", *flags, "--max_steps", "3") == 0
        assert "Continuing from out-sft/checkpoint-2" in capsys.readouterr().out

    def test_reward_then_ppo(self, tmp_path):
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        model = save_tiny_model(tmp_path / "model")
        pairs = ({"prompt": "the film was", "chosen": " good" * (i + 1), "rejected": " bad"} for i in range(8))
        flags = ("--model", model, "--dataset", write_rows(tmp_path / "pairs.jsonl", *pairs))
        assert self.run("reward", *flags, "--dataset_split", "train[:6]", "--eval_split", "train[6:]") == 0
        assert AutoModelForSequenceClassification.from_pretrained("out-reward").config.num_labels == 1
        assert "eval_accuracy" in json.loads(Path("out-reward/eval_results.json").read_text())

        Path("bonus.py").write_text(
            "def bonus(prompts, completions, **columns): return [len(c) / 9 for c in completions]"
        )
        prompts = write_rows(tmp_path / "prompts.jsonl", *({"prompt": "the film", "id": i} for i in range(8)))
        flags = ("--model", model, "--dataset", prompts, "--rollout_batch_size", "4", "--response_length", "6")
        flags += ("--num_ppo_epochs", "1")
        flags += (
            "--reward_models",
            "out-reward",
            "--reward_functions",
            "bonus.py:bonus",
            "--reward_weights",
            "1",
            "0.5",
        )
        assert self.run("ppo", *flags) == 0
        AutoModelForCausalLM.from_pretrained("out-ppo")
        AutoTokenizer.from_pretrained("out-ppo")
        logged = [json.loads(line) for line in Path("out-ppo/metrics.jsonl").read_text().splitlines()]
        assert logged[0]["rollout/logprob_gap_max"] <= 2e-5

    def test_dpo_then_resume(self, tmp_path, capsys):
        from transformers import AutoModelForCausalLM

        model = save_tiny_model(tmp_path / "model")
        pairs = ({"prompt": "the film was", "chosen": " good" * (i + 1), "rejected": " bad"} for i in range(8))
        flags = ("--model", model, "--dataset", write_rows(tmp_path / "pairs.jsonl", *pairs), "--save_steps", "2")
        flags += ("--dataset_split", "train[:6]", "--eval_split", "train[6:]")
        assert self.run("dpo", *flags) == 0
        AutoModelForCausalLM.from_pretrained("out-dpo")
        assert "eval_rewards/accuracies" in json.loads(Path("out-dpo/eval_results.json").read_text())
        assert self.run("dpo", *flags, "--max_steps", "3") == 0
        assert "Continuing from out-dpo/checkpoint-2" in capsys.readouterr().out

    def test_lora(self, tmp_path):
        model = save_tiny_model(tmp_path / "model")
        data = write_rows(tmp_path / "sft.jsonl", *({"text": "the film was good"} for _ in range(8)))
        assert self.run("sft", "--model", model, "--dataset", data, "--lora_r", "2") == 0
        assert Path("out-sft/adapter_model.safetensors").exists()

    def test_unknown_model(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        data = write_rows(tmp_path / "sft.jsonl", {"text": "the film was good"})
        assert self.run("sft", "--model", "nobody/nothing", "--dataset", data) == 2
        assert "model='nobody/nothing' could not be loaded" in capsys.readouterr().err
