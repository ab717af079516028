"""Job files: where they are looked for, by name or path, and the name of the run that one defines, read without running it."""

from __future__ import annotations

import ast
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
REPOSITORY = PACKAGE.parent  # of a checkout; an installed package carries its jobs inside


def shipped() -> Path:
    """The folder of the jobs that come with the package: of the checkout, or inside an installed package."""
    inside = PACKAGE / "jobs"
    return inside if inside.is_dir() else REPOSITORY / "jobs"


def folders() -> list[Path]:
    """Where jobs are looked for: the working directory first, then those that come with the package."""
    return list(dict.fromkeys([Path.cwd() / "jobs", shipped()]))


def known() -> dict[str, Path]:
    """Every job by name."""
    return {file.stem: file for folder in reversed(folders()) if folder.is_dir() for file in sorted(folder.glob("[!_]*.py"))}


def find_job(text: str) -> Path:
    """The file of a job, by name or path.

    Raises:
        ValueError: there is none; the nearest name is given.
    """
    path = Path(text)
    if path.suffix == ".py":
        if "\0" in text or not path.is_file():
            raise ValueError(f"no job file {text!r}")
        return path
    jobs = known()
    if text not in jobs:
        close = get_close_matches(text, jobs, n=1, cutoff=0.6)  # of short names, two equal letters say nothing
        hint = (
            f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(sorted(jobs))}, or name a file, as in jobs/mine.py"
        )
        raise ValueError(f"no job named {text!r}: " + (hint if jobs else f"there is no folder {folders()[0]}"))
    return jobs[text]


def run_name(path: Path) -> str | None:
    """The name of the run a job file defines, read from its text; None where only running the file tells it."""
    with suppress(OSError, ValueError, SyntaxError, RecursionError):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Job":
                names = [one.value for one in node.keywords if one.arg == "name"]
                return next((n.value for n in names if isinstance(n, ast.Constant) and isinstance(n.value, str)), None)
    return None
