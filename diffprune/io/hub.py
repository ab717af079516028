"""Downloads from the Hugging Face Hub at a fixed commit, and scorers uploaded to it. Only `diffprune fetch` and `push`, training
sources and scorers named by a repository use the network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from diffprune.core.benchmark import HubDataset
from diffprune.core.errors import first_line
from diffprune.core.registry import nearest
from diffprune.io.blob_store import remote
from diffprune.io.checkpoint import CONFIG, FILE
from diffprune.io.dataset_manifest import Manifest
from diffprune.io.dataset_splits import card_patterns, patterns, split_files
from diffprune.io.scorer_card import HUB_NAME

FULL_HASH = 40


def data_folder(name: str) -> Path:
    """Where a repository of this name is kept: below DIFFPRUNE_DATA, or ~/.cache/diffprune."""
    return Path(os.environ.get("DIFFPRUNE_DATA") or "~/.cache/diffprune").expanduser() / name


def resolve(api: HfApi, source: HubDataset) -> tuple[str, str]:
    """(repository, full commit hash): the first home that has the repository.

    Raises:
        ValueError: no home has it, it has no such commit, or the hub cannot be reached.
    """
    for repository in source.repositories:
        try:
            if source.pinned and len(source.commit) < FULL_HASH:
                commits = [c.commit_id for c in api.list_repo_commits(repository, repo_type="dataset")]
                known = [commit for commit in commits if commit.startswith(source.commit)]
                if len(known) != 1:
                    raise ValueError(f"{repository} has {len(known)} commits that begin with {source.commit}, one is needed")
                return repository, known[0]
            found = api.dataset_info(repository, revision=source.commit).sha
            assert found, "the hub names the commit of what it describes"
            return repository, found
        except RepositoryNotFoundError:
            continue
        except ValueError:
            raise
        except Exception as error:  # the HTTP library below the client changes from version to version, and so do its errors
            raise ValueError(
                f"the hub cannot be asked for {repository} ({first_line(error)}): try again where there is a network"
            ) from None
    raise ValueError(f"the hub has none of {', '.join(source.repositories)}: it has moved; pass folder= with a copy of it")


def fetch(source: HubDataset, parts: Sequence[tuple[str, str]], folder: Path) -> Manifest:
    """Download the (configuration, split) `parts` of a source into `folder`; what is there already is not loaded again.

    The manifest is returned, not written: the caller verifies the rows first.

    Raises:
        ValueError: the hub cannot be reached, or lacks the repository, the commit or a split.
    """
    api = HfApi()
    repository, commit = resolve(api, source)
    before = Manifest.read(folder)
    if before and before.commit != commit:  # shards of two commits side by side would be read as one table
        raise ValueError(f"{folder} holds commit {before.commit}, {repository} is at {commit}: remove the folder or choose another")
    folder.mkdir(parents=True, exist_ok=True)
    for config, split in parts:
        _load(api, repository, commit, [*patterns(config, split), "README.md"], folder)
        try:
            split_files(folder, config, split)
        except ValueError:
            if not (more := card_patterns(folder, config, split)):
                raise
            _load(api, repository, commit, more, folder)
            split_files(folder, config, split)
    return Manifest(repository, commit, source.pinned, dict(before.splits) if before else {})


def _load(api: HfApi, repository: str, commit: str, wanted: Sequence[str], folder: Path) -> None:
    try:
        api.snapshot_download(repository, repo_type="dataset", revision=commit, local_dir=folder, allow_patterns=list(wanted))
    except Exception as error:  # see `resolve`
        raise ValueError(f"{repository} could not be downloaded ({first_line(error)}): the same command continues") from None


def files(repository: str, revision: str, wanted: Sequence[str], kind: str = "dataset") -> list[Path]:
    """Files of a repository that match the patterns, in the hub's own cache, downloaded where they are not there yet.

    kind: "dataset" or "model".

    Raises:
        ValueError: not in the cache and not to be had, or nothing matches.
    """
    try:
        folder = HfApi().snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=list(wanted))
    except Exception as error:  # see `resolve`
        where = f"{repository} at {revision}"
        raise ValueError(f"{where} is not on this machine and could not be downloaded ({first_line(error)})") from None
    found = sorted({path for pattern in wanted for path in Path(folder).glob(pattern) if path.is_file()})
    if not found:
        raise ValueError(f"{repository} at {revision} has no file like {', '.join(wanted)}")
    return found


def scorer_folder(name: str, revision: str = "main") -> Path:
    """The folder of a scorer, here or in a bucket, fetched if it is one of the Hub's.

    Raises:
        ValueError: neither a folder nor a name of the Hub, or not to be had.
    """
    if remote(name) or os.path.isdir(name):  # unlike `Path.is_dir`, False for what no file can be called
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"no scorer {name!r:.200}: give a folder with config.json and {FILE}, or a name of the Hub, 'owner/name'")
    refuse_mistyped(name)
    try:
        found = files(name, revision, (CONFIG, FILE), kind="model")
    except ValueError as error:
        raise ValueError(f"there is no folder {name} here, and {error}") from None
    return next((path.parent for path in found if path.name == CONFIG), found[0].parent)


def refuse_mistyped(name: str) -> None:
    """Refuse `runs/nope` where there is a folder `runs` here and the Hub's cache has no repository of this name: it is meant as a
    folder, and nobody is asked for it.

    Raises:
        ValueError: there is no such folder; names the nearest one beside it.
    """
    owner, _, last = name.partition("/")
    if not os.path.isdir(owner):
        return
    with suppress(ValueError):  # what the Hub's client takes for no name
        if isinstance(try_to_load_from_cache(name, CONFIG), str):
            return
    beside = sorted(path.name for path in Path(owner).iterdir() if path.is_dir())
    hint = f"{owner} has {', '.join(beside[:10])}: {nearest(last, beside)}" if beside else f"{owner} has no folder"
    raise ValueError(
        f"there is no folder {name} here ({hint}); if a repository of the Hub is meant, download it first: `diffprune fetch {name}`"
    )


def upload(folder: Path, name: str, *, private: bool, revision: str = "main") -> str:
    """Upload a scorer's three files to a model repository, which is made where there is none; returns the commit's address.

    name: "owner/name"; who asks is known by the Hub's own login (`hf auth login`, or HF_TOKEN).

    Raises:
        ValueError: no such name, or the Hub cannot be reached or refuses.
    """
    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"{name!r:.200} is no name of the Hub: write 'owner/name'")
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        wanted = [CONFIG, FILE, "README.md"]
        done = api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=wanted, revision=revision, commit_message="Upload a diffprune scorer"
        )
    except Exception as error:  # see `resolve`
        refused = isinstance(error, HfHubHTTPError)  # the Hub was reached
        hint = "log in with `hf auth login`, or set HF_TOKEN" if refused else "try again where there is a network"
        raise ValueError(f"{name} could not be written ({first_line(error)}): {hint}") from None
    return str(done.commit_url)
