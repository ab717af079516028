"""The catalogue of methods is made from what their files say, and the README has it as it is now."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffprune.cli import commands
from diffprune.core import registry
from diffprune.core.fitted import TrainablePruner
from diffprune.report.analysis.labels import Method
from diffprune.report.tables import catalogue

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_is_in_step_with_the_files() -> None:
    text = README.read_text(encoding="utf-8")
    assert catalogue.written(text, catalogue.recorded(README.parent / catalogue.RECORD)) == text, (
        "run: diffprune list pruners --readme README.md"
    )


def test_every_method_has_one_row_that_says_what_it_is() -> None:
    table = catalogue.catalogue()
    rows = {str(row[0]).partition("(")[0]: row for row in table.rows}
    assert sorted(rows) == registry.names("pruners") and len(rows) == len(table.rows)
    assert all(row[1] and "arXiv" not in str(row[1]) for row in table.rows)
    assert rows["visionzip"][2:] == (
        "before the projector", "attention in the vision encoder; keys of the vision encoder", "rule", "2412.04467",
    )  # fmt: skip
    assert rows["divprune"][2] == "after the projector" and rows["unpruned"][2] == "nowhere"
    assert rows["replaced"][2] == "where the method inside does"
    assert rows["fastv"][2] == "after decoder layer 2: 576 → 269 tokens"  # (2 * 576 + 30 * 269) / 32 = 288
    counts = [int(number) for number in str(rows["pyramiddrop"][2]).partition(": ")[2].removesuffix(" tokens").split(" → ")]
    assert (
        counts[0] == 576
        and abs(sum(counts) * 8 / 32 - 288) <= 0.5
        and str(rows["pyramiddrop"][2]).startswith("after decoder layers 8, 16, 24:")
    )


def test_budgets_head_their_columns_as_they_are_spelled() -> None:
    found = {
        text: catalogue._kept(text) for text in ("Share(0.333333)", "Share(0.222222)", "Share(0.05)", "Share(0.1234)", "Keep(64)")
    }
    assert [*found.values()] == ["1/3 kept", "2/9 kept", "1/20 kept", "0.123 kept", "64 kept"]


def test_a_users_method_is_in_the_report_but_not_in_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pruners").mkdir()
    (tmp_path / "pruners" / "norms.py").write_text(
        '"""Long vectors first (after nobody, arXiv 0000.00000). More."""\nfrom diffprune.core.pruner import ScorePruner\n\n'
        'class Norms(ScorePruner):\n    """x"""\n    def score(self, tokens):\n        return tokens.features.norm(dim=-1)\n'
    )
    monkeypatch.setenv("DIFFPRUNE_PLUGINS", str(tmp_path))
    rows = {row[0]: row for row in catalogue.catalogue({"norms"}).rows}
    assert rows["norms"] == ("norms", "Long vectors first", "before the projector", "nothing", "rule", "")
    assert "norms" not in {row[0] for row in catalogue.catalogue().rows}


def test_the_command_writes_between_the_marks_and_refuses_a_page_without(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{catalogue.START}\nold\n{catalogue.END}\nafter\n")
    assert commands.call(["list", "pruners", "--readme", str(page)]) == (0, "")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{catalogue.END}\nafter\n")
    assert "| holov |" in text and "\nold\n" not in text
    page.write_text("nothing here")
    code, told = commands.call(["list", "pruners", "--readme", str(page)])
    assert code == 2 and "has no place for the methods" in told
    code, told = commands.call(["list", "models", "--readme", str(page)])
    assert code == 2 and "write list pruners, not list models" in told


def test_the_report_says_how_trainings_differ() -> None:
    told = [Method(name, name, "trained", False, name) for name in ("diffprune", "atp", "nobody_knows")]
    table = catalogue.apart([*told, Method("Grid", "Grid", "rule", False, "grid"), told[1]])
    assert table is not None and [row[0] for row in table.rows] == ["DiffPrune", "ATP-LLaVA"]
    assert table.rows[0][1] == "As its recipe says." and "the average over layers" in str(table.rows[1][1])
    assert catalogue.apart([]) is None


def test_every_trained_method_but_those_of_the_shared_recipe_says_how_its_training_differs() -> None:
    found = [registry.find("pruners", name) for name in registry.names("pruners")]
    silent = {plugin.label for plugin in found if issubclass(plugin, TrainablePruner) and not plugin.apart}
    assert silent == {"DiffPrune", "Gumbel top-K"}
    assert all(text.endswith(".") for plugin in found if issubclass(plugin, TrainablePruner) for text in plugin.apart)


def test_files_that_a_run_does_not_name_cost_its_page_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pruners").mkdir()
    (tmp_path / "pruners" / "broken.py").write_text("class Foo(\n")
    (tmp_path / "pruners" / "asks.py").write_text(
        '"""Says what it is told."""\nfrom diffprune.core.pruner import ScorePruner\n\n'
        'class Asks(ScorePruner):\n    label = "Asks"\n\n    def __init__(self, what):\n        self.what = what\n\n'
        "    def score(self, tokens):\n        return tokens.features.norm(dim=-1)\n"
    )
    monkeypatch.setenv("DIFFPRUNE_PLUGINS", str(tmp_path))
    package = catalogue.catalogue().rows
    assert catalogue.catalogue({"broken"}).rows == package, "which could be had when the run was made"
    (more,) = set(catalogue.catalogue({"asks", "broken"}).rows) - set(package)
    assert more == ("asks(…)", "Says what it is told", "as its options say", "as its options say", "rule", "")
