"""Whether the files of a store are those that were written: every manifest by its own checksum, every part by its manifest's.

Nothing is moved or changed, as a command that only reads leaves everything where it is.
"""

from __future__ import annotations

from pathlib import Path

from diffprune.store.manifest import BUNDLES, MANIFESTS, Commit, Damaged, OtherVersion, Part, parse, parse_bundle, sha256


def unsound(store: Path) -> list[str]:
    """A sentence for each file that is missing or was changed.

    Raises:
        ValueError: the store is one of another version of this program.
    """
    said, parts = [], dict[Part, None]()
    for path in sorted([*(store / MANIFESTS).glob("*.json"), *(store / BUNDLES).glob("*.json")]):
        try:
            parts |= dict.fromkeys(part for commit in _commits(path) for part in commit.parts)
        except OtherVersion as other:
            raise ValueError(f"{store} {other}: it is verified by the version that wrote it") from None
        except Damaged as damage:
            said.append(f"{path.relative_to(store)} {damage}")
    return said + [f"{part.key} {fault}" for part in parts if (fault := _fault(store / part.key, part))]


def _commits(path: Path) -> list[Commit]:
    raw = path.read_bytes()
    return parse_bundle(raw, path.stem) if path.parent.name == BUNDLES else [parse(raw, path.stem)]


def _fault(path: Path, part: Part) -> str:
    """What is wrong with a part; "" for nothing."""
    if not path.is_file():
        return "is missing"
    return "" if sha256(path.read_bytes()) == part.sha256 else "was changed after it was written (sha256 differs)"
