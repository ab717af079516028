"""What of a project travels to a cluster: an allow-list of files, never a whole folder because it happens to be the current one.

In a checkout of git what git tracks; elsewhere the job's file and the modules it imports that lie beside it. The folders of
plug-ins travel always, and so do a job and its modules that git does not track yet.
"""

from __future__ import annotations

import ast
import os
import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffprune.core.errors import first_line
from diffprune.core.registry import KINDS
from diffprune.io import git
from diffprune.io.job_files import PACKAGE, REPOSITORY, find_job

MOST_BYTES = 100 * 2**20  # which a head of Ray takes in one request
LONGEST_LIST = 5
LEFT = {"runs", "__pycache__", "node_modules"}  # of a folder that was named and is not of git; and whatever begins with a dot
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every entry, so that equal files are an equal archive, which is sent once


@dataclass(frozen=True)
class Project:
    """The files that travel. root: their folder here; files: by their path below it; job: as it is called there."""

    root: Path
    files: Mapping[str, Path]
    job: str

    @property
    def num_bytes(self) -> int:
        """Of all files, before compression."""
        return sum(path.stat().st_size for path in self.files.values())

    def told(self) -> str:
        """One line for those who send it."""
        count = f"{len(self.files)} file" + "s" * (len(self.files) != 1)
        return f"sending {count}, {self.num_bytes / 2**20:.1f} MiB, of {self.root}"

    def check(self) -> None:
        """Refuse what a head would not take.

        Raises:
            ValueError: names the largest files.
        """
        if self.num_bytes <= MOST_BYTES:
            return
        sizes = sorted(((path.stat().st_size, name) for name, path in self.files.items()), reverse=True)
        largest = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for size, name in sizes[:LONGEST_LIST])
        raise ValueError(
            f"{self.num_bytes / 2**20:.0f} MiB would travel, {MOST_BYTES / 2**20:.0f} are the most; the largest: {largest}. "
            "Put data on storage that the cluster reaches"
        )

    def write(self, archive: Path) -> None:
        """A zip file of it, 0600, whose bytes depend on names and contents alone."""
        with open(archive, "xb", opener=_private) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name in sorted(self.files):
                entry = zipfile.ZipInfo(name, EPOCH)
                entry.external_attr = (0o755 if self.files[name].stat().st_mode & 0o100 else 0o644) << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                zipped.writestr(entry, self.files[name].read_bytes())


def project_of(job: str, folder: Path | None = None) -> Project:
    """What travels for a job: of the checkout of this repository where the job is one of its own, else of the folder one works in,
    or of the job's where it lies elsewhere; or of `folder`, which is asked for and may hold data too.

    Raises:
        ValueError: no such job, not below `folder`, a folder that is a home or holds one, a checkout of which git does not
            tell what it tracks, or a name that no archive takes.
    """
    path = find_job(job).resolve()
    here, checkout = Path.cwd().resolve(), (REPOSITORY / "pyproject.toml").is_file()
    if folder is not None:
        root = _checked(folder)
        files = _tracked(root) or _below(root)
    elif checkout and path.is_relative_to(REPOSITORY):
        root, files = REPOSITORY, _tracked(REPOSITORY) or _below(PACKAGE, REPOSITORY)
    else:
        root = here if path.is_relative_to(here) or path.is_relative_to(PACKAGE) else path.parent
        files = {} if _holds_a_home(root) else _tracked(root)
    installed = path.is_relative_to(PACKAGE)  # the cluster has it in its own package
    if not installed:
        if not path.is_relative_to(root):
            raise ValueError(f"the job {path} does not lie below {root}, so it would not travel: name a folder that holds it")
        files |= {str(one.relative_to(root)): one for one in _imported(path)}
    plugins = {f"{kind}/{one.name}": one for kind in KINDS for one in sorted((here / kind).glob("*.py")) if one.is_file()}
    for name in (str(root), *files, *plugins):
        if any("\ud800" <= mark <= "\udfff" for mark in name):
            raise ValueError(f"the name {name!r:.200} is not UTF-8, so it cannot travel: rename it, or take it out of what is sent")
    by_name = installed or (Path(job).suffix != ".py" and path.parent == root / "jobs")  # and found by it where it runs
    return Project(root, files | plugins, path.stem if by_name else str(path.relative_to(root)))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _holds_a_home(root: Path) -> bool:
    return Path.home().resolve().is_relative_to(root)


def _checked(folder: Path) -> Path:
    """A folder that may travel.

    Raises:
        ValueError: it is none, or one with everything a person has.
    """
    root = folder.resolve()
    if not root.is_dir():
        raise ValueError(f"no folder {folder}")
    if _holds_a_home(root):
        raise ValueError(f"{root} is a home directory, or holds one: name the project's own folder with --working-dir")
    return root


def _tracked(root: Path) -> dict[str, Path]:
    """What git tracks below a folder, in submodules too; nothing where it is not of git.

    Raises:
        ValueError: it is of git, which does not answer: without its list whatever lies there would travel, or nothing.
    """
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        return {}
    command = ["git", "-C", str(root), "ls-files", "-z", "--recurse-submodules"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True, timeout=60, env=git.environment()).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr.decode(errors="replace").strip() if isinstance(error, subprocess.CalledProcessError) else ""
        why = next(iter(said.splitlines()), "") or first_line(error)
        raise ValueError(f"{root} is a checkout of git, which does not tell what it tracks ({why}): mend that first") from None
    return _inside(root, (root / name.decode("utf-8", "surrogateescape") for name in listed.split(b"\0") if name))


def _below(folder: Path, root: Path | None = None) -> dict[str, Path]:
    """Every file below a folder but hidden ones and results."""
    found = (path for path in sorted(folder.rglob("*")) if not _left(path.relative_to(folder)))
    return _inside(root or folder, found)


def _left(path: Path) -> bool:
    return any(part in LEFT or part.startswith(".") for part in path.parts)


def _inside(root: Path, paths: Iterator[Path]) -> dict[str, Path]:
    """Files by their names below a folder. A link to somewhere else stays here: it would bring what it points to."""
    return {str(path.relative_to(root)): path for path in paths if path.is_file() and path.resolve().is_relative_to(root)}


def _imported(job: Path) -> set[Path]:
    """A job's file and the modules beside it that it imports, and theirs; this package apart."""
    found, waiting = {job}, [job]
    while waiting:
        for name in _names(waiting.pop()):
            module, package = job.with_name(f"{name}.py"), job.with_name(name)
            inside = [] if package == PACKAGE else [one for one in package.rglob("*.py") if not _left(one.relative_to(job.parent))]
            fresh = ({module} if module.is_file() else set(inside)) - found
            found |= fresh
            waiting += fresh
    return found


def _names(path: Path) -> set[str]:
    """The first parts of what a file imports; nothing of one that cannot be read: whoever loads the job says what is wrong."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return set()
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.partition(".")[0] for name in names}
