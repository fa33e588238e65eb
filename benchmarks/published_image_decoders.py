"""Published decoders of image tokens side by side: forwards, law, and what the pictures show.

    python benchmarks/published_image_decoders.py --out benchmarks/results

Every system is our reimplementation of a rule as it is described, run by the one engine. Three
parts, no clock in any of them:

- law: chi-square of the joint law of four tokens of three kinds against enumeration, on the toy
  target of the tests, all samples in one ragged batch (pairs of rows for the batch rule);
- forwards: of fresh held-out captions of the bundled avatars, float32, temperature 1;
- accuracy: the share of stated attributes that the pictures of lossy decoders show, at the first
  window, for more captions.
"""

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from mmspec.adapters.token_image import image_family
from mmspec.bench.image_setups import image_engine, load_captions, load_image
from mmspec.bench.measure import Budget, Sample, csv, final_line, open_store, provenance
from mmspec.bench.report import Output, percent, publish, table
from mmspec.drafters.jacobi import JacobiDrafter
from mmspec.lossy import GroupedAcceptance, OverlappingRows
from mmspec.verify import IndependentRedraft, MaximalCoupling, SeededMatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
published = importlib.import_module("published")
toys = importlib.import_module("toys")

#: Tokens, positions and grid row of the toy, and what its tokens look like to the clusters.
V, LENGTH, STRIDE = 3, 4, 2
TOY_CODES = torch.tensor([[0.0], [0.2], [3.0]])
PARTS = ("law", "forwards", "accuracy")
SEEDED, FRESH = {}, {"shared_noise": False, "keep_laws": True}


def grouped(law: Any, rows: Any, *, codes: Tensor, stride: int, lenience: float) -> Any:
    """Clusters of near codes."""
    return GroupedAcceptance(law, rows, codes_VH=codes, lenience=lenience)


def overlapping(law: Any, rows: Any, *, codes: Tensor, stride: int, lenience: float) -> Any:
    """Rows begun before the one above is complete."""
    return OverlappingRows(law=law, rows=rows, stride=stride, lenience=lenience)


#: System -> rule, window, options of the window.
SYSTEMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Gumbel fixed point (exact)": (SeededMatch, JacobiDrafter, SEEDED),
    "SCD, maximal coupling (coupled)": (MaximalCoupling, JacobiDrafter, FRESH),
    "SCD, Gumbel coupling": (
        partial(IndependentRedraft, shared_noise=True), JacobiDrafter, {"keep_laws": True},
    ),
    "SJD (sjd)": (IndependentRedraft, JacobiDrafter, FRESH),
    "SJD, minimum of a batch": (published.BatchMinimum, published.StaleAccepted, FRESH),
    "SCD, old law of kept guesses": (MaximalCoupling, published.StaleLaws, FRESH),
    "SJD, target for the residual": (published.TargetForResidual, JacobiDrafter, FRESH),
    "SJD++, reuse above 0.5": (published.ThresholdReuse, JacobiDrafter, FRESH),
    "GSD, lenience 0.5 (lossy-grouped)": (partial(grouped, lenience=0.5), JacobiDrafter, FRESH),
    "GSD, lenience 1 (lossy-grouped)": (partial(grouped, lenience=1.0), JacobiDrafter, FRESH),
    "rows, lenience 0.75 (lossy-rows)": (
        partial(overlapping, lenience=0.75), JacobiDrafter, SEEDED,
    ),
    "rows, lenience 1 (lossy-rows)": (partial(overlapping, lenience=1.0), JacobiDrafter, SEEDED),
}  # fmt: skip


def bound(rule: Any, codes: Tensor, stride: int) -> Any:
    """Tells a lossy rule what it asks for."""
    is_lossy = isinstance(rule, partial) and rule.func in (grouped, overlapping)
    return partial(rule, codes=codes, stride=stride) if is_lossy else rule


def law_sample(system: str, seed: int, num_rows: int) -> Sample:
    """Chi-square of the joint law of a toy."""
    rule, drafter, options = SYSTEMS[system]
    table = toys.random_table(seed, LENGTH, V)

    def window(rows: Any) -> Any:
        return drafter(rows, V, max_width=LENGTH, stride=STRIDE, **options)

    made = toys.run_toy(
        table, window, bound(rule, TOY_CODES, STRIDE), num_rows=num_rows, width=LENGTH, seed=seed
    )
    statistic, df, p = toys.chi_square(made.outputs, toys.joint_law(table))
    return {"chi_square": statistic, "df": df, "p": p, "num_rows": num_rows}


def image_sample(
    pipe: Any, system: str, entries: list[dict[str, Any]], window: int, guidance: float, seed: int
) -> Sample:
    """Forwards of a batch of images, and how many stated attributes they show."""
    rule, drafter, options = SYSTEMS[system]
    family = image_family(pipe.model)
    codes = family.embed_image(torch.arange(family.codebook_size)).detach()
    engine = image_engine(
        pipe,
        [entry["caption"] for entry in entries],
        width=window,
        guidance=guidance,
        temperature=1.0,
        seed=seed,
        rule=bound(rule, codes, family.layout(None, None).stride),
        drafter=drafter,
        **options,
    )
    made = engine.run()
    judge = importlib.import_module("mmspec.assets.avatars.scoring").attribute_accuracy
    with torch.no_grad():
        pixels = pipe.model.decode_image_tokens(torch.tensor([list(row) for row in made.units]))
    attributes = [entry["attributes"] for entry in entries]
    found = judge(np.clip((pixels.float().numpy() + 1) / 2, 0, 1), attributes)
    num_stated = sum(map(len, attributes))
    return {
        "num_forwards": [row.num_target_forwards for row in made.row_stats],
        "num_stated": num_stated,
        "num_right": round(found["mean"] * num_stated),
        "num_all_right": round(found["all"] * len(entries)),
    }


class Measurement:
    """What is asked for, what the store has of it, and what is missing."""

    def __init__(self, store: Any, budget: Budget, output: Output) -> None:
        """Measures nothing yet."""
        self._store = store
        self._budget = budget
        self._output = output
        self.missing: list[str] = []

    def get(self, key: str, measure: Any) -> Sample | None:
        """A sample from the store, or a new one while there is time."""
        if key not in self._store:
            if self._budget.is_spent:
                self.missing.append(key)
                return None
            self._store.add([{"key": key, **measure()}])
            self._output.say(key)
        return dict(self._store.samples[key])


def batches(entries: list[dict[str, Any]], size: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Offset and entries of each batch; a last one that is not full is left out."""
    for first in range(0, len(entries) - size + 1, size):
        yield first, entries[first : first + size]


def image_row(
    measurement: Measurement, pipe: Any, system: str, captions: int, window: int, guidance: float
) -> Sample | None:
    """Mean forwards and shares of right attributes; the first batch serves every part."""
    found = []
    for first, entries in batches(load_captions(captions, is_fresh=True), 16):
        key = f"image/{system}/w{window}/g{guidance:g}/{first:04d}"
        found.append(
            measurement.get(
                key, partial(image_sample, pipe, system, entries, window, guidance, first)
            )
        )
    kept = [sample for sample in found if sample is not None]
    if not kept:
        return None
    forwards = [count for sample in kept for count in sample["num_forwards"]]
    return {
        "type": "row",
        "system": system,
        "window": window,
        "guidance": guidance,
        "num_images": len(forwards),
        "forwards": sum(forwards) / len(forwards),
        "accuracy": sum(s["num_right"] for s in kept) / sum(s["num_stated"] for s in kept),
        "all_right": sum(s["num_all_right"] for s in kept) / len(forwards),
    }


def main(
    parts: Annotated[str, typer.Option(help="Of law, forwards, accuracy.")] = ",".join(PARTS),
    systems: Annotated[
        str, typer.Option(help="Names, separated by semicolons; all if empty.")
    ] = "",
    prompts: Annotated[int, typer.Option(help="Captions for forwards, 16 to a batch.")] = 16,
    quality: Annotated[int, typer.Option(help="Captions for accuracy, 16 to a batch.")] = 112,
    windows: Annotated[str, typer.Option(help="Tokens per image and forward.")] = "32,64",
    guidance: Annotated[float, typer.Option(help="1 is none.")] = 3.0,
    samples: Annotated[int, typer.Option(help="Rows of the law test.")] = 200_000,
    law_seeds: Annotated[int, typer.Option(help="Toys of the law test.")] = 3,
    minutes: Annotated[float | None, typer.Option(help="Stop then; run again to go on.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of samples and report.")] = Path("mmspec-bench"),
) -> None:
    """Measures what is missing and writes the report."""
    asked, widths = csv(parts, PARTS), [int(width) for width in csv(windows)]
    names = systems.split(";") if systems else list(SYSTEMS)
    budget, output = Budget(minutes), Output(json_only=False)
    facts = provenance(torch.device("cpu"), ["avatars"])
    store = open_store(out, "published_image_decoders", "", facts)
    measurement = Measurement(store, budget, output)
    pipe = load_image("avatars", "float32")
    laws, rows = [], []
    for seed in range(law_seeds if "law" in asked else 0):
        for system in names:
            key = f"law/{system}/n{samples}/s{seed}"
            if sample := measurement.get(key, partial(law_sample, system, seed, samples)):
                laws.append({"type": "law", "system": system, "seed": seed} | sample)
    for part, width in [("forwards", w) for w in widths] + [("accuracy", widths[0])]:
        count = prompts if part == "forwards" else quality
        # What keeps the law has the pictures of plain decoding.
        judged = [name for name in names if part == "forwards" or "lossy" in name]
        for system in judged if part in asked else ():
            row = image_row(measurement, pipe, system, count, width, guidance)
            # What has no more captions than for forwards stands in that line already.
            if row and (part == "forwards" or row["num_images"] > prompts):
                rows.append(row | {"part": part})
    line = final_line(
        "published_image_decoders",
        facts,
        [*laws, *rows],
        left_out=measurement.missing,
        failures=[],
        time_s=budget.elapsed_s,
    )
    sections = [("Law on the toy", _law_table(laws)), ("On the avatars", _image_table(rows))]
    publish(line, sections, out, output)


def _law_table(laws: list[Sample]) -> str:
    names = ("system", "seed", "chi_square", "df", "p")
    lines = [[str(row[name]) if name == "seed" else row[name] for name in names] for row in laws]
    for line in lines:
        line[-1] = f"{line[-1]:.2g}"
    return table(["system", "toy", "chi-square", "df", "p"], lines)


def _image_table(rows: list[Sample]) -> str:
    names = ("system", "window", "num_images", "forwards")
    return table(
        ["system", "window", "images", "forwards", "attributes right", "all right"],
        [
            [*(row[n] for n in names), percent(row["accuracy"]), percent(row["all_right"])]
            for row in rows
        ],
    )


if __name__ == "__main__":
    typer.run(main)
