"""The log-probs of whole responses under a reference that does not change: computed once, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from glob import escape, glob
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastrlhf.batching import ScoredBatch, pack_responses, pack_sharing_prompts, score_responses
from fastrlhf.data.pairs import SIDES
from fastrlhf.loading import disable_dropout, weights_digest
from fastrlhf.trainers.dpo_config import DPOConfig
from fastrlhf.trainers.offload import on_device
from fastrlhf.trainers.reductions import gather_varying
from fastrlhf.trainers.token_scorer import TokenScorer

FOLDER = "reference_log_probs"
COLUMNS = tuple(f"ref_{side}_logps" for side in SIDES)
TOKENS = tuple(f"{side}_{part}" for side in SIDES for part in ("ids", "start"))


def pair_batch(rows: Sequence[Mapping[str, Any]], args: DPOConfig) -> ScoredBatch:
    """The responses of pairs, all chosen ones first, packed or padded."""
    prompts = [row[f"{side}_ids"][: row[f"{side}_start"]] for side in SIDES for row in rows]
    responses = [row[f"{side}_ids"][row[f"{side}_start"] :] for side in SIDES for row in rows]
    packed = pack_sharing_prompts if args.share_prompts else pack_responses
    return (packed if args.padding_free else score_responses)(prompts, responses, range(len(prompts)))


def sums(batch: ScoredBatch, values: Tensor) -> Tensor:
    """[b] of values [n]: their sum over each sequence, pairwise, so that long ones lose no digits."""
    return batch.by_sequence(values).sum(1)


class ReferenceLogProbs:
    """Adds columns to data sets of pairs: the log-probs of the whole responses under the reference.

    scorer: the policy as it starts, which is the reference until `take` gets another one. without_adapters: of peft.
    place: whether it lies on the CPU, and goes to the device for this alone.

    Pairs are computed in blocks of `per_device_eval_batch_size`, always the same ones, so that a block has the same
    bits whoever computes it, and when. A block is appended to a file in `output_dir/reference_log_probs` at once. The
    file's name is a digest of all that the numbers hang on: the reference's weights and configuration, the pairs'
    tokens, the block size and how it is computed. So nothing is read back for other pairs or another reference.
    """

    def __init__(
        self, scorer: TokenScorer, args: DPOConfig, accelerator: Accelerator, *, without_adapters: bool, place: bool
    ) -> None:
        self.args, self.accelerator = args, accelerator
        self.scorer: TokenScorer | None = scorer
        self.without_adapters, self.place = without_adapters, place
        self._key: str | None = None

    def take(self, model: nn.Module) -> None:
        """Another reference; it is on the device only while it computes."""
        disable_dropout(model)
        self.scorer = TokenScorer(model, self.args.lm_head, padding_free=self.args.padding_free)
        self.place, self.without_adapters = True, False

    def release(self) -> None:
        """Let go of the model; `key` stays."""
        self.scorer = None

    @property
    def key(self) -> str:
        """Of the reference, by its weights and configuration."""
        if self._key is None:
            self._key = weights_digest(self.scorer.model)
        return self._key

    def added_to(self, pairs: Dataset) -> Dataset:
        """`pairs` with ref_chosen_logps and ref_rejected_logps (fp32, nats). A collective.

        Raises ValueError for a log-prob that is not finite, with its row.
        """
        path = os.path.join(self.args.output_dir, FOLDER, self._digest(pairs))
        size = self.args.per_device_eval_batch_size
        done = self._everyones(_read(path))
        missing = [start for start in range(0, len(pairs), size) if start not in done]
        own = missing[self.accelerator.process_index :: self.accelerator.num_processes]
        done |= self._everyones(self._compute(pairs, own, size, path) if own else {})
        # Two ranks may have read the same block.
        values = torch.cat([done[start][: len(pairs) - start][:size] for start in range(0, len(pairs), size)])
        bad = (~values.isfinite()).any(1).nonzero()
        if len(bad):
            raise ValueError(f"ref_model: the log-prob of pair {int(bad[0])} is {values[bad[0, 0]].tolist()}")
        for name, column in zip(COLUMNS, values.unbind(1), strict=True):
            pairs = pairs.add_column(name, column.numpy())
        return pairs

    def _compute(self, pairs: Dataset, starts: list[int], size: int, path: str) -> dict[int, Tensor]:
        """{start of a block: [rows, 2]}, each block on disk when it is there."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        done = {}
        quiet = self.args.disable_tqdm or not self.accelerator.is_main_process
        with self._ready() as scorer, open(f"{path}-{self.accelerator.process_index}.jsonl", "a+b") as file:
            _end_last_line(file)
            for start in tqdm(starts, "Reference log-probs", disable=quiet):
                rows = list(pairs.select(range(start, min(start + size, len(pairs)))))
                batch = pair_batch(rows, self.args).to(self.args.device)
                log_probs, _ = scorer(batch.input_ids, batch.positions, batch.tokens, packing=batch.packing)
                done[start] = torch.stack(sums(batch, log_probs).cpu().chunk(2), dim=1)
                file.write(json.dumps({"start": start, "log_probs": done[start].tolist()}).encode() + b"\n")
                file.flush()
        return done

    @contextmanager
    def _ready(self) -> Iterator[TokenScorer]:
        scorer = self.scorer.eval()
        adapters = scorer.model.disable_adapter() if self.without_adapters else nullcontext()
        with on_device(scorer, self.args.device, self.place), torch.no_grad(), adapters, self.accelerator.autocast():
            yield scorer

    def _everyones(self, blocks: dict[int, Tensor]) -> dict[int, Tensor]:
        """The blocks of all ranks. A collective."""
        device = self.args.device
        starts = [start for start, block in blocks.items() for _ in range(len(block))]
        starts = torch.tensor(starts, dtype=torch.long, device=device)
        values = torch.cat([torch.zeros(0, 2), *blocks.values()]).to(device)
        starts, values = (gather_varying(x, self.accelerator)[0].cpu() for x in (starts, values))
        found: dict[int, list[Tensor]] = {}
        for start, value in zip(starts.tolist(), values, strict=True):
            found.setdefault(start, []).append(value)
        return {start: torch.stack(block) for start, block in found.items()}

    def _digest(self, pairs: Dataset) -> str:
        args, config = self.args, self.scorer.config
        sharing = args.share_prompts and "beginnings"
        settings = [args.per_device_eval_batch_size, args.padding_free, sharing, args.lm_head]
        settings += [args.bf16, args.fp16]
        digest = hashlib.sha256(f"{self.key} {settings} {config._attn_implementation}".encode())
        for batch in pairs.select_columns(TOKENS).iter(1000):
            digest.update(json.dumps([list(batch[name]) for name in TOKENS]).encode())
        return digest.hexdigest()[:32]


def _read(path: str) -> dict[int, Tensor]:
    """The blocks in the files of all ranks of earlier runs; what a killed one was writing is not among them."""
    blocks = {}
    for name in sorted(glob(f"{escape(path)}-*.jsonl")):
        with open(name, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    block = json.loads(line)
                    blocks[block["start"]] = torch.tensor(block["log_probs"])
                except (ValueError, TypeError, KeyError):
                    continue
    return blocks


def _end_last_line(file: Any) -> None:
    """What a killed run left of a line must not spoil the next one."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
