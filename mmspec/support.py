"""Which models are supported, and which tests show it.

The table is data, written by the test run (``make support``) from the tests themselves; see
``tests/supported.py``. `mmspec models` prints it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DATA = Path(__file__).with_name("support.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportRow:
    """One model family.

    Attributes:
        family: What people call it.
        class_name: Class in transformers.
        adapter: File under ``mmspec/adapters`` that serves it.
        pipeline: What to load it with; "speculate" where it runs inside `generate` only.
        guarantee: What the default rule promises: with "exact", the tokens of plain decoding with
            the same seed. Rules of other guarantees are chosen by name.
        note: What the user has to know besides; may be empty.
        features: What was tested -> ids of the tests, all of which passed.
    """

    family: str
    class_name: str
    adapter: str
    pipeline: str
    guarantee: str
    note: str
    features: Mapping[str, Sequence[str]]


def support_data() -> dict[str, Any]:
    """The file as it is: ``versions`` of the packages of that test run, and ``rows``."""
    data: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))
    return data


def support_table() -> list[SupportRow]:
    """The rows, by pipeline and name."""
    return [SupportRow(**row) for row in support_data()["rows"]]
