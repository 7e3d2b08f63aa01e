"""A causal language model that gives the log-probs of given tokens, and nothing else of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrlhf import functional as F

# Names in a configuration that stand for a change of the logits after the head, unless they are None or 1.
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of a `peft` wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class TokenScorer(nn.Module):
    """Log-probs of chosen tokens: the LM head sees the positions that predict them, never prompts or padding.

    model: a causal language model of transformers, with or without LoRA adapters of peft.
    Raises ValueError for a model whose logits are not LM head times last hidden state.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._check_head()

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _keys_to_ignore_on_save(self):
        return causal_lm(self.model)._keys_to_ignore_on_save

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def tie_weights(self) -> None:
        causal_lm(self.model).tie_weights()

    def activation_checkpointing_enable(self, **options) -> None:
        self.model.activation_checkpointing_enable(**options)

    def hidden_states(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states [n, H] at `positions` [n], indices into the flattened `input_ids` [b, L].

        Rows are padded on the right, so causal attention alone keeps the padding from the tokens: no mask is needed.
        """
        trunk = causal_lm(self.model).base_model
        hidden = trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, positions)

    def forward(
        self, input_ids: Tensor, positions: Tensor, tokens: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [n] of `tokens` [n], each predicted at its place in `positions` [n]."""
        return self.score(self.hidden_states(input_ids, positions), tokens, temperature)

    def score(self, hidden: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [n] of `tokens` [n] from hidden states [n, H]."""
        logits = causal_lm(self.model).get_output_embeddings()(hidden)
        # The linear head keeps no logits for its backward, so their gradient may overwrite them.
        return F.token_log_probs_and_entropy(logits, tokens, temperature=temperature, inplace_backward=True)

    def save_pretrained(self, output_dir: str) -> None:
        self.model.save_pretrained(output_dir)

    @torch.no_grad()
    def _check_head(self) -> None:
        model = causal_lm(self.model)
        head = model.get_output_embeddings()
        name = type(model).__name__
        if head is None:
            raise ValueError(f"model: {name} has no LM head; a causal language model is wanted")
        if head.weight.device.type == "meta":
            return
        # Some architectures scale or cap their logits after the head (Gemma-2, Cohere, Granite); a cap shows in large
        # logits only, so look at the configuration too.
        config = model.config.get_text_config()
        changes = [n for n in LOGIT_CHANGES if getattr(config, n, None) not in (None, 1, 1.0)]
        training = model.training
        model.eval()
        tokens = torch.arange(2, device=head.weight.device)[None] % model.config.get_text_config().vocab_size
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        wanted = model(input_ids=tokens, use_cache=False).logits
        model.train(training)
        if changes or not torch.allclose(head(hidden), wanted, rtol=1e-3, atol=1e-3, equal_nan=True):
            how = ", ".join(changes) or "a softcap or a scale"
            raise ValueError(
                f"model: {name} changes its logits after the LM head ({how}), and log-probs computed from the head "
                "alone would be wrong. Such heads are not supported yet."
            )
