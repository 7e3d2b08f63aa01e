"""A tokenizer and models small enough for a test, made on the spot."""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

TEXT = ["the good film was good and the bad film was bad", "Human: hi Assistant: hello user assistant system"]
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(chat: str | None = None, bos: bool = False, pad_is_eos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens; EOS is <|im_end|>. With `bos`, it puts <|im_start|> before a text."""
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", bpe.token_to_id("<|im_start|>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>" if pad_is_eos else "<|pad|>",
        chat_template=chat,
        model_max_length=512,
    )


def tiny_config(vocab_size: int = 300) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def save_tiny_model(folder: Path, reward: bool = False, chat: str | None = None) -> str:
    """A random two-layer Llama with its tokenizer, saved; `reward` gives it a score head instead of an LM head."""
    set_seed(0)
    config = tiny_config()
    if reward:
        config.num_labels = 1
    (LlamaForSequenceClassification if reward else LlamaForCausalLM)(config).save_pretrained(folder)
    tiny_tokenizer(chat, pad_is_eos=False).save_pretrained(folder)
    return str(folder)


def save_tiny_models(folder: Path) -> None:
    """`model`, `value` with a score head, and `tied`, whose LM head is its embeddings."""
    save_tiny_model(folder / "model")
    save_tiny_model(folder / "value", reward=True)
    config = tiny_config()
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(folder / "tied")
    tiny_tokenizer(pad_is_eos=False).save_pretrained(folder / "tied")


def free_port() -> int:
    """For processes that are to find each other on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def save_tiny_preferences(path: Path, count: int) -> str:
    """Pairs in JSONL: of a prompt of five words, the completion with `good` in it is the chosen one."""
    words, rng = ["good", "bad", "film", "the", "was", "and"], random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            prompt = " ".join(rng.choices(words, k=5))
            row = {"prompt": prompt, "chosen": f" good {rng.choice(words)}", "rejected": f" bad {rng.choice(words)}"}
            file.write(json.dumps(row) + "\n")
    return str(path)
