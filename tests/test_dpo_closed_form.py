"""DPO where the answer is known: the optimum of PPO's objective, pi*(y) proportional to pi_ref(y) exp(r(y) / beta)
(Rafailov et al. 2023, equation 4), from pairs that a Bradley-Terry judge with the rewards r labelled."""

import itertools
import math

import torch
from datasets import Dataset
from test_ppo_closed_form import PROMPT, WORDS, policy, tokenizer

from fastrlhf.trainers import DPOConfig, DPOTrainer

BETA = 0.5
TIMES = 8  # that the judge sees each pair
RESPONSES = [" ".join(words) for length in (1, 2) for words in itertools.product(WORDS[2:], repeat=length)]


def wins(response):
    """Of TIMES comparisons with the first response. Its reward is then exactly log(wins / losses)."""
    return 1 + (3 * RESPONSES.index(response)) % (TIMES - 1)


@torch.no_grad()
def log_probs(model):
    """Of each response with its EOS."""
    sums = []
    for response in RESPONSES:
        tokens = torch.tensor([WORDS.index(word) for word in [PROMPT, *response.split(), "<eos>"]])
        logits = model(tokens[None]).logits[0, :-1].double()
        sums.append(logits.log_softmax(-1).gather(1, tokens[1:, None]).sum())
    return torch.stack(sums)


def test_dpo_reaches_the_optimum_of_ppo(tmp_path):
    first, *others = RESPONSES
    compared = [(y, first) if i < wins(y) else (first, y) for y in others for i in range(TIMES)]
    chosen, rejected = zip(*compared, strict=True)
    pairs = Dataset.from_dict({"prompt": [f"{PROMPT} "] * len(compared), "chosen": chosen, "rejected": rejected})
    args = DPOConfig(
        str(tmp_path),
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        max_steps=150,
        per_device_train_batch_size=len(pairs),
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        warmup_steps=0,
        beta=BETA,
        logging_steps=50,
    )
    trainer = DPOTrainer(policy(), args, pairs, processing_class=tokenizer())
    start = log_probs(trainer.scorer.model)
    rewards = torch.tensor([0.0, *(math.log(wins(y) / (TIMES - wins(y))) for y in others)]).double()
    optimum = (start + rewards / BETA).log_softmax(0)

    def kl(log_p):
        """To the optimum, among these responses: what others get is not for pairs of these to say."""
        log_p = log_p.log_softmax(0)
        return (log_p.exp() * (log_p - optimum)).sum().item()

    trainer.train()
    before, after = kl(start), kl(log_probs(trainer.scorer.model))
    print(f"KL to the optimum: {before:.4f} before, {after:.6f} after")
    assert before > 0.3
    assert after < 1e-3
