"""Tables for people and the report file of a benchmark."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from mmspec.bench.measure import check_final_line, slug, stem

Section = tuple[str, str]


class Output:
    """Where a benchmark talks to: people, unless only the last line is wanted."""

    def __init__(self, *, json_only: bool) -> None:
        """Starts silent or talking."""
        self._json_only = json_only

    def say(self, text: str) -> None:
        """Prints a line for people."""
        if not self._json_only:
            print(text, flush=True)

    def show(self, title: str, text: str) -> None:
        """Prints a section for people."""
        self.say(f"\n{title}\n\n{text}\n")


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table, aligned for the terminal as well.

    Example:
        >>> print(table(["name", "ms"], [["plain", 1.5], ["fast", None]]))
        | name  | ms   |
        |:------|-----:|
        | plain | 1.50 |
        | fast  |    – |
    """
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [
        max([3, len(header), *(len(row[i]) for row in cells)]) for i, header in enumerate(headers)
    ]
    is_text = [
        all(isinstance(row[i], str) for row in rows) or not rows for i in range(len(headers))
    ]
    rules = [
        ":" + "-" * (width + 1) if left else "-" * (width + 1) + ":"
        for width, left in zip(widths, is_text, strict=True)
    ]
    lines = [
        "| " + " | ".join(h.ljust(w) for h, w in zip(headers, widths, strict=True)) + " |",
        "|" + "|".join(rules) + "|",
    ]
    for row in cells:
        padded = [
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_text, strict=True)
        ]
        lines.append("| " + " | ".join(padded) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def percent(share: float | None) -> str | None:
    """A share as text: 0.125 -> ``12.5 %``."""
    return None if share is None else f"{100 * share:.1f} %"


def card_table(card: Sequence[Mapping[str, Any]]) -> str:
    """The static card: one line per configuration and width."""
    names = [name for name in ("model", "dtype", "batch", "guidance") if name in card[0]]
    return table(
        [*names, "tokens per row", "ms", "cost of one = 1", "ceiling"],
        [
            [
                *(str(row[name]) for name in names),
                *(row[name] for name in ("width", "time_ms", "relative", "ceiling")),
            ]
            for row in card
        ],
    )


def markdown(line: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """The report of a final line and its tables."""
    head = [
        f"# mmspec bench {line['benchmark']}" + (f": {line['label']}" if line["label"] else ""),
        "",
        f"- command: `{line['command']}`",
        f"- date: {line['date']} (UTC), {line['time_s'] / 60:.1f} minutes in the last run",
        f"- hardware: {line['device']}; torch threads: {line['threads']}",
        f"- commit: {line['git_sha']}",
        "- versions: " + ", ".join(f"{k} {v}" for k, v in line["versions"].items()),
        f"- fingerprint of source, versions, hardware and threads: `{line['fingerprint']}`",
    ]
    if others := [command for command in line["commands"] if command != line["command"]]:
        head += ["- samples in the same file come from:", *(f"  - `{other}`" for other in others)]
    for title, entries in (("Left out", line["left_out"]), ("Failures", line["failures"])):
        head += ["", f"## {title}", ""]
        head += [f"- {entry}" for entry in entries] or ["- nothing"]
    body = [text for title, section in sections for text in ("", f"## {title}", "", section)]
    return "\n".join([*head, *body]) + "\n"


def publish(
    line: dict[str, Any], sections: Sequence[Section], out: Path, output: Output
) -> dict[str, Any]:
    """Writes the report, prints what is missing and then the final line.

    Args:
        line: Of `mmspec.bench.measure.final_line`.
        sections: Titles and markdown.
        out: Folder for ``<what>[_<label>]_<hardware>_<date>.md``.
        output: Where to print for people.

    Returns:
        ``line``.

    Raises:
        typer.Exit: With code 1 if the line names failures; everything is written by then.
    """
    check_final_line(line)
    out.mkdir(parents=True, exist_ok=True)
    name = stem(line["benchmark"], line["label"])
    path = out / f"{name}_{slug(line['device'])}_{line['date']}.md"
    path.write_text(markdown(line, sections), encoding="utf-8")
    for entry in line["left_out"]:
        output.say(f"left out: {entry}")
    for entry in line["failures"]:
        output.say(f"FAILED: {entry}")
    output.say(f"report: {path}")
    print(json.dumps(line), flush=True)
    if line["failures"]:
        raise typer.Exit(code=1)
    return line
