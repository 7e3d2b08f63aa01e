"""Models and tokenizers from names, with errors that say what to do."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

logger = logging.getLogger(__name__)


def _load(auto_class: Any, argument: str, name: str, **options: Any) -> Any:
    unset_hf_deepspeed_config()  # with arguments for ZeRO 3 in being, transformers would load shards
    try:
        loaded = auto_class.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        kind = "a local folder" if os.path.isdir(name) else "neither a local folder nor a model the hub gave"
        raise OSError(
            f"{argument}={name!r} could not be loaded with {auto_class.__name__}: it is {kind}. Check the spelling, "
            f"that the folder holds a config.json and weights, and the access to the hub. Cause: {error}"
        ) from error
    return _merged(auto_class, name, options) if getattr(loaded, "_hf_peft_config_loaded", False) else loaded


def _merged(auto_class: Any, name: str, options: dict[str, Any]) -> nn.Module:
    """The model of a folder of adapters with these merged into its weights: as transformers load it, all is frozen."""
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

    classes = {
        AutoModelForCausalLM: AutoPeftModelForCausalLM,
        AutoModelForSequenceClassification: AutoPeftModelForSequenceClassification,
    }
    model = classes[auto_class].from_pretrained(name, **options).merge_and_unload()
    model.config._name_or_path = name
    return model.requires_grad_(True)


def load_causal_lm(model: str | nn.Module, argument: str = "model", **options: Any) -> nn.Module:
    """A causal language model from a hub id or folder; a model comes back as it is."""
    return (
        _load(AutoModelForCausalLM, argument, model, **options) if isinstance(model, str) else _whole(model, argument)
    )


def _whole(model: nn.Module, argument: str) -> nn.Module:
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"{argument}: {type(model).__name__} was sharded by ZeRO 3 while it was loaded; give its name or folder, "
            "or load it before the arguments for DeepSpeed are made"
        )
    return model


def load_reward_model(
    model: str | nn.Module, argument: str = "model", num_labels: int = 1, **options: Any
) -> nn.Module:
    """A sequence classification model, one label a head, from a hub id or folder; a model comes back as it is."""
    if isinstance(model, str):
        name = model
        try:
            model = _load(AutoModelForSequenceClassification, argument, name, num_labels=num_labels, **options)
        except RuntimeError as error:  # weights of other shapes
            raise ValueError(
                f"{argument}={name!r} could not be loaded with a score head of {num_labels} labels; where it has one "
                f"with another number, start from its causal language model. Cause: {error}"
            ) from error
    labels = getattr(_whole(model, argument).config, "num_labels", None)
    if labels != num_labels:
        raise ValueError(f"{argument}: num_labels={labels}, but this reward model has num_labels={num_labels}")
    return model


def load_tokenizer(
    name: str, argument: str = "processing_class", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a hub id or folder."""
    return _load(AutoTokenizer, argument, name, trust_remote_code=trust_remote_code)


def tokenizer_with_pad(
    tokenizer: PreTrainedTokenizerBase | None,
    model: nn.Module,
    *,
    unlike_eos: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of `model` when None is given, with a pad token, and its pad token in the model's configuration.

    The trainers tell padding by length, so pad == eos is harmless there. transformers' sequence classifiers tell it
    by the pad token: with pad == eos they would score the token before the EOS. `unlike_eos` asks for another token
    then. A pad token that the model has no embedding for counts as missing. A missing or refused one is replaced by a
    special token that the tokenizer already has; failing that, the model's own tokenizer (None given) gets a new one,
    and the model an embedding for it.
    Raises ValueError when there is none to take in a tokenizer that was given.
    """
    given = tokenizer is not None
    if not given:
        tokenizer = load_tokenizer(model.config.name_or_path, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError("processing_class: the tokenizer has no eos_token; set tokenizer.eos_token")
    size, pad = model.get_input_embeddings().num_embeddings, tokenizer.pad_token_id
    if pad is None or pad >= size or (unlike_eos and pad == tokenizer.eos_token_id):
        spare = [token for token in (tokenizer.unk_token, *tokenizer.all_special_tokens) if token]
        refused = (tokenizer.eos_token, tokenizer.bos_token)
        spare = [t for t in spare if t not in refused and tokenizer.convert_tokens_to_ids(t) < size]
        if not spare and unlike_eos and given:
            raise ValueError(
                "processing_class: the tokenizer has no pad token apart from its eos_token "
                f"{tokenizer.eos_token!r}, and a reward model needs one. Remedy: "
                "tokenizer.add_special_tokens({'pad_token': '<|pad|>'}); "
                "model.resize_token_embeddings(len(tokenizer))"
            )
        tokenizer = copy.deepcopy(tokenizer)
        if spare or not unlike_eos:
            tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > size:
                model.resize_token_embeddings(len(tokenizer))
        logger.warning("The tokenizer's pad token is now %r.", tokenizer.pad_token)
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits that hang on the configuration of a model and on every bit of its weights."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, x in model.state_dict().items():
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def with_adapter(model: nn.Module, peft_config: Any | None) -> nn.Module:
    """`model` with the adapters of a peft configuration; as it is when None."""
    if peft_config is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, peft_config)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: with it, the log-probs of rollout and update would differ at the same weights.

    Modules of torch hold it as `p`; those of transformers also as numbers such as `attention_dropout` or `resid_pdrop`.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(module, name, 0.0)


def prepare_eval(dataset: Any | None, prepare: Callable[[Dataset], Dataset]) -> Any | None:
    """An evaluation set, or a dictionary of them by name, prepared; None stays None."""
    if isinstance(dataset, dict):
        return {name: prepare(part) for name, part in dataset.items()}
    return None if dataset is None else prepare(dataset)
