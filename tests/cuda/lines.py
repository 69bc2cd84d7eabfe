"""A pytest plugin: a JSON line after each test, `-p tests.cuda.lines --lines FILE`.

Each line is one write at the file's end: a killed run leaves what it had, and several runs at once
may share a file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def append(path: Path, **values: Any) -> None:
    """One line; `part`, `case` and `outcome` are what every line has."""
    text = json.dumps(values, default=str) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lines", "a JSON line for each test")
    group.addoption("--lines", type=Path, help="the file that lines are appended to")
    group.addoption("--lines-part", default="tests", help="`part` of each line")
    group.addoption("--lines-prefix", default="", help="stands before the test in `case`")


def add(config: pytest.Config, case: str, outcome: str, **values: Any) -> None:
    """Appends a line to the run's file, if it has one."""
    path: Path | None = config.getoption("--lines")
    if path is not None:
        case = config.getoption("--lines-prefix") + case
        append(path, part=config.getoption("--lines-part"), case=case, outcome=outcome, **values)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Reporter(config), "gemma2-lines")


class _Reporter:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            add(self.config, report.nodeid, "failed", why=str(report.longrepr)[-2000:])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        values: dict[str, Any] = {"seconds": round(report.duration, 3)}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            values["why"] = str(crash.message if crash else report.longrepr)[:2000]
        elif report.skipped and isinstance(report.longrepr, tuple):
            values["why"] = report.longrepr[2]
        add(self.config, report.nodeid, report.outcome, **values)
