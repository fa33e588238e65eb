"""The table of supported models, collected from the tests that are marked with `supports`.

    @pytest.mark.supports("greedy", FAMILY)
    @pytest.mark.supports("greedy", {"parameter": FAMILY, ...})

The first says that a test shows a feature of a family; the second says it of a test's parameters,
each of which stands for a family; parameters that the mapping lacks say nothing.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "mmspec" / "support.json"
PAGE = ROOT / "docs" / "support.md"

#: What a test can show, in the order of the table.
FEATURES = {
    "greedy": "greedy tokens are those of transformers' `generate`, or of its modules where the "
    "class has no `generate` of its own",
    "sampled": "with a seed, sampled tokens are those of plain decoding with that seed",
    "batches": "rows of different lengths at once",
    "sliding windows": "attention over the last tokens only, in some or all layers",
    "images": "rows with no, one and several images, which matter to the tokens",
    "videos": "rows with videos, which matter to the tokens",
    "model drafter": "a second model of the same tokens drafts; it reads the images, if any",
    "visual shares": "that model reads a share of the visual tokens only",
    "parts": "long prompts are read in parts (`prefill_chunk_size`)",
    "text drafter": "a model that reads the text only drafts",
    "cached turns": "a turn behind the reused cache of an earlier one",
    "processor": "from prompts through the family's own processor or tokenizer, in the pipeline",
    "target pipeline": "the bits of the target's pipeline in diffusers where it writes all blocks",
    "trained weights": "trained weights beside tiny random ones",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Supported:
    """One model family.

    Attributes:
        family: What people call it.
        class_name: Class in transformers.
        adapter: File under ``mmspec/adapters`` that serves it.
        pipeline: What to load it with; "speculate" where it runs inside `generate` only.
        guarantee: What the default rule promises.
        note: What the user has to know besides.
    """

    family: str
    class_name: str
    adapter: str
    pipeline: str
    guarantee: str = "exact"
    note: str = ""


def shown(item: pytest.Item) -> set[tuple[Supported, str]]:
    """Families and features that a test shows.

    Raises:
        pytest.UsageError: If a feature is not in the list.
    """
    callspec = getattr(item, "callspec", None)
    parameters = [] if callspec is None else list(callspec.params.values())
    found = set()
    for mark in item.iter_markers("supports"):
        feature, families = mark.args
        if feature not in FEATURES:
            known = ", ".join(FEATURES)
            raise pytest.UsageError(f"{item.nodeid}: unknown feature {feature!r}; known: {known}")
        if isinstance(families, Supported):
            found.add((families, feature))
        else:
            names = [name for name in parameters if isinstance(name, str) and name in families]
            found |= {(families[name], feature) for name in names}
    return found


def rows_of(items: Iterable[pytest.Item]) -> list[dict[str, Any]]:
    """One row per family with the ids of the tests of each feature."""
    tests: dict[Supported, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        for family, feature in shown(item):
            tests[family][feature].append(item.nodeid)
    rows = [
        asdict(family) | {"features": {name: sorted(own[name]) for name in FEATURES if name in own}}
        for family, own in tests.items()
    ]
    return sorted(rows, key=lambda row: (row["pipeline"], row["family"].lower()))


def named_tests(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """Every test that a table names."""
    return {test for row in rows for tests in row["features"].values() for test in tests}


def data_of(rows: list[dict[str, Any]]) -> str:
    """The data file of a table whose tests have passed."""
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n"


def page_of(data: Mapping[str, Any]) -> str:
    """The documentation page of a data file."""
    lines = [
        "# Supported models",
        "",
        "Written by `make support` from the tests that carry the marker `supports`, not by hand.",
        "All of them passed with "
        + ", ".join(f"{k} {v}" for k, v in data["versions"].items())
        + ".",
        "`mmspec models --json` names each test.",
        "",
        "| family | class in transformers | adapter | load it with | guarantee | tested |",
        "|:-------|:----------------------|:--------|:-------------|:----------|:-------|",
    ]
    for row in data["rows"]:
        cells = [row["family"], f"`{row['class_name']}`", f"`{row['adapter']}`"]
        cells += [
            f"`{row['pipeline']}`",
            row["guarantee"],
            "; ".join(filter(None, [", ".join(row["features"]), row["note"]])),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    used = {name for row in data["rows"] for name in row["features"]}
    lines += ["", "Models are tiny and random unless the weights are said to be trained.", ""]
    lines += [f"- **{name}**: {FEATURES[name]}." for name in FEATURES if name in used]
    return "\n".join(lines) + "\n"


class SupportPlugin:
    """Collects the table; with ``--write-support`` writes it once all of its tests passed.

    Attributes:
        rows: The table of all collected tests, those left out by ``-m`` or ``-k`` included.
        files: Files whose tests were collected.
    """

    def __init__(self, *, writes: bool) -> None:
        """Knows no test yet."""
        self.rows: list[dict[str, Any]] = []
        self.files: set[str] = set()
        self._writes = writes
        self._passed: set[str] = set()
        self._failed: set[str] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Reads the markers before anything is left out."""
        self.rows = rows_of(items)
        self.files = {item.nodeid.partition("::")[0] for item in items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps what passed."""
        if report.failed:
            self._failed.add(report.nodeid)
        elif report.passed and report.when == "call":
            self._passed.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Writes both files, or refuses with the tests that did not pass."""
        if not self._writes:
            return
        missing = sorted(named_tests(self.rows) - (self._passed - self._failed))
        if missing or not self.rows:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            print("\nsupport table not written; did not pass:", *missing, sep="\n  ")  # noqa: T201
            return
        text = data_of(self.rows)
        DATA.write_text(text, encoding="utf-8")
        PAGE.write_text(page_of(json.loads(text)), encoding="utf-8")
