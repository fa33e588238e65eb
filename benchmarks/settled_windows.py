"""How many codes a step of a settled Jacobi window brings, by its width, and the curve through it.

    python benchmarks/settled_windows.py --out benchmarks/results

Forwards only, which no clock moves: `exact` with one fixed width, float32, temperature 1, one image
at a time. The first steps of an image are left out, as `mmspec.window_schedule` leaves them out.
"""

import math
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmspec.bench.image_setups import image_engine, load_captions, load_image
from mmspec.bench.measure import Budget, Sample, csv, final_line, open_store, provenance
from mmspec.bench.report import Output, publish, table
from mmspec.window_schedule import WindowMemory, WindowSchedule, settled_units


def counted(pipe: Any, captions: list[str], width: int, guidance: float, seed: int) -> Sample:
    """Steps of settled windows of this width, and the codes that they brought."""
    num_steps = num_units = 0
    for number, caption in enumerate(captions):
        engine = image_engine(
            pipe,
            [caption],
            width=width,
            guidance=guidance,
            temperature=1.0,
            seed=seed + number,
        )
        for step in engine.run().steps[WindowSchedule.BEGINNING + 1 :]:
            # The last windows of an image are cut at its end.
            if step.width == width:
                num_steps, num_units = num_steps + 1, num_units + sum(step.num_emitted)
    return {"num_steps": num_steps, "num_units": num_units}


def best_endless(units: dict[int, float], up_to: int) -> float:
    """Units of a window without end, of the curve with the least squared logarithmic error."""

    def misfit(endless: float) -> float:
        return sum(
            math.log(settled_units(width, endless) / found) ** 2
            for width, found in units.items()
            if width <= up_to
        )

    return min(WindowMemory.ENDLESS, key=misfit)


def main(
    models: Annotated[str, typer.Option(help="MODEL:SCALE pairs.")] = (
        "avatars:1,avatars:3,avatars:5,emoji:3"
    ),
    widths: Annotated[str, typer.Option(help="Tokens per image and forward.")] = (
        "2,4,8,16,32,64,128"
    ),
    up_to: Annotated[int, typer.Option(help="Largest width that the curve is fitted to.")] = 64,
    prompts: Annotated[int, typer.Option(help="Held-out captions.")] = 16,
    minutes: Annotated[float | None, typer.Option(help="Stop then; run again to go on.")] = None,
    seed: Annotated[int, typer.Option(help="First seed.")] = 100,
    out: Annotated[Path, typer.Option(help="Folder of samples and report.")] = Path("mmspec-bench"),
) -> None:
    """Measures what is missing and writes the report."""
    budget, output = Budget(minutes), Output(json_only=False)
    pairs = [
        (name, float(scale)) for name, _, scale in (pair.partition(":") for pair in csv(models))
    ]
    facts = provenance(torch.device("cpu"), sorted({name for name, _ in pairs}))
    store = open_store(out, "settled_windows", "", facts)
    found: dict[tuple[str, float], dict[int, float]] = defaultdict(dict)
    missing = []
    for name, scale in pairs:
        pipe = load_image(name, "float32")
        captions = [entry["caption"] for entry in load_captions(prompts, name)]
        for width in map(int, csv(widths)):
            key = f"{name}/g{scale:g}/w{width}/n{len(captions)}/s{seed}"
            if key not in store and budget.is_spent:
                missing.append(key)
                continue
            if key not in store:
                store.add([{"key": key, **counted(pipe, captions, width, scale, seed)}])
            sample = store.samples[key]
            found[name, scale][width] = sample["num_units"] / max(sample["num_steps"], 1)
            output.say(f"{key}: {found[name, scale][width]:.2f}")
    rows: list[Sample] = []
    for (name, scale), units in found.items():
        endless = best_endless(units, up_to)
        for width, brought in units.items():
            place = {"type": "row", "model": name, "guidance": scale, "width": width}
            curve = settled_units(width, endless)
            rows.append(place | {"units": brought, "endless": endless, "curve": curve})
    line = final_line(
        "settled_windows", facts, rows, left_out=missing, failures=[], time_s=budget.elapsed_s
    )
    publish(line, [("Codes per step: counted, and on the curve", _table(rows))], out, output)


def _table(rows: list[Sample]) -> str:
    """Two lines per model and scale, a column per width."""
    kinds = {(row["model"], row["guidance"]): row["endless"] for row in rows}
    columns = sorted({row["width"] for row in rows})
    cells = {(row["model"], row["guidance"], row["width"]): row for row in rows}
    lines = []
    for (name, scale), endless in kinds.items():
        of_width = [cells.get((name, scale, width), {}) for width in columns]
        what = f"{name}, guidance {scale:g}"
        lines.append([f"{what}, counted", *(cell.get("units") for cell in of_width)])
        lines.append([f"{what}, e = {endless:.3g}", *(cell.get("curve") for cell in of_width)])
    return table(["windows", *(f"width {width}" for width in columns)], lines)


if __name__ == "__main__":
    typer.run(main)
