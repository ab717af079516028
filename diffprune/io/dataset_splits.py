"""Files of one split of one configuration of a data set, in the layouts of the Hugging Face Hub and of local copies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.parquet$")


def patterns(config: str, split: str) -> list[str]:
    """Where the hub keeps a split, relative to the repository; the first pattern with files wins."""
    return [f"{config}/{split}-*.parquet", f"{config}/{split}.parquet"] + (
        [f"data/{split}-*.parquet", f"data/{split}.parquet", f"{split}-*.parquet", f"{split}.parquet"]
        if config == "default"
        else []
    )


def card_patterns(folder: Path, config: str, split: str) -> list[str]:
    """Patterns that the README of the repository gives for a split; none where it says nothing, or is nobody's card."""
    found: list[Any] = []
    for entry in _items(_card(folder).get("configs")):
        mine = isinstance(entry, dict) and entry.get("config_name", "default") == config
        for part in _items(entry.get("data_files")) if mine else []:
            if isinstance(part, dict) and part.get("split") == split:
                path = part.get("path")
                found += [path] if isinstance(path, str) else _items(path)
    return [pattern for pattern in found if isinstance(pattern, str) and _below(pattern)]


def _card(folder: Path) -> dict[str, Any]:
    """What stands at the head of the README; a folder of one's own may have any file of this name."""
    try:
        return metadata_load(folder / "README.md") or {}
    except Exception:  # not there, no UTF-8, or whatever the parser of YAML raises
        return {}


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _below(pattern: str) -> bool:
    """Whether a pattern may be looked for in a folder."""
    parts = Path(pattern).parts
    plain = all(part == "**" or "**" not in part for part in parts)
    return bool(parts) and plain and ".." not in parts and not Path(pattern).is_absolute()


def hidden(path: Path) -> bool:
    """Whether a path within a folder of data is no data: a hidden file or folder (`._a.parquet`, `.ipynb_checkpoints`), or what
    macOS adds to archives (`__MACOSX`)."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _visible(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not hidden(path.relative_to(folder)))


def split_files(folder: Path, config: str, split: str) -> list[Path]:
    """The Parquet files of a split, in order, or its one TSV.

    Raises:
        ValueError: no such folder, no file of this split, more than one TSV it could be, or a missing shard (named).
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    loose = [f"{split}-*.parquet", f"{split}.parquet", f"{config}-{split}.parquet"]  # a folder that holds one configuration only
    for pattern in [*patterns(config, split), *card_patterns(folder, config, split), *loose]:
        if found := _visible(folder, pattern):
            return _complete(found)
    tables = _visible(folder, "*.tsv")
    named = [path for path in tables if split in re.split(r"[^a-z0-9]+", path.stem.lower())] or tables
    if len(named) == 1:
        return named
    if named:
        raise ValueError(f"{folder}: {', '.join(p.name for p in named)} could all be split {split!r}; leave one of them")
    wanted = ", ".join([*patterns(config, split), f"*{split}*.tsv"])
    raise ValueError(f"{folder} has no file of configuration {config!r}, split {split!r}; wanted is one of {wanted}")


def _complete(found: list[Path]) -> list[Path]:
    """Raises ValueError when shard names say how many there are and one is missing."""
    shards = {path: match for path in found if (match := _SHARD.search(path.name))}
    for path, match in shards.items():
        for number in range(int(match[2])):
            wanted = path.with_name(_SHARD.sub(f"-{number:05d}-of-{match[2]}.parquet", path.name))
            if not wanted.is_file():
                raise ValueError(f"{wanted} is missing: {match[2]} files make up this split")
        break
    return found
