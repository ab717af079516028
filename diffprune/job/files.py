"""Job files: where they are looked for, and the `job` each defines."""

from __future__ import annotations

import runpy
from pathlib import Path

from pydantic import ValidationError

from diffprune.core import registry
from diffprune.job.job import Job, explain

REPOSITORY = Path(__file__).parents[2]


def folders() -> list[Path]:
    """Where jobs are looked for: the working directory first, then the repository the package lies in."""
    return list(dict.fromkeys([Path.cwd() / "jobs", REPOSITORY / "jobs"]))


def find_job(text: str) -> Path:
    """The file of a job, by name or path.

    Raises:
        ValueError: there is none; the nearest name is given.
    """
    path = Path(text)
    if path.suffix == ".py":
        if not path.is_file():
            raise ValueError(f"no job file {text}")
        return path
    known = {file.stem: file for folder in reversed(folders()) if folder.is_dir() for file in sorted(folder.glob("*.py"))}
    if text not in known:
        hint = registry.nearest(text, known) if known else f"there is no folder {folders()[0]}"
        raise ValueError(f"no job named {text!r}: {hint}")
    return known[text]


def load_job(text: str) -> Job:
    """The `job` a file defines.

    Raises:
        ValueError: no such job, a file that does not run, or one that defines none.
    """
    path = find_job(text)
    try:
        found = runpy.run_path(str(path), run_name="diffprune_job").get("job")
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (SyntaxError, NameError, TypeError, AttributeError, ImportError, KeyError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(found, Job):
        raise ValueError(f"{path} defines no job: it must end with a line such as job = Job(name={path.stem!r}, ...)")
    return found


def placed(job: str) -> tuple[Path, str]:
    """What travels to a cluster, and the job as it is called there: the repository, or the working directory of a file outside.

    Raises:
        ValueError: no job file below that folder.
    """
    path = Path(job).resolve()
    if path.suffix != ".py":
        return REPOSITORY.resolve(), job
    folder = (REPOSITORY if path.is_relative_to(REPOSITORY) else Path.cwd()).resolve()
    if not path.is_file() or not path.is_relative_to(folder):
        raise ValueError(f"no job file {job} below {folder}: only that folder travels to the cluster")
    return folder, str(path.relative_to(folder))
