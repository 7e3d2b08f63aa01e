"""PPO on a vocabulary small enough to know the answer.

With gamma = lambda = 1 and the KL penalty in the reward, the objective E[r(y)] - beta KL(pi || pi_ref) has its maximum
at pi*(y) proportional to pi_ref(y) exp(r(y) / beta) (Korbak et al. 2022, equation 5; Rafailov et al. 2023, equation 4).
"""

import itertools

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from fastrlhf.trainers import PPOConfig, PPOTrainer

WORDS = ["<eos>", "<pad>", "go", "a", "b", "c"]
PROMPT = "go"
BETA = 0.5


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def policy():
    set_seed(1)
    # GPT-2, for its learned positions: with RoPE alone, a small Llama cannot tell `go` from `go go`.
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(WORDS),
            n_embd=32,
            n_layer=1,
            n_head=2,
            n_positions=8,
            initializer_range=0.3,
            eos_token_id=0,
            pad_token_id=1,
            bos_token_id=None,
        )
    )


def responses():
    """Every response of at most two tokens: <eos>, or a word and any second token."""
    return [(0,), *itertools.product(range(1, len(WORDS)), range(len(WORDS)))]


@torch.no_grad()
def distribution(model):
    """Probability of each response after the prompt."""
    prompt = [WORDS.index(word) for word in PROMPT.split()]
    first = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    second = {w: model(torch.tensor([[*prompt, w]])).logits[0, -1].double().softmax(-1) for w in range(1, len(WORDS))}
    return torch.stack([first[y[0]] * (second[y[0]][y[1]] if len(y) > 1 else 1.0) for y in responses()])


def reward(text):
    return {"a": 1.0, "b": -0.5}.get(text[:1], 0.0) + (0.7 if text.endswith("c") else 0.0)


def judge(prompts, completions, **columns):
    return [reward(completion.strip()) for completion in completions]


@pytest.mark.parametrize(
    "options",
    [
        {"num_ppo_epochs": 2},
        {"num_mini_batches": 2, "whiten_advantages": True},
        {"advantage_estimator": "rloo", "num_generations": 16, "num_ppo_epochs": 2},
        {"advantage_estimator": "grpo", "num_generations": 128, "num_ppo_epochs": 2},
        {"advantage_estimator": "reinforce++", "whiten_advantages": True, "num_ppo_epochs": 2},
    ],
)
def test_ppo_reaches_the_known_optimum(tmp_path, options):
    tok = tokenizer()
    trainer = PPOTrainer(
        policy(),
        PPOConfig(
            str(tmp_path),
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            max_steps=200,
            rollout_batch_size=128,
            per_device_train_batch_size=128,
            response_length=2,
            learning_rate=3e-3,
            lr_scheduler_type="linear",
            warmup_steps=0,
            kl_coef=BETA,
            gamma=1.0,
            lam=1.0,
            vf_coef=0.5,
            cliprange_value=10.0,
            logging_steps=100,
            **{"whiten_advantages": False, **options},
        ),
        judge,
        Dataset.from_dict({"prompt": [PROMPT] * 1280}),
        processing_class=tok,
    )
    start = distribution(trainer.scorer.model)
    rewards = torch.tensor([reward(tok.decode(y, skip_special_tokens=True)) for y in responses()]).double()
    optimum = start * torch.exp(rewards / BETA)
    optimum /= optimum.sum()

    def kl(p):
        return (p * (p / optimum).log()).sum().item()

    def objective(p):
        return (p @ rewards - BETA * (p * (p / start).log()).sum()).item()

    before = kl(start)
    trainer.train()
    trained = distribution(trainer.scorer.model)
    after = kl(trained)
    print(f"KL to the optimum: {before:.4f} before, {after:.5f} after")
    assert before > 0.3
    assert after < 0.005
    assert objective(start) < objective(trained) <= objective(optimum)
