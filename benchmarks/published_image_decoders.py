"""Published decoders of image tokens side by side: forwards, law, and what the pictures show.

    python benchmarks/published_image_decoders.py --out benchmarks/results

Every system is our reimplementation of a rule as it is described, run by the one engine. Four
parts, no clock in any of them:

- law: chi-square of the joint law of four tokens of three kinds against enumeration, on the toy
  target of the tests, all samples in one ragged batch (pairs of rows for the batch rule);
- forwards: of fresh held-out captions of a bundled model, float32, temperature 1, and their
  difference from the exact decoder's, caption by caption;
- refusals: how many of the guesses that the exact decoder refuses another coupling would keep;
- accuracy: the share of stated attributes that the pictures of lossy decoders show, at the first
  window, for more captions.
"""

import importlib
import statistics
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
from mmspec.bench.image_setups import image_engine, judge_of, load_captions, load_image
from mmspec.bench.measure import Budget, Sample, csv, final_line, open_store, provenance
from mmspec.bench.quality import Judge
from mmspec.bench.report import Output, percent, publish, table
from mmspec.drafters.jacobi import JacobiDrafter
from mmspec.lossy import GroupedAcceptance, OverlappingRows
from mmspec.records import Proposal, Scores, Verdict
from mmspec.verify import IndependentRedraft, MaximalCoupling, SeededMatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
published = importlib.import_module("published")
toys = importlib.import_module("toys")

#: Tokens, positions and grid row of the toy, and what its tokens look like to the clusters.
V, LENGTH, STRIDE = 3, 4, 2
TOY_CODES = torch.tensor([[0.0], [0.2], [3.0]])
#: What `Refusals` adds up.
REFUSALS = (
    "judged", "refused", "variation", "variation_above_half", "gumbel", "steps", "single", "block",
)  # fmt: skip
PARTS = ("law", "forwards", "refusals", "accuracy")
BATCH = 16
EXACT = "Gumbel fixed point (exact)"
#: Windows as published: stale guesses stay.
SEEDED: dict[str, Any] = {"mend": False}
SHARED = SEEDED | {"keep_laws": True}
FRESH = SHARED | {"shared_noise": False}


def grouped(law: Any, rows: Any, *, codes: Tensor, stride: int, lenience: float) -> Any:
    """Clusters of near codes."""
    return GroupedAcceptance(law, rows, codes_VH=codes, lenience=lenience)


def overlapping(law: Any, rows: Any, *, codes: Tensor, stride: int, lenience: float) -> Any:
    """Rows begun before the one above is complete."""
    return OverlappingRows(law=law, rows=rows, stride=stride, lenience=lenience)


#: System -> rule, window, options of the window.
SYSTEMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    EXACT: (SeededMatch, JacobiDrafter, SEEDED),
    "SCD, maximal coupling (coupled)": (MaximalCoupling, JacobiDrafter, FRESH),
    "block, coupled behind it": (published.CoupledBlock, JacobiDrafter, FRESH),
    "SCD, Gumbel coupling": (
        partial(IndependentRedraft, shared_noise=True), JacobiDrafter, SHARED,
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
    pipe: Any,
    judge: Judge | None,
    system: str,
    entries: list[dict[str, Any]],
    window: int,
    guidance: float,
    seed: int,
) -> Sample:
    """Forwards of a batch of images, and how many stated attributes they show if that is known."""
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
    sample: Sample = {"num_forwards": [row.num_target_forwards for row in made.row_stats]}
    if judge is None:
        return sample
    with torch.no_grad():
        pixels = pipe.model.decode_image_tokens(torch.tensor([list(row) for row in made.units]))
    attributes = [entry["attributes"] for entry in entries]
    found = judge(np.clip((pixels.float().numpy() + 1) / 2, 0, 1), attributes)
    num_stated = sum(map(len, attributes))
    return sample | {
        "num_stated": num_stated,
        "num_right": round(found["mean"] * num_stated),
        "num_all_right": round(found["all"] * len(entries)),
    }


class Refusals:
    """Seeded match that also adds up what other couplings would do with the same guesses.

    Attributes:
        sums: Of the guesses that were judged, up to the first refusal of a step: how many were, and
            were refused; their total variation between target and draft law, which is the least
            probability of a refusal that a coupling of two laws can have; the same where it is
            above a half; the probability of a refusal with shared Gumbel noise. Of steps: how many
            were, and the expected number of accepted drafts with single tests and with block
            verification.
    """

    def __init__(self, law: Any, rows: Any) -> None:
        """Has judged nothing yet."""
        self._rule = SeededMatch(law, rows)
        self._rows = rows
        self.guarantee = self._rule.guarantee
        self.sums: dict[str, float] = dict.fromkeys(REFUSALS, 0.0)

    def verify(self, proposal: Proposal, scores: Scores) -> Verdict:
        """Verdict of seeded match."""
        verdict = self._rule.verify(proposal, scores)
        if proposal.draft_probs_BNV is None:
            return verdict
        target = verdict.law_logits_BNV.double().softmax(-1)
        draft = proposal.draft_probs_BNV.double()
        child_BN, has_child = published.child_of(proposal)
        room_B = self._rows.room_B
        has_child &= proposal.depth_BN < room_B[:, None]
        is_last = proposal.depth_BN == verdict.num_accepted_B[:, None]
        judged = has_child & (proposal.depth_BN <= verdict.num_accepted_B[:, None])
        apart = 1 - torch.minimum(target, draft)[judged].sum(-1)
        single, block = accepted_drafts(target, draft, child_BN, has_child)
        found = (
            judged.sum(), (has_child & is_last).sum(), apart.sum(), apart[apart > 0.5].sum(),
            gumbel_refusals(target[judged], draft[judged]).sum(), (room_B > 0).sum(),
            single[room_B > 0].sum(), block[room_B > 0].sum(),
        )  # fmt: skip
        for name, value in zip(REFUSALS, found, strict=True):
            self.sums[name] += float(value)
        return verdict


def gumbel_refusals(target: Tensor, draft: Tensor) -> Tensor:
    """Probability, for each pair of laws, that one Gumbel noise draws different tokens.

    Both draw token i with probability ``1 / sum_j max(p_j / p_i, q_j / q_i)``, where the first is
    the larger for those j whose ``p_j / q_j`` is at least that of i.
    """
    order = (target.log() - draft.log()).nan_to_num(0.0).argsort(-1, descending=True)
    target, draft = target.gather(-1, order), draft.gather(-1, order)
    above, below = target.cumsum(-1), (1 - draft.cumsum(-1)).clamp(min=0)
    match = 1 / (above / target + torch.where(below > 0, below / draft, 0.0))
    return 1 - torch.where((target > 0) & (draft > 0), match, 0.0).sum(-1)


def accepted_drafts(
    target: Tensor, draft: Tensor, child_BN: Tensor, has_child: Tensor
) -> tuple[Tensor, Tensor]:
    """Expected accepted drafts of each chain by single tests and by block verification.

    Names as in docs/verify.md: the block reaches draft i with probability
    ``1 - prod_{k >= i} (1 - h_k)``, given the chain.
    """
    at = child_BN[..., None]
    keep = (target.gather(-1, at) / draft.gather(-1, at).clamp(min=1e-37)).squeeze(-1) * has_child
    weight = published.block_weights(target, draft, child_BN, has_child)
    mass = (weight[..., None] * target - draft).clamp(min=0).sum(-1)
    inner = mass / (mass + 1 - weight).clamp(min=1e-12)
    ends = torch.where(has_child, inner, weight).clamp(max=1)
    reached = 1 - (1 - ends).flip(1).cumprod(1).flip(1)
    return keep.clamp(max=1).cumprod(1).sum(1), (reached[:, 1:] * (weight[:, 1:] > 0)).sum(1)


def refusal_sample(
    pipe: Any, entries: list[dict[str, Any]], window: int, guidance: float, seed: int
) -> Sample:
    """Sums of `Refusals` over a batch of images."""
    captions = [entry["caption"] for entry in entries]
    engine = image_engine(
        pipe,
        captions,
        width=window,
        guidance=guidance,
        temperature=1.0,
        seed=seed,
        rule=Refusals,
        keep_laws=True,
    )
    engine.run()
    return {"num_images": len(entries), **engine.rule.sums}  # type: ignore[attr-defined]


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
    """Offset and entries of each batch; the last one may be smaller."""
    for first in range(0, len(entries), size):
        yield first, entries[first : first + size]


def image_row(
    measurement: Measurement,
    pipe: Any,
    model: str,
    system: str,
    captions: int,
    window: int,
    guidance: float,
) -> Sample | None:
    """Forwards and shares of right attributes; the first batch serves every part."""
    judge, found = judge_of(model), {}
    for first, entries in batches(load_captions(captions, model, is_fresh=True), BATCH):
        key = f"image/{system}/w{window}/g{guidance:g}/{first:04d}"
        measure = partial(image_sample, pipe, judge, system, entries, window, guidance, first)
        if sample := measurement.get(key, measure):
            found[first] = sample
    if not found:
        return None
    # By caption, for what is compared with a system that has other batches.
    counts = {
        first + place: count
        for first, sample in found.items()
        for place, count in enumerate(sample["num_forwards"])
    }
    row = {
        "type": "row",
        "system": system,
        "window": window,
        "guidance": guidance,
        "num_images": len(counts),
        "forwards": statistics.mean(counts.values()),
        "counts": counts,
    }
    if judge is not None:
        stated = sum(sample["num_stated"] for sample in found.values())
        row["accuracy"] = sum(sample["num_right"] for sample in found.values()) / stated
        row["all_right"] = sum(s["num_all_right"] for s in found.values()) / len(counts)
    return row


def refusal_row(
    measurement: Measurement, pipe: Any, model: str, captions: int, window: int, guidance: float
) -> Sample | None:
    """Sums over all batches, and what another coupling could save of the forwards."""
    found = []
    for first, entries in batches(load_captions(captions, model, is_fresh=True), BATCH):
        key = f"refusals/w{window}/g{guidance:g}/{first:04d}"
        measure = partial(refusal_sample, pipe, entries, window, guidance, first)
        found.append(measurement.get(key, measure))
    kept = [sample for sample in found if sample is not None]
    if not kept:
        return None
    sums = {name: sum(sample[name] for sample in kept) for name in ("num_images", *REFUSALS)}
    return {"type": "refusals", "window": window, "guidance": guidance, **sums}


def against_exact(rows: list[Sample]) -> list[Sample]:
    """Rows without their counts, with the mean difference from the exact decoder's, by caption."""
    exact = {(r["window"], r["guidance"]): r["counts"] for r in rows if r["system"] == EXACT}
    made = []
    for row in rows:
        counts, against = row["counts"], exact.get((row["window"], row["guidance"]), {})
        line = {name: value for name, value in row.items() if name != "counts"}
        more = [counts[place] - against[place] for place in sorted(counts.keys() & against.keys())]
        if row["system"] != EXACT and len(more) > 1:
            line["more"] = statistics.mean(more)
            line["more_error"] = statistics.stdev(more) / len(more) ** 0.5
        made.append(line)
    return made


def main(
    parts: Annotated[str, typer.Option(help="Of law, forwards, refusals, accuracy.")] = ",".join(
        PARTS
    ),
    systems: Annotated[
        str, typer.Option(help="Names, separated by semicolons; all if empty.")
    ] = "",
    prompts: Annotated[
        int, typer.Option(help="Captions for forwards and refusals, 16 to a batch.")
    ] = 16,
    quality: Annotated[int, typer.Option(help="Captions for accuracy, 16 to a batch.")] = 112,
    windows: Annotated[str, typer.Option(help="Tokens per image and forward.")] = "32,64",
    guidance: Annotated[str, typer.Option(help="Scales; 1 is none.")] = "3",
    samples: Annotated[int, typer.Option(help="Rows of the law test.")] = 200_000,
    law_seeds: Annotated[int, typer.Option(help="Toys of the law test.")] = 3,
    minutes: Annotated[float | None, typer.Option(help="Stop then; run again to go on.")] = None,
    model: Annotated[str, typer.Option(help="A bundled image model.")] = "avatars",
    label: Annotated[str, typer.Option(help="Part of the files' names.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of samples and report.")] = Path("mmspec-bench"),
) -> None:
    """Measures what is missing and writes the report."""
    asked, widths = csv(parts, PARTS), [int(width) for width in csv(windows)]
    scales = [float(scale) for scale in csv(guidance)]
    names = systems.split(";") if systems else list(SYSTEMS)
    budget, output = Budget(minutes), Output(json_only=False)
    facts = provenance(torch.device("cpu"), [model])
    store = open_store(out, "published_image_decoders", label, facts)
    measurement = Measurement(store, budget, output)
    pipe = load_image(model, "float32")
    laws, rows, refusals = [], [], []
    for seed in range(law_seeds if "law" in asked else 0):
        for system in names:
            key = f"law/{system}/n{samples}/s{seed}"
            if sample := measurement.get(key, partial(law_sample, system, seed, samples)):
                laws.append({"type": "law", "system": system, "seed": seed} | sample)
    settings = [("forwards", s, w) for s in scales for w in widths]
    settings += [("accuracy", s, widths[0]) for s in scales]
    for part, scale, width in settings:
        count = prompts if part == "forwards" else quality
        # What keeps the law has the pictures of plain decoding.
        judged = [name for name in names if part == "forwards" or "lossy" in name]
        for system in judged if part in asked else ():
            row = image_row(measurement, pipe, model, system, count, width, scale)
            # What has no more captions than for forwards stands in that line already.
            if row and (part == "forwards" or row["num_images"] > prompts):
                rows.append(row | {"part": part})
        if part == "forwards" and "refusals" in asked:
            refusals.append(refusal_row(measurement, pipe, model, prompts, width, scale))
    rows, refusals = against_exact(rows), [row for row in refusals if row is not None]
    line = final_line(
        "published_image_decoders",
        facts,
        [*laws, *rows, *refusals],
        left_out=measurement.missing,
        failures=[],
        time_s=budget.elapsed_s,
    )
    sections = [
        ("Law on the toy", _law_table(laws)),
        (f"On {model}", _image_table(rows)),
        ("What another coupling could keep", _refusal_table(refusals)),
    ]
    publish(line, sections, out, output)


def _law_table(laws: list[Sample]) -> str:
    names = ("system", "seed", "chi_square", "df", "p")
    lines = [[str(row[name]) if name == "seed" else row[name] for name in names] for row in laws]
    for line in lines:
        line[-1] = f"{line[-1]:.2g}"
    return table(["system", "toy", "chi-square", "df", "p"], lines)


def _image_table(rows: list[Sample]) -> str:
    names = ("system", "guidance", "window", "num_images", "forwards")
    headers = ["system", "guidance", "window", "images", "forwards", "more than exact (std. error)"]
    return table(
        [*headers, "attributes right", "all right"],
        [
            [
                *(row[n] for n in names),
                f"{row['more']:+.2f} ({row['more_error']:.2f})" if "more" in row else "",
                *(percent(row[name]) if name in row else "" for name in ("accuracy", "all_right")),
            ]
            for row in rows
        ],
    )


def _refusal_table(rows: list[Sample]) -> str:
    headers = ["guidance", "window", "images", "judged", "refused", "expected: Gumbel noise"]
    headers += ["least of any coupling", "of it where TV > 0.5", "accepted a step: single", "block"]
    return table(
        headers,
        [
            [
                row["guidance"], row["window"], row["num_images"], int(row["judged"]),
                int(row["refused"]), f"{row['gumbel']:.1f}", f"{row['variation']:.1f}",
                percent(row["variation_above_half"] / row["variation"]),
                f"{row['single'] / row['steps']:.4f}", f"{row['block'] / row['steps']:.4f}",
            ]
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
