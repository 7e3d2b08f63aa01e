"""Finding a data set: on this machine first, then on the Hugging Face Hub."""

from __future__ import annotations

import gzip
from pathlib import Path

from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk

# What a single file may be called (each may also end in .gz), and the reader of `datasets` that takes it.
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_data(path_or_id: str, split: str = "train", config: str | None = None) -> Dataset:
    """Loads one split of a data set. Whatever exists under that name on this machine comes before the Hub.

    path_or_id: one of
        a file: .jsonl, .json, .csv or .parquet, or one of these with .gz. It counts as the split that was asked for;
        a folder written by `save_to_disk`;
        a folder of such files, split by their names as `datasets` does it (train.jsonl, test.jsonl.gz, ...);
        an id on the Hugging Face Hub.
    split: a split's name, or part of one, such as "train[:1000]" or "train[10%:]".
    config: the configuration, for data sets on the Hub that have several.

    Raises FileNotFoundError when there is nothing under that name here and the Hub is out of reach or has nothing,
    ValueError for a file that cannot be read, a split that does not exist (naming those that do), or no rows.
    """
    path = Path(path_or_id).expanduser()
    if path.is_file():
        splits = _read_file(path, name=split.split("[")[0])
    elif path.is_dir():
        splits = _read_folder(path)
    elif _means_a_path(path_or_id):
        raise FileNotFoundError(
            f"data set {path_or_id!r}: there is no such file or folder (looked for {path.absolute()}). Give the path "
            f"of a {_formats()} file, of a folder with such files, or the id of a data set on the Hugging Face Hub."
        )
    else:
        splits = _read_hub(path_or_id, config)
    dataset = _select(splits, split, path_or_id)
    if len(dataset) == 0:
        raise ValueError(f"data set {path_or_id!r}, split {split!r}: it is empty, at least one row is wanted")
    return dataset


def _formats() -> str:
    return ", ".join(READERS) + " (or any of them with .gz)"


def _means_a_path(name: str) -> bool:
    suffixes = Path(name).suffixes
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or any(s in READERS for s in suffixes[-2:])


def _read_file(path: Path, name: str) -> DatasetDict:
    suffixes = path.suffixes
    zipped = bool(suffixes) and suffixes[-1] == ".gz"
    suffix = suffixes[-2] if zipped and len(suffixes) > 1 else path.suffix
    if suffix not in READERS:
        raise ValueError(f"data set {str(path)!r}: cannot read a {suffix or 'nameless'} file, wanted {_formats()}")
    try:
        if zipped and suffix == ".parquet":  # parquet is read by seeking, which `datasets` does not do through gzip
            import pyarrow.parquet

            with gzip.open(path) as file:
                return DatasetDict({name: Dataset(pyarrow.parquet.read_table(file))})
        return load_dataset(READERS[suffix], data_files={name: str(path)})
    except StopIteration as error:
        raise ValueError(f"data set {str(path)!r}: it is empty, at least one row is wanted") from error
    except Exception as error:
        raise ValueError(f"data set {str(path)!r}: could not be read as {suffix}: {_reason(error)}") from error


def _read_folder(path: Path) -> DatasetDict:
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = load_from_disk(str(path))
            return saved if isinstance(saved, DatasetDict) else DatasetDict({str(saved.split or "train"): saved})
        return load_dataset(str(path))
    except Exception as error:
        raise ValueError(
            f"data set folder {str(path)!r}: could not be read: {_reason(error)}. Wanted what save_to_disk writes, or "
            f"files named after their split, such as train.jsonl; formats: {_formats()}."
        ) from error


def _read_hub(name: str, config: str | None) -> DatasetDict:
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(name, config)
    except (DatasetNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"data set {name!r}: there is no such file or folder here ({Path(name).absolute()}), and it could not be "
            f"fetched from the Hugging Face Hub: {_reason(error)}. Check the spelling and the network (for private "
            "data sets also `hf auth login`), or give a local file or folder."
        ) from error
    except ValueError as error:  # several configurations and none was named, among others
        raise ValueError(f"data set {name!r} on the Hugging Face Hub: {_reason(error)}") from error


def _select(splits: DatasetDict, split: str, name: str) -> Dataset:
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({key: len(rows) for key, rows in splits.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"data set {name!r} has no split {split!r}. It has: "
            + ", ".join(f"{key} ({len(rows)} rows)" for key, rows in splits.items())
            + ". A part of one is written as train[:1000] or train[10%:]."
        ) from error
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _reason(error: BaseException) -> str:
    """The first line of the innermost error, where the cause stands."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
