"""Video: quality against time of routers, beside the target, the drafter and blind baselines.

Every setup makes the videos of the same prompts from the same noise. Quality is judged by something
that no router looks at; time is counted (steps, readings, decoded blocks, scored pictures, each
with its measured price) and, on some prompts, taken by the clock. Thresholds come from other
prompts than those that are judged.

Videos for quality are made together, by `mmspec.bench.video_pool`: blocks with the same past are
computed once, and in batches. Those that are timed are made one at a time by the pipeline itself.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmspec.bench.measure import (
    Budget,
    Sample,
    csv,
    final_line,
    open_store,
    provenance,
    slug,
    stem,
)
from mmspec.bench.report import Output, publish
from mmspec.bench.tasks import Unavailable, left_out, run_tasks, samples_of
from mmspec.bench.video_costs import Costs, published_costs
from mmspec.bench.video_figure import draw_figure
from mmspec.bench.video_report import (
    measured_costs,
    measured_preview_ratio,
    sections,
    summarise,
)
from mmspec.bench.video_runs import (
    Videos,
    agreement_rows,
    exit_rows,
    measure_quality,
    measure_scores,
    score_keys,
    set_thresholds,
    time_tasks,
)
from mmspec.bench.video_setups import (
    ATTENTION,
    Pair,
    Setup,
    default_setups,
    load_pair,
    load_scorer,
    scorer_name,
)
from mmspec.checks import require, require_known
from mmspec.routers.scoring import Scorer

#: Scorers that are compared where their weights are present.
SCORERS = (
    *("temporal", "sharpness", "noise", "brisque"),
    *("image-reward", "clip-score", "pick-score", "hps"),
)
COSTS = ("measured", "published")
#: Prompts whose videos are made together.
CHUNK = 8


def run(
    model: Annotated[str, typer.Option(help="A bundled pair, NAME and NAME-drafter.")] = "clips",
    drafter: Annotated[
        str, typer.Option(help="pair: NAME-drafter; self: the target in fewer steps.")
    ] = "pair",
    steps: Annotated[int | None, typer.Option(help="Of the target; the pair's own.", min=1)] = None,
    drafter_steps: Annotated[
        int | None, typer.Option(help="Of the drafter; the pair's own.", min=1)
    ] = None,
    setups: Annotated[
        str, typer.Option(help="As first-block+temporal@0.5,never/stitch:2; default: a selection.")
    ] = "default",
    scorers: Annotated[str, typer.Option(help="Of the default setups.")] = ",".join(SCORERS),
    rates: Annotated[str, typer.Option(help="Shares of the drafts that they keep.")] = (
        "0.25,0.5,0.75"
    ),
    prompts: Annotated[int, typer.Option(help="Prompts for quality.")] = 24,
    calibration: Annotated[int, typer.Option(help="Other prompts, for the thresholds.")] = 24,
    timed: Annotated[int, typer.Option(help="Prompts whose videos are timed.")] = 2,
    repeats: Annotated[int, typer.Option(help="Repetitions of the timed videos.")] = 2,
    costs: Annotated[
        str, typer.Option(help="Prices of the model seconds: measured, or published.")
    ] = "measured",
    attention: Annotated[
        str, typer.Option(help="Of all systems: dense, or flex as in diffusers, slow on a CPU.")
    ] = "dense",
    minutes: Annotated[float | None, typer.Option(help="Stop then; run again to go on.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise; prompt k takes SEED + k.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of samples and report.")] = Path("mmspec-bench"),
    label: Annotated[str, typer.Option(help="Part of the names of the files.")] = "",
    json_only: Annotated[bool, typer.Option("--json", help="Only the last line.")] = False,
) -> dict[str, Any]:
    """Measure routers of block-wise video: quality, time, and a picture of one against the other.

    Returns:
        The object of the last line; see `mmspec.bench.measure.FINAL_LINE`.

    Raises:
        ValueError: If an option is out of range.
        typer.Exit: With code 1 if our target alone was not diffusers' own, to the bit.
    """
    stem("video", label)
    require_known("attention", attention, ATTENTION)
    require_known("costs", costs, COSTS)
    numbers = [_rate(rate) for rate in csv(rates)]
    wanted = csv(scorers, SCORERS)
    named = None if setups == "default" else [Setup.parse(name) for name in csv(setups)]
    model = model.removeprefix("bundled:")
    pair = load_pair(
        model, attention, device, drafter, num_inference_steps=steps, drafter_steps=drafter_steps
    )
    return compare(
        pair,
        chosen=named,
        scorers=wanted,
        rates=numbers,
        sizes={"prompts": prompts, "calibration": calibration, "timed": timed, "repeats": repeats},
        costs=costs,
        variant=attention if drafter == "pair" else f"{attention}-{drafter}",
        bundles=[model, f"{model}-drafter"],
        budget=Budget(minutes),
        seed=seed,
        out=out,
        label=label,
        output=Output(json_only=json_only),
    )


def compare(
    pair: Pair,
    *,
    chosen: Sequence[Setup] | None,
    scorers: Sequence[str],
    rates: Sequence[float],
    sizes: Mapping[str, int],
    costs: str,
    variant: str,
    bundles: Sequence[str],
    budget: Budget,
    seed: int,
    out: Path,
    label: str,
    output: Output,
) -> dict[str, Any]:
    """As `run`, for a loaded pair.

    Args:
        pair: The models.
        chosen: Setups; None is the default.
        scorers: Of the default.
        rates: Of the default.
        sizes: "prompts", "calibration", "timed" and "repeats", as in `run`.
        costs: As in `run`.
        variant: What else samples depend on, for their keys.
        bundles: Bundled folders that the result depends on.
        budget: Time.
        seed: As in `run`.
        out: As in `run`.
        label: As in `run`.
        output: Where to talk to.

    Raises:
        ValueError: If there are too few prompts, or too few drafts could be judged.
    """
    _check_sizes(pair, sizes)
    missing: list[str] = []
    loaded = _loaded(scorers if chosen is None else _used(chosen), missing)
    if chosen is None:
        chosen = [Setup.parse(name) for name in default_setups(list(loaded), rates, pair)]
    listed = [setup for setup in chosen if set(map(scorer_name, setup.scorers)) <= set(loaded)]
    require(len(listed) > 0, "setups", "one or more whose scorers have weights", missing)
    _check_stitches(pair, listed)
    device = pair.target._execution_device
    facts = provenance(torch.device(device), bundles)
    store = open_store(out, "video", label, facts)
    videos = Videos(pair=pair, scorers=loaded, store=store, seed=seed, variant=variant, chunk=CHUNK)
    measured = range(sizes["prompts"])
    held_back = range(pair.num_judged, pair.num_judged + sizes["calibration"])
    measure_scores(videos, score_keys(listed), held_back, output.say)
    bars = set_thresholds(videos, listed, held_back)
    tasks = time_tasks(videos, listed, measured[: sizes["timed"]])
    run_tasks(tasks, sizes["repeats"], store, budget, output.say)
    measure_quality(videos, listed, measured, budget, output.say)
    missing += left_out(tasks, sizes["repeats"], store)
    missing += _unmade(videos, listed, measured)
    times = samples_of(tasks, sizes["repeats"], store)
    keys = [videos.video_key(setup, index) for index in measured for setup in listed]
    found = [store.samples[key] for key in keys if key in store]
    prices, picture_s = _prices(costs, times, pair, listed)
    rows, exits = [], exit_rows(videos, listed, held_back)
    agreements = agreement_rows(videos, listed, held_back)
    if times or costs == "published":
        rows = summarise(listed, found, times, prices, picture_s, seed=seed)
        rows = [row | bars[row["setup"]] for row in rows]
    ratio = measured_preview_ratio(times, pair.num_blocks)
    tables = sections(rows, exits, agreements, prices, picture_s, pair.drafter_steps, ratio)
    for title, text in tables:
        output.show(title, text)
    line = final_line(
        "video",
        facts,
        [*rows, *exits, *agreements],
        left_out=missing,
        failures=_failures(times),
        time_s=budget.elapsed_s,
    )
    if rows:
        path = out / f"{stem('video', label)}_{slug(line['device'])}_{line['date']}.png"
        draw_figure(rows, path)
        output.say(f"figure: {path}")
    return publish(line, tables, out, output)


def _prices(
    costs: str, times: Sequence[Sample], pair: Pair, setups: Sequence[Setup]
) -> tuple[Costs, dict[str, float]]:
    """Of everything but pictures, and of a picture by the scorers that look at it."""
    if costs == "measured":
        return measured_costs(times, pair.num_blocks)
    scorers = ["+".join(setup.scorers) for setup in setups if setup.scorers]
    prices = published_costs(measured_preview_ratio(times, pair.num_blocks))
    return prices, dict.fromkeys(scorers, prices.picture)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    require(0 < rate < 1, "rates", "numbers in (0, 1)", text)
    return rate


def _check_sizes(pair: Pair, sizes: Mapping[str, int]) -> None:
    for name in ("prompts", "calibration", "timed", "repeats"):
        require(sizes[name] >= 1, name, "an integer >= 1", sizes[name])
    require(sizes["timed"] <= sizes["prompts"], "timed", "at most prompts", sizes["timed"])
    num_others = len(pair.prompts) - pair.num_judged
    for name, most in (("prompts", pair.num_judged), ("calibration", num_others)):
        rule = f"at most {most}, the held-out prompts of {pair.name} for it"
        require(sizes[name] <= most, name, rule, sizes[name])


def _check_stitches(pair: Pair, setups: Sequence[Setup]) -> None:
    """Thresholds hold for drafts of as many steps as those that were scored."""
    steps = pair.options["num_inference_steps"]
    for setup in setups:
        is_good = setup.stitch is None or not setup.scorers or steps == pair.drafter_steps
        rule = f"one without accept rates, for drafts take {pair.drafter_steps} steps of {steps}"
        require(is_good, "a setup with stitch", rule, setup.name)


def _used(setups: Sequence[Setup]) -> list[str]:
    return list(dict.fromkeys(name for setup in setups for name in map(scorer_name, setup.scorers)))


def _loaded(names: Sequence[str], missing: list[str]) -> dict[str, Scorer]:
    """The scorers that can be had; the others are noted."""
    loaded = {}
    for name in names:
        try:
            loaded[name] = load_scorer(name)
        except Unavailable as error:
            missing.append(f"{name}: {error}")
    return loaded


def _unmade(videos: Videos, setups: Sequence[Setup], indices: Sequence[int]) -> list[str]:
    keys = [[videos.video_key(setup, index) for setup in setups] for index in indices]
    count = sum(not videos.store.has(of_prompt) for of_prompt in keys)
    return [f"quality: {count} of {len(indices)} prompts not complete"] if count else []


def _failures(times: Sequence[Sample]) -> list[str]:
    """Without drafts the pictures are promised to be those of diffusers."""
    return [
        f"prompt {s['prompt']}: never differs from diffusers"
        for s in times
        if not s.get("is_equal", True)
    ]


if __name__ == "__main__":
    typer.run(run)
