"""The table of what came of the trials, printed at the end: hooks of pytest's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    if (mark := item.get_closest_marker("trial")) and mark.args:
        report.user_properties = [("trial", mark.args[0]), ("load", os.getloadavg()[0])]
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = []
    for result in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(result, []):
            about = dict(getattr(report, "user_properties", ()))
            if "trial" in about and (report.when == "call" or result != "passed"):
                name = report.nodeid.partition("::")[2]
                rows.append(
                    (about["trial"], f"{about['trial']:>5}  {result:7}  {report.duration:7.1f}  {about['load']:5.1f}  {name}")
                )
    if rows:
        terminalreporter.write_line("trial  result   seconds   load  test")
    for _, text in sorted(rows):
        terminalreporter.write_line(text)
