"""The peers that the benchmarks compare with: they compute what we compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastrlhf.bench import (
    contests,
    peers,
    sources,
)
from fastrlhf.bench.peers.base import FROM_HIDDEN, Peer

ROOT = Path(__file__).parents[1]
HERE = [name for name in peers.ADAPTERS if name != "ours" and not peers.peer(name).absent]


def inputs(op):
    """Inputs on which all conventions agree: every token counts."""
    random = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(3, 7, generator=random) for _ in range(4))
    logits, tokens = torch.randn(5, 33, generator=random), torch.randint(33, (5,), generator=random)
    mask = torch.ones(3, 7, dtype=torch.bool)
    hidden, weight = torch.randn(3, 7, 8, generator=random), torch.randn(33, 8, generator=random)
    head = (hidden, weight, torch.randint(33, (3, 7), generator=random))
    old = peers.peer("eager").ops["linear_token_log_probs"].work(*head) + 0.3 * b
    return {
        "linear_token_log_probs": head,
        "linear_token_log_probs_and_entropy": head,
        "linear_cross_entropy": head,
        "linear_ppo_loss": (*head, old, c[:, :1].expand(3, 7), mask),  # one advantage a sequence
        "token_log_probs": (logits, tokens),
        "token_log_probs_and_entropy": (logits, tokens),
        "full_kl": (logits, 0.5 * logits.flip(0)),
        "kl_divergence": (a, a + 0.1 * b),
        "gae": (a, b, mask),
        "gae_packed": (a.flatten(), b.flatten(), torch.tensor([0, 2, 9, 21])),
        "rollout_advantages": (torch.tensor([1.0, -2.0, 0.5]), a, a + 0.1 * b, c, mask),
        "masked_mean": (a, mask),
        "masked_whiten": (a, mask),
        "ppo_loss": (a, a + 0.3 * b, c, mask, a + 0.1 * d),
        "value_loss": (a, a + 0.3 * b, c, mask),
        "pairwise_reward_loss": (a[0], b[0]),
        "dpo_loss": (a[0], b[0], c[0], d[0]),
        "rms_norm": (a, b[0]),
        "swiglu": (a, b),
        "rotary_embedding": (hidden[:, None], hidden.cos(), hidden.sin()),
    }[op]


def results(run, op):
    found = run.work(*run.convert(*inputs(op)))
    found = found if isinstance(found, tuple) else (found,)
    # Of the losses the first result: what trainers log beside it differs.
    return [x for x in (found[:1] if op.endswith("_loss") else found[:2]) if isinstance(x, torch.Tensor)]


def gradients(run, op, leaves):
    """Of hidden and weight, or of hidden alone; of log-probs with weights of their own."""
    wanted = [x.requires_grad_() for x in inputs(op)[:leaves]]
    found = run.work(*run.convert(*wanted, *inputs(op)[leaves:]))
    grads = [] if op in ("linear_ppo_loss", "linear_cross_entropy") else [torch.linspace(-1, 1, 21).view(3, 7)]
    return contests.backward(found, wanted, grads)


class TestPeers:
    def test_ours_is_compared_with_eager_everywhere(self):
        ours = {op.removesuffix(" in place") for op in peers.peer("ours").ops}
        assert ours == set(peers.peer("eager").ops)

    @pytest.mark.parametrize("name", HERE)
    @pytest.mark.parametrize("op", sorted(peers.peer("eager").ops))
    def test_peers_compute_what_we_compute(self, name, op):
        run = peers.contenders(op).get(name, "")
        if isinstance(run, str):
            pytest.skip(f"{name}: {run}")
        ours, theirs = results(peers.peer("ours").ops[op], op), results(run, op)
        if op == "rollout_advantages":  # ours leaves the whitening to the loss
            ours[0] = torch.nn.functional.layer_norm(ours[0], ours[0].shape, eps=1e-8)
            theirs[0] = torch.nn.functional.layer_norm(theirs[0], theirs[0].shape, eps=1e-8)
        if op == "gae" and name == "verl":  # whitens
            ours[0] = (ours[0] - ours[0].mean()) / ours[0].std()
        if op == "ppo_loss" and name == "TRL":  # has no KL in the loss
            ours = [peers.peer("ours").ops["ppo_loss"].work(*inputs(op)[:4], inputs(op)[0])[0]]
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y.reshape(x.shape), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", HERE)
    @pytest.mark.parametrize("op", FROM_HIDDEN)
    @pytest.mark.parametrize("leaves", [2, 1], ids=["trained head", "frozen head"])
    def test_peers_compute_our_gradients_of_the_lm_head(self, name, op, leaves):
        run = peers.contenders(op).get(name, "")
        if isinstance(run, str):
            pytest.skip(f"{name}: {run}")
        ours, theirs = gradients(peers.peer("ours").ops[op], op, leaves), gradients(run, op, leaves)
        for x, y in zip(ours, theirs, strict=True):
            assert x.abs().max() > 1e-2
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)

    def test_who_is_missing_is_reported_by_name(self, monkeypatch):
        def absent():
            raise sources.NotThere("not installed")

        def broken():
            raise ImportError("cannot import name 'x'\nfrom 'y'")

        monkeypatch.setattr(peers, "ADAPTERS", {"A": absent, "B": broken, "C": lambda: Peer("1.0")})
        peers.peer.cache_clear()
        try:
            assert peers.roll_call() == {
                "A": {"missing": "not installed"},
                "B": {"missing": "not usable: cannot import name 'x' from 'y'"},
                "C": {"version": "1.0"},
            }
            assert peers.contenders("gae") == {"C": "not there"}
        finally:
            peers.peer.cache_clear()


class TestSources:
    SOURCE = """
import no_such_package

LIMIT = 3

def register(name):
    raise RuntimeError

@register("twice")
def twice(x: no_such_package.Tensor):
    return min(2 * x, LIMIT)

class Trainer:
    def train(self):
        for batch in self.batches():
            with no_such_package.context():
                total = 0
                for x in values:
                    total += x
                mean = total / len(values)
                log(mean)
"""

    @pytest.fixture
    def path(self, tmp_path):
        (tmp_path / "trainer.py").write_text(self.SOURCE)
        return tmp_path / "trainer.py"

    def test_functions_run_without_what_their_file_imports(self, path):
        found = sources.definitions(path, {"twice": False, "LIMIT": True}, {})
        assert (found["twice"](1), found["twice"](5)) == (2, 3)
        with pytest.raises(RuntimeError):
            sources.definitions(path, {"twice": True, "register": True, "LIMIT": True}, {})

    def test_statements_in_the_middle_of_a_method_become_a_function(self, path):
        steps = sources.steps(path, sources.method(path, "Trainer", "train"), "total", "mean", ["values"], {})
        assert steps([1, 2, 6])["mean"] == 3

    def test_what_is_not_there_is_named(self, path):
        with pytest.raises(sources.NotThere, match=r"no thrice in trainer\.py"):
            sources.definitions(path, {"thrice": True}, {})
        with pytest.raises(sources.NotThere, match=r"no Trainer\.test in trainer\.py"):
            sources.method(path, "Trainer", "test")
        with pytest.raises(sources.NotThere, match="no steps from total to median in train"):
            sources.steps(path, sources.method(path, "Trainer", "train"), "total", "median", ["values"], {})
        with pytest.raises(sources.NotThere, match="not installed"):
            sources.folder("no_such_package")
