"""How many forwards an image needs by how window positions are guessed.

    python benchmarks/ablate_image_init.py --out benchmarks/results

Forwards only, which no clock moves: mean over fresh held-out captions of the bundled avatars,
float32, temperature 1, all images of a configuration in one batch, each with a seed of its own.
"""

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmspec.bench.image_setups import image_engine, load_captions, load_image
from mmspec.bench.measure import Budget, Sample, csv, final_line, open_store, provenance
from mmspec.bench.report import Output, publish, table
from mmspec.drafters.jacobi import INITS
from mmspec.verify import IndependentRedraft, MaximalCoupling, SeededMatch

PLAIN, MENDED = {"mend": False}, {"mend": True}
FRESH = {"shared_noise": False}
#: System -> rule, its options, options of the drafter. Noise and mending are compared with what is
#: drawn from the law above.
SYSTEMS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    **{f"exact, {init}": (SeededMatch, {}, PLAIN | {"init": init}) for init in INITS},
    "exact, above, mended": (SeededMatch, {}, MENDED),
    "coupled, fresh noise": (MaximalCoupling, {}, PLAIN | FRESH),
    "coupled, fresh noise, mended": (MaximalCoupling, {}, MENDED | FRESH),
    "coupled, shared noise of new positions": (MaximalCoupling, {}, PLAIN),
    "sjd, fresh noise": (IndependentRedraft, {}, PLAIN | FRESH),
    "sjd, fresh noise, mended": (IndependentRedraft, {}, MENDED | FRESH),
    "sjd, shared noise": (IndependentRedraft, {"shared_noise": True}, PLAIN),
}


def forwards(
    pipe: Any, captions: list[str], system: str, window: int, guidance: float, seed: int
) -> list[int]:
    """Target forwards of each image."""
    rule, rule_options, options = SYSTEMS[system]
    engine = image_engine(
        pipe,
        captions,
        width=window,
        guidance=guidance,
        temperature=1.0,
        seed=seed,
        rule=partial(rule, **rule_options),
        keep_laws=rule is not SeededMatch,
        **options,
    )
    return [row.num_target_forwards for row in engine.run().row_stats]


def main(
    prompts: Annotated[int, typer.Option(help="Fresh held-out captions.")] = 12,
    windows: Annotated[str, typer.Option(help="Tokens per image and forward.")] = "16,32,64",
    guidance: Annotated[str, typer.Option(help="Scales; 1 is none.")] = "3,1,5",
    systems: Annotated[str, typer.Option(help="Names, separated by semicolons.")] = "",
    minutes: Annotated[float | None, typer.Option(help="Stop then; run again to go on.")] = None,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of samples and report.")] = Path("mmspec-bench"),
) -> None:
    """Measures what is missing and writes the report."""
    budget, output = Budget(minutes), Output(json_only=False)
    facts = provenance(torch.device("cpu"), ["avatars"])
    store = open_store(out, "image_init", "", facts)
    pipe = load_image("avatars", "float32")
    captions = [entry["caption"] for entry in load_captions(prompts, is_fresh=True)]
    rows: list[Sample] = []
    missing = []
    for scale in map(float, csv(guidance)):
        for window in map(int, csv(windows)):
            for system in systems.split(";") if systems else SYSTEMS:
                key = f"{system}/w{window}/g{scale:g}/n{len(captions)}/s{seed}"
                if key not in store and budget.is_spent:
                    missing.append(key)
                    continue
                if key not in store:
                    counts = forwards(pipe, captions, system, window, scale, seed)
                    facts_of = {"system": system, "window": window, "guidance": scale}
                    store.add([{"key": key, **facts_of, "num_forwards": counts}])
                counts = store.samples[key]["num_forwards"]
                mean = sum(counts) / len(counts)
                rows.append({k: store.samples[key][k] for k in ("system", "window", "guidance")})
                rows[-1] |= {"type": "row", "num_images": len(counts), "forwards": mean}
                output.say(f"{key}: {mean:.2f}")
    line = final_line(
        "image_init", facts, rows, left_out=missing, failures=[], time_s=budget.elapsed_s
    )
    publish(line, [("Forwards per image", _table(rows))], out, output)


def _table(rows: list[Sample]) -> str:
    """A line per system, a column per guidance and window."""
    cells: dict[str, dict[tuple[float, int], float]] = defaultdict(dict)
    for row in rows:
        cells[row["system"]][row["guidance"], row["window"]] = row["forwards"]
    columns = sorted({column for found in cells.values() for column in found})
    headers = ["system", *(f"guidance {scale:g}, window {width}" for scale, width in columns)]
    return table(
        headers, [[name, *(found.get(c) for c in columns)] for name, found in cells.items()]
    )


if __name__ == "__main__":
    typer.run(main)
