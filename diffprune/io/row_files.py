"""Files with rows in a folder: by suffix, at any depth, hidden ones left out."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

JSON = ".json"  # in a folder only where it holds rows: data sets carry descriptions in JSON, too
LONGEST = 1 << 26  # bytes of a row that may be told from a description


def row_files(place: Path, suffixes: Collection[str]) -> list[Path]:
    """The file `place`, or all with these suffixes below the folder `place`, by name.

    Hidden are names that start with a full stop (`._a.parquet`, `.ipynb_checkpoints/`) and `__MACOSX/`.

    Raises:
        ValueError: there is none.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise ValueError(f"there is no file or folder {place}")
    names = sorted(path.relative_to(place).as_posix() for path in _below(place) if path.suffix.lower() in suffixes)
    found = [place / name for name in names if not _hidden(name) and (place / name).is_file()]
    found = [path for path in found if path.suffix.lower() != JSON or _holds_rows(path)]
    if not found:
        raise ValueError(f"{place} holds no file with rows: one of {', '.join(suffixes)} is needed")
    return found


def _below(place: Path) -> Iterator[Path]:
    """What is called a file below a folder, links to folders followed, but for those that lead back upwards."""
    for folder, folders, names in os.walk(place, followlinks=True):
        way = [one.resolve() for one in (Path(folder), *Path(folder).parents)]
        above = {one for real in way for one in (real, *real.parents)}
        folders[:] = [name for name in folders if Path(folder, name).resolve() not in above]
        yield from (Path(folder, name) for name in names)


def _holds_rows(path: Path) -> bool:
    """Whether a JSON file holds an array or an object a line, and not one object, which describes something."""
    with path.open("rb") as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not head.startswith(b"{"):
            return head.startswith(b"[")
        stream.seek(0)
        first, second = stream.readline(LONGEST).rstrip(), stream.readline(LONGEST)
    return first.endswith(b"}") and second.startswith(b"{")


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
