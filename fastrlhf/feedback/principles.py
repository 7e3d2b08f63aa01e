"""Principles from a YAML file, with errors that say line and column."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

DEFAULT_PRINCIPLES = Path(__file__).with_name("principles.yaml")


@dataclass(frozen=True)
class Principle:
    """One rule by which answers are criticised, revised and compared.

    critique: asks for what is wrong with an answer. revision: asks for a better one.
    question: asks a judge which of two answers is better; None where the principle is no question.
    """

    name: str
    critique: str
    revision: str
    question: str | None = None


KEYS = tuple(each.name for each in fields(Principle))
REQUIRED = KEYS[:3]


def load_principles(path: str | Path | None = None) -> list[Principle]:
    """The principles of a YAML file; those that come with fastrlhf when None.

    The file has one key, `principles`: a list of mappings with `name`, `critique`, `revision` and, if wanted,
    `question`, all of them texts. Raises FileNotFoundError, and ValueError as "FILE:LINE:COLUMN: what is wrong" for
    anything else, YAML's own errors included.
    """
    path = Path(path or DEFAULT_PRINCIPLES).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"principles: no such file {str(path)!r} (looked for {path.absolute()})")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ValueError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(f"{path}: not valid YAML: {error.reason} at character {error.position + 1}") from error
    if root is None:
        raise ValueError(f"{path}:1:1: the file is empty, wanted `principles:` and a list")
    return _Reader(path).principles(root)


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, node: Node, said: str) -> ValueError:
        mark = node.start_mark
        return ValueError(f"{self.path}:{mark.line + 1}:{mark.column + 1}: {said}")

    def principles(self, root: Node) -> list[Principle]:
        top = self.mapping(root, ("principles",), ("principles",), "the file")
        (items,) = top.values()
        if not isinstance(items, SequenceNode) or not items.value:
            raise self.error(items, f"principles: a {_kind(items)} given, wanted a list of at least one principle")
        found: dict[str, Principle] = {}
        for item in items.value:
            entries = self.mapping(item, KEYS, REQUIRED, "a principle")
            principle = Principle(**{key: self.text(key, value) for key, value in entries.items()})
            if principle.name in found:
                raise self.error(entries["name"], f"name: {principle.name!r} is the name of an earlier principle")
            found[principle.name] = principle
        return list(found.values())

    def mapping(self, node: Node, known: tuple[str, ...], required: tuple[str, ...], what: str) -> dict[str, Node]:
        if not isinstance(node, MappingNode):
            raise self.error(
                node, f"{what}: a {_kind(node)} given, wanted lines of `key: text` with {', '.join(known)}"
            )
        entries: dict[str, Node] = {}
        for key, value in node.value:
            if key.value not in known:
                raise self.error(key, f"{what} has no key {key.value!r}; wanted {', '.join(known)}")
            if key.value in entries:
                raise self.error(key, f"{what} has the key {key.value!r} twice")
            entries[key.value] = value
        missing = [name for name in required if name not in entries]
        if missing:
            raise self.error(node, f"{what} lacks {', '.join(missing)}")
        return entries

    def text(self, key: str, node: Node) -> str:
        if not isinstance(node, ScalarNode) or node.tag != "tag:yaml.org,2002:str" or not node.value.strip():
            given = repr(node.value) if isinstance(node, ScalarNode) else f"a {_kind(node)}"
            raise self.error(node, f"{key}: {given} given, wanted a text (quote it if it looks like something else)")
        return node.value.strip()


def _kind(node: Node) -> str:
    return {MappingNode: "mapping", SequenceNode: "list", ScalarNode: "single value"}.get(type(node), "node")
