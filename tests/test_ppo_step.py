"""One whole step of PPOTrainer on three tokens, worked out by hand."""

import math

import torch
from datasets import Dataset
from test_ppo_closed_form import WORDS, policy, tokenizer

from fastrlhf.rollout import Rollout
from fastrlhf.trainers import PPOConfig, PPOTrainer


class Dictated:
    """An engine whose policy is uniform over six words, and said this."""

    def update_weights(self):
        pass

    def generate(self, prompts, sampling, *, seeds=None):
        response = [WORDS.index(word) for word in ("a", "b", "<eos>")]
        return Rollout(prompts, [response], ["stop"], torch.full((3,), -math.log(6)))


def constant(probabilities):
    """A model whose last hidden state is (1, 0, 0, ...) everywhere, so that its logits are the head's first column."""
    model = policy()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))  # not the embeddings'
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()[0] = 1
        model.lm_head.weight[:, 0] = torch.tensor(probabilities).log()
    return model


def test_three_tokens_by_hand(tmp_path):
    trainer = PPOTrainer(
        constant([1 / 6] * 6),
        PPOConfig(
            str(tmp_path),
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            max_steps=1,
            rollout_batch_size=1,
            per_device_train_batch_size=1,
            num_ppo_epochs=1,
            response_length=3,
            kl_coef=0.5,
            lam=0.5,
            vf_coef=0.1,
            whiten_advantages=False,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        ),
        lambda prompts, completions, **columns: [2.0],
        Dataset.from_dict({"prompt": ["go"]}),
        processing_class=tokenizer(),
        ref_model=constant([1 / 2] + [1 / 10] * 5),
        engine=Dictated(),
    )
    trainer.train()
    log = trainer.state.log_history[0]

    # KL: ln(1/6) - ln(1/10) = ln(5/3) = 0.5108 of a and b, ln(1/6) - ln(1/2) = -1.0986 of the EOS.
    # Rewards: -0.5 KL, and the score on the EOS: -0.2554, -0.2554, 2.5493. Values are 0, so that these are the deltas.
    # Advantages, lambda 1/2, from the end: 2.5493; -0.2554 + 2.5493 / 2; -0.2554 + 1.0192 / 2. Returns are the same.
    a, b, eos = 0.25420, 1.01924, 2.54931
    mean = 1.27425

    def close(got, wanted):
        torch.testing.assert_close(torch.as_tensor(got, dtype=torch.float64), torch.tensor(wanted).double(), **ROUNDED)

    close(log["objective/kl"], -0.07696)
    close(log["objective/rlhf_reward"], 2 + 0.5 * 0.07696)
    close(log["loss/policy_avg"], -mean)
    close(log["loss/value_avg"], 0.5 * (a**2 + b**2 + eos**2) / 3)
    close(log["policy/entropy_avg"], math.log(6))
    assert log["val/ratio"] == 1.0
    assert log["policy/approxkl_avg"] == log["policy/clipfrac_avg"] == 0.0

    # The step down from 0, at the constant hidden state: a third of A (1 - 1/6) for the token, of -A / 6 for others.
    head = trainer.scorer.model.lm_head.weight[:, 0].detach() - math.log(1 / 6)
    others = -mean / 6
    wanted = {"<eos>": eos / 3 + others, "<pad>": others, "go": others, "a": a / 3 + others, "b": b / 3 + others}
    close(head, [wanted.get(word, others) for word in WORDS])
    # The value's: vf_coef times the mean of the returns.
    close(trainer.scorer.value_head.bias.detach(), [0.1 * mean])
    close(trainer.scorer.value_head.weight.detach()[0, :2], [0.1 * mean, 0.0])


ROUNDED = {"rtol": 0, "atol": 2e-5}  # of the numbers above
