"""Rows and tables of `mmspec bench video`: quality, equal time, costs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mmspec.bench.measure import Sample, median, ratio
from mmspec.bench.report import Section, percent, table
from mmspec.bench.video_costs import (
    BATCHED,
    JUDGING_GOAL,
    Costs,
    Counts,
    affordable,
    is_within,
    published_costs,
    published_rows,
    published_section,
    published_sight_rows,
    published_sight_section,
)
from mmspec.bench.video_runs import DIFFUSERS
from mmspec.bench.video_setups import BASELINES, Setup, baseline_of, scorer_name
from mmspec.bench.video_statistics import Estimate, Paired

PHASES = ("target", "draft", "decode", "judge", "rest")


def measured_costs(samples: Sequence[Sample], num_blocks: int) -> tuple[Costs, dict[str, float]]:
    """Medians over timed videos, and of each combination of scorers the seconds per picture.

    Of a video the mean counts: with medians, prices would not add up to what was timed.

    Args:
        samples: Of `mmspec.bench.video_runs.time_tasks`.
        num_blocks: Of a video; without a judge each is decoded once.
    """
    ours = [s for s in samples if s["system"] != DIFFUSERS]
    plain = [s for s in ours if not s["scorers"]]

    def of(name: str) -> float:
        return median(s["forward_s"][name] for s in ours if s["forward_s"][name] is not None) or 0.0

    pictures: dict[str, list[float]] = defaultdict(list)
    for s in ours:
        if s["pictures"]:
            scoring_s = s["phases_s"]["judge"] - s["preview_s"]
            pictures["+".join(s["scorers"])].append(scoring_s / s["pictures"])
    names = ("target_forward", "target_read", "drafter_forward", "drafter_read")
    forwards = {name: of(name) for name in names}
    costs = Costs(
        **forwards,
        decode=(median(s["phases_s"]["decode"] for s in plain) or 0.0) / num_blocks,
        preview=median(s["preview_s"] / s["previews"] for s in ours if s["previews"]) or 0.0,
        rest=max(0.0, median(s["phases_s"]["rest"] for s in plain) or 0.0),
    )
    return costs, {name: median(found) or 0.0 for name, found in pictures.items()}


def measured_preview_ratio(samples: Sequence[Sample], num_blocks: int) -> float:
    """Seconds of a block's previews over those of decoding it; 1 where either is not measured."""
    costs, _ = measured_costs(samples, num_blocks)
    return costs.preview / costs.decode if costs.preview and costs.decode else 1.0


def summarise(
    setups: Sequence[Setup],
    videos: Sequence[Sample],
    times: Sequence[Sample],
    costs: Costs,
    picture_s: Mapping[str, float],
    *,
    seed: int,
) -> list[Sample]:
    """One row per setup.

    Args:
        setups: In order.
        videos: Samples of quality; prompts that lack a setup are left out.
        times: Samples of time.
        costs: Of everything but pictures.
        picture_s: Seconds of a picture, by scorers with "+" between.
        seed: Of the bootstrap.
    """
    by_setup: dict[str, dict[int, Sample]] = {setup.name: {} for setup in setups}
    for sample in videos:
        by_setup[sample["setup"]][sample["prompt"]] = sample
    prompts = sorted(set.intersection(*(set(found) for found in by_setup.values())))
    if not prompts:
        return []
    found = {name: [of[p] for p in prompts] for name, of in by_setup.items()}
    prices = {s.name: _priced(costs, s, picture_s) for s in setups}
    paired = Paired(
        list(found),
        [[one["scores"]["quality"] for one in of] for of in found.values()],
        [[prices[name].seconds(Counts.mean([one])) for one in of] for name, of in found.items()],
        [[one["kept"] / len(one["sources"]) for one in of] for of in found.values()],
        seed=seed,
    )
    walls = _walls(times)
    return [
        {"type": "setup", "setup": setup.name, "num_prompts": len(prompts)}
        | _quality_row(setup, list(found), paired)
        | _time_row(setup.name, paired, walls, [s for s in times if s["system"] == setup.name])
        | {"same_blocks": _same_blocks(setup.name, times, by_setup[setup.name])}
        | _count_row(found[setup.name], prices[setup.name])
        for setup in setups
    ]


def _priced(costs: Costs, setup: Setup, picture_s: Mapping[str, float]) -> Costs:
    return Costs(**asdict(costs) | {"picture": picture_s.get("+".join(setup.scorers), 0.0)})


def _walls(times: Sequence[Sample]) -> dict[str, dict[tuple[int, int], float]]:
    walls: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for s in times:
        walls[s["system"]][s["prompt"], s["repeat"]] = s["time_s"]
    return walls


def _quality_row(setup: Setup, names: Sequence[str], paired: Paired) -> Sample:
    name, has_target = setup.name, "never" in names
    retained = paired.retained(name, "never") if has_target else None
    row: Sample = {
        "quality": paired.quality(name).to_list(),
        "over_target": paired.difference(name, "never").to_list() if has_target else None,
        "retained": retained.to_list() if retained is not None else None,
        "over": {},
    }
    for baseline in BASELINES:
        members = baseline_of(baseline, names)
        if name in members or len(members) < 2:
            continue
        estimate = paired.at_equal_time(name, members)
        row["over"][baseline] = estimate.to_list() if estimate is not None else None
    members = baseline_of(setup.chance, names) if setup.chance is not None else []
    choice = paired.at_equal_share(name, members) if len(members) > 1 else None
    row["over_chance"] = choice.to_list() if choice is not None else None
    return row


def _time_row(
    name: str,
    paired: Paired,
    walls: Mapping[str, Mapping[tuple[int, int], float]],
    own: Sequence[Sample],
) -> Sample:
    theirs, ours = walls.get(DIFFUSERS, {}), walls.get(name, {})
    phases = {p: median(s["phases_s"][p] for s in own) for p in PHASES} if own else {}
    return {
        "model_s": paired.seconds(name),
        "wall_s": median(ours.values()),
        "speedup_wall": median(theirs[run] / ours[run] for run in ours if run in theirs),
        "num_timed": len(own),
        "first_s": median(s["first_s"] for s in own),
        "wall_diffusers_s": median(theirs.values()),
        "phases_s": phases,
        "judging_wall_share": median(
            (s["phases_s"]["judge"] + s["vain_s"]) / s["time_s"] for s in own
        ),
    }


def _same_blocks(name: str, times: Sequence[Sample], videos: Mapping[int, Sample]) -> float | None:
    own = [s for s in times if s["system"] == name and s["prompt"] in videos]
    return ratio(sum(s["sources"] == videos[s["prompt"]]["sources"] for s in own), len(own))


def _count_row(samples: Sequence[Sample], costs: Costs) -> Sample:
    counts = Counts.mean(samples)
    total = {name: sum(s[name] for s in samples) for name in ("kept", "judged", "offered")}
    num_blocks = sum(len(s["sources"]) for s in samples)
    num_vain = counts.decodes - num_blocks / len(samples)
    return {
        "counts": asdict(counts),
        "share_kept": total["kept"] / num_blocks,
        "share_kept_of_judged": ratio(total["kept"], total["judged"] or None),
        "decodes_beyond": num_vain,
        "judging_share": costs.judging_share(counts),
        "judging_decoding_share": costs.judging_share(counts, num_vain),
        "affordable_ms": _milli(affordable(costs, counts)),
        "picture_ms": 1e3 * costs.picture,
        "offered": total["offered"] / len(samples),
        "num_blocks": num_blocks / len(samples),
    }


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


# --------------------------------------------------------------------------- tables


def sections(
    rows: Sequence[Sample],
    exits: Sequence[Sample],
    agreements: Sequence[Sample],
    costs: Costs,
    picture_s: Mapping[str, float],
    drafter_steps: int,
    preview_ratio: float,
) -> list[Section]:
    """All tables."""
    if not rows:
        return []
    refused = refused_share(exits)
    published = published_rows(refused)
    loops = _loop_table(rows, drafter_steps, preview_ratio)
    sights = published_sight_rows(preview_ratio)
    return [
        (f"Quality and time, {rows[0]['num_prompts']} prompts", _quality_table(rows)),
        ("Quality over the baselines, at equal time and at equal share", _baseline_table(rows)),
        ("What was done per video", _count_table(rows)),
        ("Seconds per video, timed", _phase_table(rows)),
        ("Prices", _price_table(costs, picture_s)),
        ("Decisions of a scorer that is shown less", _agreement_table(agreements)),
        ("Early exit: pictures scored of a refused draft", _exit_table(exits)),
        ("The same decisions in two loops, at published prices", loops),
        published_section(published, refused),
        published_sight_section(sights, preview_ratio),
    ]


def refused_share(exits: Sequence[Sample]) -> float:
    """Mean share of the pictures that is scored of a refused draft, where all are shown."""
    exits = [row for row in exits if row["scorer"] == scorer_name(row["scorer"])]
    refused = sum(row["refused"] for row in exits)
    scored = sum(row["refused"] * row["first"] for row in exits if row["refused"])
    return scored / refused if refused else 1.0


def _exit_table(exits: Sequence[Sample]) -> str:
    lines = [
        [
            "+".join(filter(None, [row["base"], f"{row['scorer']}@{row['rate']:g}"])),
            row["refused"],
            *(percent(row[name]) for name in ("first", "last", "worst_before")),
        ]
        for row in exits
    ]
    headers = [
        "router",
        "refused",
        "first to last",
        "last to first",
        "worst of the last block first",
    ]
    words = (
        "On the drafts that the thresholds were made from, one picture at a time, until the first "
        "below the threshold. The decision is the same in every order."
    )
    return f"{words}\n\n{table(headers, lines)}"


def _agreement_table(agreements: Sequence[Sample]) -> str:
    lines = [
        [
            "+".join(filter(None, [row["base"], f"{row['scorer']}@{row['rate']:g}"])),
            row["drafts"],
            *(percent(row[name]) for name in ("own_threshold", "same_threshold", "by_chance")),
        ]
        for row in agreements
    ]
    headers = ["router", "drafts", "own threshold", "threshold of the full scorer", "by chance"]
    words = (
        "Share of the drafts that the thresholds were made from on which the decision is that of "
        "the same scorer on all decoded pictures, at the same accept rate. *Own threshold*: made "
        "from what it is shown, as in the tables above. *By chance*: two that keep as many, "
        "independently."
    )
    return f"{words}\n\n{table(headers, lines)}"


def _interval(values: Sequence[float] | None, digits: int = 3, scale: float = 1.0) -> str | None:
    if values is None:
        return None
    value, low, high = (scale * one for one in values)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _signed(values: Sequence[float] | None) -> str | None:
    if values is None:
        return None
    estimate = Estimate(*values)
    mark = " better" if estimate.is_positive else " worse" if estimate.is_negative else ""
    return f"{values[0]:+.3f} [{values[1]:+.3f}, {values[2]:+.3f}]{mark}"


def _quality_table(rows: Sequence[Sample]) -> str:
    plain = next((row["model_s"] for row in rows if row["setup"] == "never"), None)
    headers = ["setup", "quality [95 %]", "less the target's", "retained %", "drafts kept"]
    headers += ["model s", "× never (model)", "wall s", "× diffusers (wall)"]
    lines = [
        [
            row["setup"],
            _interval(row["quality"]),
            _signed(row["over_target"]),
            _interval(row["retained"], 1, 100),
            percent(row["share_kept"]),
            f"{row['model_s']:.3f}",
            ratio(plain, row["model_s"]),
            None if row["wall_s"] is None else f"{row['wall_s']:.3f}",
            row["speedup_wall"],
        ]
        for row in rows
    ]
    words = (
        "Intervals are of a bootstrap over prompts, paired. *Drafts kept* is of all blocks. "
        "*Model* seconds are counts times prices (below), *wall* the median of timed videos."
    )
    return f"{words}\n\n{table(headers, lines)}"


def _baseline_table(rows: Sequence[Sample]) -> str:
    lines = [
        [
            *(row["setup"], f"{row['model_s']:.3f}"),
            *(_signed(row["over"].get(name)) for name in BASELINES),
            _signed(row["over_chance"]),
        ]
        for row in rows
    ]
    words = (
        "Quality of a setup less the best on the baseline's curve at no more model seconds; – "
        "where the curve begins later or the setup is part of it. Curves run from `always` (or "
        "`first-block`) to `never`. *Chance, same share*: of a setup that looks, less chance "
        "in the same places that keeps as many drafts, whatever the time: what choosing them is "
        "worth. *better* and *worse*: the interval excludes zero."
    )
    headers = ["setup", "model s", *BASELINES, "chance, same share"]
    return f"{words}\n\n{table(headers, lines)}"


def _count_table(rows: Sequence[Sample]) -> str:
    names = list(rows[0]["counts"])
    headers = ["setup", *(name.replace("_", " ") for name in names)]
    headers += ["decodes beyond the blocks", "kept of judged"]
    lines = [
        [
            row["setup"],
            *(row["counts"][name] for name in names),
            row["decodes_beyond"],
            percent(row["share_kept_of_judged"]),
        ]
        for row in rows
    ]
    words = (
        "A judged draft is decoded once; kept, its pictures are the output: decodes beyond the "
        "blocks of the video are those of refused drafts."
    )
    return f"{words}\n\n{table(headers, lines)}"


def _phase_table(rows: Sequence[Sample]) -> str:
    timed = [row for row in rows if row["phases_s"]]
    lines = [
        [
            row["setup"],
            *(f"{row['phases_s'][phase]:.4f}" for phase in PHASES),
            percent(row["judging_share"]),
            percent(row["judging_decoding_share"]),
            percent(row["judging_wall_share"]),
            is_within(max(row["judging_decoding_share"], row["judging_wall_share"])),
            f"{row['first_s']:.4f}",
            row["num_timed"],
            percent(row["same_blocks"]),
        ]
        for row in timed
    ]
    goal = percent(JUDGING_GOAL)
    headers = ["setup", *PHASES, "judging, model", "with decoding refused drafts, model"]
    headers += ["the same, wall", f"at most {goal}", "first block", "videos", "same blocks"]
    whole = f"{timed[0]['wall_diffusers_s']:.4f}" if timed else "–"
    words = (
        "Goal for judging, with decoding refused drafts: at most "
        f"{goal}, by both. *Judging* is scoring pictures and making previews; the next columns add "
        "the decodes beyond the blocks (*model*: counts times prices; *wall*: refused drafts of "
        "the timed videos, each as long as their mean decode). *First block*: seconds from the "
        f"call to its pictures; those of diffusers' call come after {whole}. *Same blocks*: of the "
        "timed videos, those whose blocks came about as in the batches of the videos for quality; "
        "rounding may move a score across its threshold."
    )
    return f"{words}\n\n{table(headers, lines)}"


def _price_table(costs: Costs, picture_s: Mapping[str, float]) -> str:
    prices = {name: 1e3 * value for name, value in asdict(costs).items() if name != "picture"}
    prices |= {f"picture of {name}": 1e3 * value for name, value in picture_s.items()}
    lines: list[list[Any]] = [[name.replace("_", " "), value] for name, value in prices.items()]
    return table(["of one", "ms"], lines)


def _loop_table(rows: Sequence[Sample], drafter_steps: int, preview_ratio: float) -> str:
    """What our counts, and those of SDVG's loop for the same decisions, cost there."""
    lines = []
    alone, batched = (published_costs(preview_ratio, price) for price in (1.0, BATCHED))
    for row in rows:
        ours, blocks = Counts(**row["counts"]), row["num_blocks"]
        theirs = Counts(
            **row["counts"]
            | {
                "target_reads": blocks - 1,
                "drafter_reads": blocks - 1,
                "drafter_forwards": blocks * drafter_steps,
                "pictures": row["offered"],
            }
        )
        shares = [one.judging_share(ours, row["decodes_beyond"]) for one in (alone, batched)]
        lines.append(
            [
                row["setup"],
                *(alone.seconds(counts) for counts in (theirs, ours)),
                batched.seconds(ours),
                *(percent(alone.judging_share(counts)) for counts in (theirs, ours)),
                percent(batched.judging_share(ours)),
                *(word for one in shares for word in (percent(one), is_within(one))),
            ]
        )
    goal = percent(JUDGING_GOAL)
    headers = ["setup", "SDVG's loop s", "ours s", "ours, batched s"]
    headers += ["judging, SDVG's", "judging, ours", "judging, batched"]
    headers += ["with decoding refused drafts", f"at most {goal}"]
    headers += ["with decoding, batched", f"at most {goal}, batched"]
    words = (
        "Counts of this run with the prices of the published models (ImageReward for every "
        "scorer; a preview at its measured share of a decode). SDVG's loop reads with both models "
        "before each block, drafts every block and scores every picture that is shown; ours is as "
        "counted."
    )
    return f"{words}\n\n{table(headers, lines)}"
