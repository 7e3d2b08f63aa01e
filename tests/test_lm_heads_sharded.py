"""Scored tokens on two processes (gloo, CPU): the loss and the gradients of one process with the whole batch.

Wherever fully_shard was called: on the scorer, on the model inside of it, on the head alone, on parts in groups.
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import free_port, save_tiny_model, tiny_config
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, set_seed

from fastrlhf.trainers import SFTConfig, SFTTrainer
from fastrlhf.trainers.token_scorer import TokenScorer

RANKS = 2
LENGTHS = (9, 4, 6, 5)  # of four sequences, two on each rank: 14 tokens are scored on the first, 8 on the second
TOKENS = sum(LENGTHS) - len(LENGTHS)


def model(name):
    config = tiny_config()
    config.initializer_range, config.tie_word_embeddings = 0.3, "tied" in name
    set_seed(0)
    llama = LlamaForCausalLM(config)
    if "lora" not in name:
        return llama
    targets = ["q_proj", "lm_head"] if "lora on the head" in name else ["q_proj"]
    return get_peft_model(llama, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def sharded_scorer(name):
    """The scorer, sharded as `name` says."""
    inner = model(name)
    llama = inner.get_base_model() if "lora" in name else inner

    def shard_layers():
        for layer in llama.model.layers:
            fully_shard(layer)

    if name.startswith("scorer"):
        scorer = TokenScorer(inner)
        shard_layers()
        fully_shard(scorer)
        return scorer
    if name.startswith("head"):
        fully_shard(llama.lm_head)
        return TokenScorer(inner)
    shard_layers()
    if name.startswith("norm and head"):
        fully_shard([llama.model.norm, llama.lm_head], reshard_after_forward=False)
    fully_shard(llama)
    if name.startswith("peft"):
        fully_shard(inner)
    return TokenScorer(inner)


NAMES = (
    "scorer",
    "scorer, tied",
    "scorer, lora on the head",
    "model",
    "model, tied",
    "model, lora on the trunk",
    "model, lora on the head",
    "peft model, lora on the trunk",
    "head",
    "norm and head",
)


def constants(rows):
    """Old log-probs and advantages of the tokens of these rows."""
    generator = torch.Generator().manual_seed(2)
    each = [torch.randn(2, length - 1, generator=generator) for length in LENGTHS]
    old, advantages = torch.cat([each[row] for row in rows], 1)
    return old - 6.0, advantages, torch.ones_like(old)


def weighted(scored, rows, denominator):
    log_probs, entropy = scored.log_probs_and_entropy()
    return (log_probs * constants(rows)[1] + 0.1 * entropy).sum() / denominator


LOSSES = {
    "cross-entropy": lambda scored, rows, denominator: scored.cross_entropy(denominator)[0],
    "ppo": lambda scored, rows, denominator: scored.ppo_loss(
        *constants(rows), denominator=denominator, entropy_coef=0.1
    )[0],
    "log-probs and entropies": weighted,
}


def batch(rows):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 300, (len(LENGTHS), max(LENGTHS)), generator=generator)[list(rows)]
    width = input_ids.shape[1]
    positions = torch.cat([torch.arange(LENGTHS[row] - 1) + i * width for i, row in enumerate(rows)])
    return input_ids, positions, input_ids.flatten()[positions + 1], 0.7


def loss_and_gradients(scorer, loss, rows, denominator):
    """Gradients of weights that nobody sharded are averaged over the ranks here, as data parallelism would."""
    value = scorer(*batch(rows), loss=lambda scored: LOSSES[loss](scored, rows, denominator))
    value.backward()
    value = value.detach().clone()
    gradients = {name: p.grad for name, p in scorer.named_parameters() if p.requires_grad}
    if dist.is_initialized():
        for x in (value, *(grad for grad in gradients.values() if not isinstance(grad, DTensor))):
            dist.all_reduce(x)
            x /= RANKS
        gradients = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    return value, gradients


SFT = Dataset.from_dict({"text": ["the good film", "a bad film was bad , bad , bad", "hello", "Human: hi and so on"]})


def weights_after_sft(folder, rank, **options):
    args = SFTConfig(
        str(folder / f"out{rank}"),
        max_steps=1,
        optim="sgd",
        learning_rate=0.5,
        warmup_steps=0,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = SFTTrainer(str(folder / "model"), args, SFT)
    trainer.train()
    return [p.detach() for p in trainer.scorer.parameters()]


def on_one_rank(rank, port, folder):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ[name] = str(value)
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    rows, denominator = (2 * rank, 2 * rank + 1), TOKENS / RANKS
    results = {
        (name, loss): loss_and_gradients(sharded_scorer(name), loss, rows, denominator)
        for name in NAMES
        for loss in LOSSES
    }
    results["bf16"] = ratio_in_bf16(rows)
    options = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    results["sft"] = weights_after_sft(folder, rank, **options)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    results["sft, accumulated"] = weights_after_sft(folder, rank, **options)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def ratio_in_bf16(rows):
    """PPO's statistics where fully_shard casts weights and a forward's arguments to bf16."""
    scorer = TokenScorer(model("scorer"))
    fully_shard(scorer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with torch.no_grad():
        old, _ = scorer(*batch(rows))
    _, stats = scorer(*batch(rows), loss=lambda scored: scored.ppo_loss(old, old, torch.ones_like(old)))
    return stats


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_model(folder / "model")
    port = free_port()
    mp.spawn(on_one_rank, (port, folder), nprocs=RANKS)
    whole = {"sft": weights_after_sft(folder, "whole", per_device_train_batch_size=4)}
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)], whole


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NAMES)
def test_sharded(results, name, loss):
    wanted, gradients = loss_and_gradients(TokenScorer(model(name)), loss, range(len(LENGTHS)), TOKENS)
    for rank in results[0]:
        value, ours = rank[name, loss]
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
        assert ours.keys() == gradients.keys()
        for key, grad in gradients.items():
            torch.testing.assert_close(ours[key], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item(), msg=key)


def test_mixed_precision_does_not_round_the_old_log_probs(results):
    for rank in results[0]:
        assert rank["bf16"].ratio_min == rank["bf16"].ratio_max == 1.0


@pytest.mark.parametrize("run", ["sft", "sft, accumulated"])
def test_data_parallel_sft_is_one_big_batch(results, run):
    """A wrong normaliser under data parallelism (TRL #3021, #5890; verl #3741)."""
    ranks, whole = results
    for mine in ranks:
        for ours, wanted in zip(mine[run], whole["sft"], strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
