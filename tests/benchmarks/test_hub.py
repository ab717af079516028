"""Folders and the hub: layouts, revisions, counts that do not fit, and a download from a hub that is a folder of this test."""

from __future__ import annotations

import fnmatch
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fixtures as made
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from diffprune.benchmarks import _fixtures
from diffprune.cli import commands
from diffprune.core import registry
from diffprune.io import dataset_manifest, dataset_rows, hub

COMMIT = "4db1276" + "0" * 33


class Hub:
    """The few calls of the hub's client that we make, answered from a folder; `homes`: namespaces that exist."""

    remote: ClassVar[Path]
    homes: ClassVar[tuple[str, ...]]
    commit: ClassVar[str]
    loaded: ClassVar[list[str]]

    def _known(self, repository: str) -> Path:
        home, name = repository.split("/")
        if home not in self.homes:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        return self.remote / name

    def dataset_info(self, repository: str, revision: str) -> Any:
        self._known(repository)
        return SimpleNamespace(sha=self.commit)

    def list_repo_commits(self, repository: str, repo_type: str) -> list[Any]:
        self._known(repository)
        return [SimpleNamespace(commit_id="f" * 40), SimpleNamespace(commit_id=self.commit)]

    def snapshot_download(self, repository: str, **asked: Any) -> str:
        source, target = self._known(repository), Path(asked.get("local_dir") or self.remote / "cache")
        assert asked["revision"] == self.commit, "a full hash, never a branch"
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            name = str(path.relative_to(source))
            if any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"]):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)
                self.loaded.append(name)
        return str(target)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    """Fixture rows as a hub would have them, without our manifest, under the old namespace only."""
    Hub.remote, Hub.homes, Hub.commit, Hub.loaded = tmp_path / "hub", ("lmms-lab",), COMMIT, []
    for name in ("pope", "gqa", "vizwiz"):
        folder = _fixtures.write(tmp_path / "made", name)
        (folder / dataset_manifest.MANIFEST).unlink()
        shutil.move(folder, tmp_path / "hub" / registry.load("benchmarks", name).source.name)
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setenv("DIFFPRUNE_DATA", str(tmp_path / "data"))
    for name, rows, groups in (("pope", 18, 3), ("gqa", 8, 4), ("vizwiz", 5, 5)):
        kind = registry.find("benchmarks", name)
        few = {"rows": {kind.splits[0]: (rows,)}, "groups": {kind.splits[0]: (groups,)}}
        monkeypatch.setattr(kind, "source", kind.source.__class__(**{**vars(kind.source), **few}))
    return Hub


def test_fetch_finds_the_old_home_verifies_and_pins(remote: type[Hub], tmp_path: Path) -> None:
    bench = registry.load("benchmarks", "pope")
    with pytest.raises(ValueError, match=r"pope is not on this machine .* run `diffprune fetch pope`, or give folder="):
        bench.samples("test")
    said = bench.fetch()
    assert said.startswith("pope: 18 rows in 3 groups, 0.0 MiB, revision pope@4db127600000, in ")
    fresh = registry.load("benchmarks", "pope")
    assert fresh.revision == "pope@4db127600000" and len(fresh.samples("test")) == 18
    manifest = json.loads((tmp_path / "data" / "POPE" / dataset_manifest.MANIFEST).read_text())
    assert (manifest["repository"], manifest["commit"], manifest["pinned"]) == ("lmms-lab/POPE", COMMIT, True)
    assert manifest["splits"]["default/test"]["rows"] == 18 and len(manifest["splits"]["default/test"]["hash"]) == 64
    assert registry.load("benchmarks", f"pope(folder={str(tmp_path / 'data' / 'POPE')!r})").revision == fresh.revision


def test_only_what_is_needed_is_downloaded(remote: type[Hub], tmp_path: Path) -> None:
    extra = remote.remote / "GQA" / "train_all_images" / "train-00000-of-00001.parquet"
    dataset_rows.write_parquet(extra, [{"id": "x"}])
    bench = registry.load("benchmarks", "gqa")
    assert "(unpinned: main is at 4db127600000 now)" in bench.fetch(tmp_path / "here")
    assert len(remote.loaded) == 3 and not any("train" in name for name in remote.loaded)
    assert made.load("gqa", tmp_path / "here").image(made.load("gqa", tmp_path / "here").samples("test")[0]).mode == "RGB"


def test_a_card_tells_where_files_with_other_names_are(remote: type[Hub]) -> None:
    folder = remote.remote / "VizWiz-VQA"
    shutil.move(folder / "data" / "val-00000-of-00001.parquet", folder / "odd.parquet")
    with pytest.raises(ValueError, match="has no file of configuration 'default', split 'val'"):
        registry.load("benchmarks", "vizwiz").fetch()
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: val\n    path: odd.*\n---\n# A card\n"
    (folder / "README.md").write_text(card)
    assert registry.load("benchmarks", "vizwiz").fetch().startswith("vizwiz: 5 rows")
    assert len(registry.load("benchmarks", "vizwiz").samples("test")) == 5


def test_rows_that_changed_after_the_download_are_refused(remote: type[Hub], tmp_path: Path) -> None:
    registry.load("benchmarks", "pope").fetch()
    path = tmp_path / "data" / "POPE" / "data" / "test-00000-of-00001.parquet"
    rows = made.rows("pope")
    rows[0]["answer"] = "yes"
    dataset_rows.write_parquet(path, rows)
    with pytest.raises(ValueError, match="the rows of split 'test' are not those that were fetched"):
        registry.load("benchmarks", "pope").samples("test")
    assert registry.load("benchmarks", "pope").fetch().startswith("pope: 18 rows"), "fetching again repairs it"


def test_downloads_with_wrong_counts_or_moved_commits_are_refused(remote: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    registry.load("benchmarks", "gqa").fetch()
    remote.commit = "a" * 40
    with pytest.raises(ValueError, match=r"GQA holds commit 4db1276.*remove the folder or choose another"):
        registry.load("benchmarks", "gqa").fetch()
    with pytest.raises(ValueError, match="POPE has 0 commits that begin with 4db1276, one is needed"):
        registry.load("benchmarks", "pope").fetch()
    kind = registry.find("benchmarks", "vizwiz")
    monkeypatch.setattr(kind, "source", kind.source.__class__(**{**vars(kind.source), "rows": {"val": (4_319,)}}))
    with pytest.raises(ValueError, match="vizwiz as downloaded does not have the published number of rows"):
        registry.load("benchmarks", "vizwiz").fetch()
    with pytest.raises(ValueError, match="has 5 rows where 4,319 belong: run `diffprune fetch vizwiz` again"):
        registry.load("benchmarks", "vizwiz").samples("test")


def test_no_home_and_no_network(remote: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    remote.homes = ()
    with pytest.raises(ValueError, match="the hub has none of lmms-lab-encoder/GQA, lmms-lab/GQA: it has moved"):
        registry.load("benchmarks", "gqa").fetch()

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Hub, "dataset_info", offline)
    with pytest.raises(
        ValueError, match=r"cannot be asked for lmms-lab-encoder/GQA \(no route to host\): try again where there is"
    ):
        registry.load("benchmarks", "gqa").fetch()
    monkeypatch.setattr(Hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"own/data at main is not on this machine and could not be downloaded \(no route"):
        hub.files("own/data", "main", ["*.parquet"])


def test_files_of_any_repository(remote: type[Hub]) -> None:
    found = hub.files("lmms-lab/GQA", COMMIT, ["testdev_balanced_instructions/*.parquet"])
    assert [path.name for path in found] == ["testdev-00000-of-00002.parquet", "testdev-00001-of-00002.parquet"]
    with pytest.raises(ValueError, match=r"has no file like \*.jsonl"):
        hub.files("lmms-lab/GQA", COMMIT, ["*.jsonl"])


def test_fetch_on_the_command_line(remote: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.call(["fetch", "pope", "world('pope')", "--out", "there"]) == (0, "")
    out = capsys.readouterr().out
    assert "pope: 18 rows in 3 groups" in out and "in there/POPE" in out and "world(like='pope'): nothing to download" in out
    assert commands.call(["fetch", "pope(folder='there/POPE')"]) == (0, "")
    assert "revision pope@4db127600000" in capsys.readouterr().out
    code, sentence = commands.call(["fetch", "popo"])
    assert code == 2 and "did you mean 'pope'" in sentence


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_with_other_counts_is_incomplete_and_says_so(tmp_path: Path) -> None:
    bench = made.write(tmp_path, "pope", made.rows("pope"))
    assert bench.revision.startswith("pope@rows-") and bench.revision.endswith(" incomplete")
    assert bench.samples("test", 4)[0].row["answer"] in ("yes", "no")


def test_a_revision_follows_the_content(tmp_path: Path) -> None:
    records = made.rows("seed")  # whose published count is not known for certain
    first = made.write(tmp_path / "a", "seed", records).revision
    assert first.startswith("seed@rows-") and " " not in first
    assert made.write(tmp_path / "b", "seed", records).revision == first
    records[1]["question"] += " "
    assert made.write(tmp_path / "c", "seed", records).revision != first
    path = tmp_path / "a" / "data" / "test-00000-of-00001.parquet"
    shutil.copy(tmp_path / "c" / "data" / path.name, path)
    assert made.load("seed", tmp_path / "a").revision != first, "a changed file is read again"


@pytest.mark.parametrize("place", ["dev.parquet", "en/dev.parquet", "dev-00000-of-00001.parquet", "en-dev.parquet"])
def test_layouts(tmp_path: Path, place: str) -> None:
    dataset_rows.write_parquet(tmp_path / place, made.rows("mmbench"))
    assert len(made.load("mmbench", tmp_path).samples("test")) == 12


def test_a_tsv_gives_what_parquet_gives(fixtures: Path, tmp_path: Path) -> None:
    for name in ("mmbench", "mmbench_cn"):
        made.tsv(tmp_path / name / f"{name}_dev_20230712.tsv", made.rows(name))
        parquet, tsv = made.load(name, fixtures / name), made.load(name, tmp_path / name)
        for protocol in parquet.protocols:
            pairs = list(zip(parquet.samples("test", None, protocol), tsv.samples("test", None, protocol), strict=True))
            for one, two in pairs:
                asked = one.question.removeprefix("nan ")  # a hint that pandas takes for nothing
                assert (one.id, one.group, one.category, asked) == (two.id, two.group, two.category, two.question)
                assert parquet.image(one).tobytes() == tsv.image(two).tobytes()
                assert parquet.grade(one, "C", protocol) == tsv.grade(two, "C", protocol)
    (tmp_path / "mmbench" / "mmbench_dev_2.tsv").write_text("index\n")
    with pytest.raises(ValueError, match="could all be split 'dev'; leave one of them"):
        made.load("mmbench", tmp_path / "mmbench").samples("test")


def test_a_tsv_with_a_picture_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    made.tsv(path, made.rows("mmbench")[:4])
    text = path.read_text()
    path.write_text(text.replace("\t0\tmade", "\t7\tmade", 1).replace("iVBOR", "!VBOR"))
    bench = made.load("mmbench", tmp_path)
    samples = bench.samples("test")
    with pytest.raises(ValueError, match=r"picture of mmbench 0 .*column 'image' is no base64"):
        bench.image(samples[0])
    with pytest.raises(ValueError, match="points to the picture of index 7, which is not there"):
        bench.image(samples[1])


@pytest.mark.parametrize(("cache_bytes", "reads"), [(2**20, [0, 1, 2, 3]), (5000, [0, 1, 2, 3, 1, 0]), (1, [0, 1, 2, 3, 2, 1, 0])])
def test_pictures_are_read_by_row_group_and_the_last_ones_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_bytes: int, reads: list[int]
) -> None:
    path = tmp_path / "rows.parquet"
    pictures = [{"bytes": bytes([i]) * 1000, "path": None} for i in range(8)]
    dataset_rows.write_parquet(path, [{"id": i, "image": picture} for i, picture in enumerate(pictures)], row_group=2)
    found, whole = [], pq.ParquetFile.read_row_group

    def counted(self: Any, group: int, columns: list[str]) -> Any:
        found.append(group)
        return whole(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    monkeypatch.setattr(dataset_rows, "CACHE_BYTES", cache_bytes)
    rows = dataset_rows.read(dataset_rows.DatasetFiles((path,), ("id",)))
    assert rows.records[3] == {"id": 3} and found == []
    for row in [*range(8), *reversed(range(8))]:
        assert rows.pictures[row] == pictures[row]
    assert found == reads
    assert pickle.loads(pickle.dumps(rows)).pictures[5] == pictures[5]
