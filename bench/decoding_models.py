"""The models that the rollout benchmark decodes."""

from __future__ import annotations

from typing import Any

import torch

from fastrlhf.bench.settings import FLOATS

# What makes a random model of each; without weights that mean something, it takes the same time.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M-Instruct": (
        "Llama",
        {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen2-0.5B": (
        "Qwen2",
        {
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
        },
    ),
    "tiny": (
        "Llama",
        {
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
    ),
}


def load(name: str, dtype: str, device: str) -> tuple[str, torch.nn.Module]:
    """(what it is, the model): SmolLM2 itself where the demo's asset can be had, or a random model of its shape."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if name == "SmolLM2-135M-Instruct":
        from fastrlhf.demo.assets import cache_folder, smollm2

        try:
            folder = smollm2(cache_folder(None), offline=False)
        except (OSError, ImportError, ValueError):
            pass
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=FLOATS[dtype])
            return name, model.to(device).eval()
    family, numbers = CONFIGS[name]
    transformers.set_seed(0)
    with torch.device(device):
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**numbers))
    return f"a random {family} shaped like {name}", model.to(FLOATS[dtype]).eval()
