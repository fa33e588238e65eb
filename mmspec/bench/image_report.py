"""What the samples of image generation say: rows for machines, tables for people."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mmspec.bench.measure import Sample, median
from mmspec.bench.quality import FIELDS, grouped, title_of
from mmspec.bench.report import Section, percent, table

#: transformers' ways of making an image: name -> options of ``generate``.
GENERATE: dict[str, dict[str, Any]] = {
    "generate": {},
    "generate_dynamic": {"cache_implementation": "dynamic"},
}
#: End of the names of systems that give the rows of complete images to those that wait.
REFILL = "_refill"
#: Share of the best fixed window's speed, and of plain decoding's, that a chosen window shall have.
GOAL = 0.95


def summarise(samples: Sequence[Sample]) -> list[Sample]:
    """One row per configuration and system."""
    rows = []
    for key, systems in sorted(grouped(samples).items()):
        facts = dict(zip(FIELDS, key, strict=True))
        own = [name for name in GENERATE if name in systems]
        best = min(own, key=lambda name: _seconds(systems[name])) if own else None
        for name, found in systems.items():
            rows.append(
                {"type": "row", **facts, "system": name}
                | _figures(found)
                | {
                    "yardstick": best,
                    "speedup_median": _median_speedup(found, systems.get(best or "", [])),
                    "speedup_over_sequential_median": _median_speedup(
                        found, systems.get("sequential", [])
                    ),
                }
            )
        rows += [{"type": "chosen", **facts, **row} for row in _chosen(systems)]
    return rows


def _chosen(systems: Mapping[str, Sequence[Sample]]) -> list[Sample]:
    """For each decoder that was run with fixed windows and its own: how the two compare."""
    rows = []
    for name, own in systems.items():
        decoder = name.removesuffix("_auto")
        fixed = [n for n in systems if n.startswith(f"{decoder}_w") and not n.endswith(REFILL)]
        if decoder == name or not fixed:
            continue
        best = min(fixed, key=lambda n: _seconds(systems[n]))
        first = [s for s in own if s.get("num_calls_before") == 0]
        later = [s for s in own if s.get("num_calls_before")]
        rows.append(
            {
                "decoder": decoder,
                "best_fixed": best,
                "best_time_s": _seconds(systems[best]),
                "time_s": _seconds(own),
                "mean_width": _mean_width(own),
                "of_best_median": _median_speedup(own, systems[best]),
                "of_best_first_median": _median_speedup(first, systems[best]),
                "of_best_later_median": _median_speedup(later, systems[best]),
                "of_sequential_median": _median_speedup(own, systems.get("sequential", [])),
            }
        )
    return rows


def _mean_width(samples: Sequence[Sample]) -> float | None:
    """Tokens per row and forward, the root included; None where drafts were not counted."""
    steps = sum(s["num_row_steps"] for s in samples)
    drafted = [s["num_drafted"] for s in samples if "num_drafted" in s]
    return 1 + sum(drafted) / steps if len(drafted) == len(samples) else None


def _figures(samples: Sequence[Sample]) -> Sample:
    phases = ("prefill_time_s", "draft_time_s", "verify_time_s", "other_time_s")
    num_images = sum(s["num_images"] for s in samples)

    def share(name: str) -> float | None:
        if not all(name in s for s in samples):
            return None
        return sum(s[name] for s in samples) / num_images

    return {
        "guarantee": samples[0]["guarantee"],
        "window": samples[0]["window"],
        "num_samples": len(samples),
        "num_images": num_images,
        "num_forwards_per_call": sum(s["num_forwards"] for s in samples) / len(samples),
        "mean_width": _mean_width(samples),
        "tau": sum(s["num_units"] for s in samples) / sum(s["num_row_steps"] for s in samples),
        "time_s_per_call": _seconds(samples),
        "images_per_minute": 60 * num_images / sum(s["time_s"] for s in samples),
        "equal_sequential": share("num_rows_equal_sequential"),
        "equal_generate": share("num_rows_equal_generate"),
        "phases_s": {n: sum(s[n] for s in samples) for n in phases if all(n in s for s in samples)},
    }


def _seconds(samples: Sequence[Sample]) -> float:
    return median(s["time_s"] for s in samples) or 0.0


def _median_speedup(samples: Sequence[Sample], base: Sequence[Sample]) -> float | None:
    """Median over calls of the ratio of seconds, same captions and repetition."""
    seconds = {(s["input"], s["repeat"]): s["time_s"] for s in base}
    return median(
        seconds[s["input"], s["repeat"]] / s["time_s"]
        for s in samples
        if (s["input"], s["repeat"]) in seconds
    )


def failures(rows: Sequence[Sample]) -> list[str]:
    """Exactness is a promise where rounding does not decide: float32 and float64."""
    return [
        f"{row['dtype']} guidance {row['guidance']:g} batch {row['batch']}: {row['system']} equals "
        f"sequential in {percent(row['equal_sequential'])} of the images only"
        for row in rows
        if row["type"] == "row"
        and row["dtype"] in ("float32", "float64")
        and row["equal_sequential"] is not None
        and row["equal_sequential"] < 1
    ]


def speed_sections(rows: Sequence[Sample]) -> list[Section]:
    """Summaries over all configurations, then a table for each."""
    found = [row for row in rows if row["type"] == "row"]
    chosen = [row for row in rows if row["type"] == "chosen"]
    groups: dict[str, list[Sample]] = defaultdict(list)
    for row in found:
        more = row["num_images"] // row["num_samples"]
        title = (
            f"{title_of(row)}, {more} images per call" if more != row["batch"] else title_of(row)
        )
        groups[title].append(row)
    sections = _throughput_sections(found)
    if chosen:
        sections.append(("The chosen window against the best fixed one", _chosen_table(chosen)))
    return sections + [(title, _speed_table(group)) for title, group in groups.items()]


def _throughput_sections(rows: Sequence[Sample]) -> list[Section]:
    """Images per minute by batch, one table per dtype and guidance, if there are batches."""
    groups: dict[tuple[str, float], list[Sample]] = defaultdict(list)
    for row in rows:
        groups[row["dtype"], row["guidance"]].append(row)
    sections = []
    for (dtype, guidance), found in groups.items():
        sizes = sorted({row["batch"] for row in found})
        if len(sizes) < 2:
            continue
        per_minute = {(r["system"], r["batch"]): r["images_per_minute"] for r in found}
        speedup = {(r["system"], r["batch"]): r["speedup_median"] for r in found}
        lines = [
            [
                system,
                *(
                    figures.get((system, size))
                    for figures in (per_minute, speedup)
                    for size in sizes
                ),
            ]
            for system in dict.fromkeys(row["system"] for row in found)
        ]
        headers = [f"batch {size}" for size in sizes]
        headers += [f"× transformers, batch {size}" for size in sizes]
        title = f"Images per minute, {dtype}, guidance {guidance:g}"
        sections.append((title, table(["system", *headers], lines)))
    return sections


def _chosen_table(rows: Sequence[Sample]) -> str:
    headers = ["configuration", "decoder", "best fixed", "s/call", "chosen s/call", "mean width"]
    headers += ["best fixed = 1", "first call", "later calls", "× sequential", f"both >= {GOAL}"]
    names = [
        *("decoder", "best_fixed", "best_time_s", "time_s", "mean_width", "of_best_median"),
        *("of_best_first_median", "of_best_later_median", "of_sequential_median"),
    ]
    lines = []
    for row in rows:
        ratios = row["of_best_median"], row["of_sequential_median"]
        is_met = all(value is None or value >= GOAL for value in ratios)
        lines.append([title_of(row), *(row[name] for name in names), "yes" if is_met else "no"])
    return table(headers, lines)


def _speed_table(rows: Sequence[Sample]) -> str:
    headers = ["system", "guarantee", "forwards", "mean width", "tau", "s/call", "images/min"]
    headers += ["× transformers (median)", "× sequential (median)", "= sequential", "= generate"]
    names = [
        *("system", "guarantee", "num_forwards_per_call", "mean_width", "tau", "time_s_per_call"),
        *("images_per_minute", "speedup_median", "speedup_over_sequential_median"),
    ]
    return table(
        headers,
        [
            [row[name] for name in names]
            + [percent(row["equal_sequential"]), percent(row["equal_generate"])]
            for row in rows
        ],
    )
