"""Captions: tokens per forward and wall time beside transformers' own ways of decoding.

Everything runs in one process on one loaded model per dtype, in turn: the same weights, attention
and kind of cache. Pictures and prompts pass the processor outside the clock; the vision tower runs
inside. Forwards are counted by a hook on the model, whoever calls it. Pictures come in *series*: a
system captions those of a series batch after batch, and ``ngram_store`` drafts later captions from
earlier ones too.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmspec.assets import bundled_names
from mmspec.bench.measure import Budget, ForwardMeter, Sample, csv, provenance, ratio, stem, timed
from mmspec.bench.report import Output, Section, percent, table
from mmspec.bench.setups import DTYPES, generate_rows
from mmspec.bench.tasks import Unavailable
from mmspec.bench.vlm_setups import (
    VLM_MODELS,
    PromptMeter,
    VisionModel,
    load_captions,
    load_vlm,
    run_vlm,
    vlm_card,
)
from mmspec.bench.written import (
    Bench,
    Config,
    Entry,
    Job,
    Measure,
    Session,
    generate_figures,
    make_card,
    make_configs,
    merged_figures,
    run_bench,
)
from mmspec.checks import require
from mmspec.drafters import DrafterSpec
from mmspec.drafters.trie import NgramTrie
from mmspec.speculation import Settings
from mmspec.tree import BUCKETS

KINDS = ("captions",)
#: transformers' modes -> their options for ``generate``; the assistant is added.
GENERATE: dict[str, dict[str, Any]] = {
    "generate": {},
    "prompt_lookup": {"prompt_lookup_num_tokens": 10},
    "hf_assistant": {},
}
#: Our drafters that need no second model.
PLAIN_DRAFTERS = {"plain": "none", "ngram": "ngram", "jacobi": "jacobi", "early_exit": "early_exit"}
#: What the bundled drafter is shown of a picture: all, a tenth or less, nothing. "self" is the
#: model itself over a tenth of its own cache.
VISUAL_TOKENS = {
    "model_all": "all",
    "model_uniform": "uniform:0.1",
    "model_attention": "attention:0.1",
    "model_pool": "pool:4",
    "model_none": "none",
    "model_self": "self",
}
OURS = (*PLAIN_DRAFTERS, "ngram_store", *VISUAL_TOKENS)
SYSTEMS = (*GENERATE, *OURS)
DEFAULT_SYSTEMS = ("generate", "prompt_lookup", "plain", "ngram", "ngram_store", "early_exit")
#: transformers decodes these one row at a time only.
SINGLE_ROW = ("prompt_lookup", "hf_assistant")

#: Ends an OCR that works beside the model, and tells its seconds.
EndOcr = Callable[[], float]
#: What one of our systems drafts with for a batch of inputs, and what ends its OCR if it has one.
Draft = Callable[[VisionModel, Sequence[Entry]], tuple[DrafterSpec, EndOcr | None]]
#: A drafter of a system for one job: it may learn from one batch to the next.
NewDraft = Callable[[str], Draft]


def run(
    model: Annotated[str, typer.Option(help="captioner, or tiny-vlm: random")] = "captioner",
    systems: Annotated[str, typer.Option(help="What to compare.")] = ",".join(DEFAULT_SYSTEMS),
    dtype: Annotated[str, typer.Option(help="Of float32, bfloat16, ...")] = "float32,bfloat16",
    temperature: Annotated[str, typer.Option(help="0 is greedy.")] = "0,1",
    batch: Annotated[str, typer.Option(help="Rows per call.")] = "1,8",
    captions: Annotated[int | None, typer.Option(help="Pictures; past 24 drawn ones.")] = None,
    series: Annotated[int, typer.Option(help="Pictures of a series; at least a batch.")] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "--tokens", help="Cap on a caption.")
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="Width of our steps: adaptive, or fixed for equal work.")
    ] = "adaptive",
    width: Annotated[int | None, typer.Option(help="Most tokens per row and forward.")] = None,
    repeats: Annotated[int, typer.Option(help="Repetitions of each input.")] = 3,
    minutes: Annotated[float | None, typer.Option(help="Stop then; run again to go on.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampled outputs.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of samples and report.")] = Path("mmspec-bench"),
    label: Annotated[str, typer.Option(help="Part of the names of both files.")] = "",
    json_only: Annotated[bool, typer.Option("--json", help="Only the last line.")] = False,
) -> dict[str, Any]:
    """Measure captions: tokens per forward and wall time beside transformers' generate.

    Returns:
        The object of the last line; see `mmspec.bench.measure.FINAL_LINE`.

    Raises:
        ValueError: If an option is out of range.
        typer.Exit: With code 1 if an exact output was not identical in float32 or float64.
    """
    stem("vlm", label)
    session = Session(
        out=out,
        label=label,
        repeats=repeats,
        budget=Budget(minutes),
        output=Output(json_only=json_only),
    )
    model, chosen = model.removeprefix("bundled:"), csv(systems, SYSTEMS)
    models = {name: load_vlm(model, name, device) for name in csv(dtype, list(DTYPES))}
    bench = Bench(
        name="vlm",
        model=model,
        kinds=KINDS,
        systems=[name for name in SYSTEMS if name in chosen],
        ours=OURS,
        single_row=SINGLE_ROW,
        measure=measure_with(drafter_of, schedule, width),
        variant=variant_of(schedule, width),
        inputs_per_task=series,
    )
    configs = make_configs(models, batch, temperature, seed=seed, max_new_tokens=max_new_tokens)
    entries = load_captions(model, captions)
    facts = provenance(torch.device(device), bundles_of(model))
    card = make_card(configs, model, card_of(entries))
    return run_bench(bench, configs, entries, facts, card, session, tables=sight_tables)


def variant_of(schedule: str, width: int | None) -> str:
    """Names the settings of our steps in the keys of samples.

    Raises:
        ValueError: If one is out of range.
    """
    Settings(schedule=schedule, width=width)
    return schedule if width is None else f"{schedule}-w{width}"


def bundles_of(model: str) -> list[str]:
    """The bundled folders that a model's measurement depends on."""
    names = (model, VLM_MODELS[model])
    return [name for name in names if name is not None and name in bundled_names()]


def card_of(entries: Sequence[Entry]) -> Callable[[VisionModel, int], list[Sample]]:
    """The static card behind the first of some inputs, repeated to a batch.

    Raises:
        ValueError: If there is no input.
    """
    require(len(entries) > 0, "inputs", "at least one", len(entries))
    return lambda loaded, size: vlm_card(loaded, loaded.encode([entries[0]] * size))


# --------------------------------------------------------------------------- systems


def new_store() -> NgramTrie:
    """What is kept of earlier outputs, as long as a drafter's own memory matches."""
    return NgramTrie(max_match=16, max_draft=BUCKETS[-1])


def drafter_of(name: str) -> Draft:
    """The drafter of a system for one series or document."""
    if name == "ngram_store":
        spec = {"name": "ngram", "memory": new_store()}
        return lambda loaded, entries: (spec, None)

    def draft(loaded: VisionModel, entries: Sequence[Entry]) -> tuple[DrafterSpec, None]:
        if name in PLAIN_DRAFTERS:
            return PLAIN_DRAFTERS[name], None
        spec = {"name": "model", "visual_tokens": VISUAL_TOKENS[name]}
        return spec if name == "model_self" else spec | {"model": assistant(loaded)}, None

    return draft


def assistant(loaded: VisionModel) -> Any:
    """The bundled drafter.

    Raises:
        Unavailable: If there is none.
    """
    if loaded.drafter is None:
        raise Unavailable(f"no drafter comes with {loaded.name}")
    return loaded.drafter


def measure_with(new_draft: NewDraft, schedule: str, width: int | None) -> Measure:
    """How a system decodes a job, batch by batch.

    Args:
        new_draft: Makes the drafter of one of our systems for one job.
        schedule: As in `mmspec.speculation.Settings`.
        width: As there.
    """
    steps = {"schedule": schedule, "width": width}

    def measure(config: Config, name: str, job: Job, repeat: int) -> Sample:
        size = config.batch
        batches = [job.entries[i : i + size] for i in range(0, len(job.entries), size)]
        encoded = [config.loaded.encode(batch) for batch in batches]
        options = {
            "max_new_tokens": job.budget,
            "temperature": config.temperature,
            "seed": config.seed + repeat,
        }
        with ForwardMeter(config.loaded.model) as meter:
            if name in GENERATE:
                tokens, time_s = _theirs(config.loaded, name, encoded, options)
                figures = {"time_s": time_s} | generate_figures(name, config, tokens, meter)
            else:
                draft, tokens, parts = new_draft(name), [], []
                for batch, inputs in zip(batches, encoded, strict=True):
                    begin = partial(draft, config.loaded, batch)
                    rows, part = _ours(config.loaded, inputs, begin, steps, options)
                    tokens += rows
                    parts.append(part)
                figures = merged_figures(parts, sum(map(len, tokens)))
        return {
            "tokens": tokens,
            "num_units": sum(map(len, tokens)),
            "num_forwards": meter.num_full,
            "num_shallow_forwards": meter.num_shallow,
            **figures,
        }

    return measure


def _ours(
    loaded: VisionModel,
    inputs: Mapping[str, Any],
    begin: Callable[[], tuple[DrafterSpec, EndOcr | None]],
    steps: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[list[list[int]], Sample]:
    def run() -> tuple[list[list[int]], Sample, EndOcr | None]:
        spec, end_ocr = begin()
        settings = Settings(drafter=spec, **steps)
        small = spec.get("model") if isinstance(spec, Mapping) else None
        with PromptMeter(small) as prompt:
            rows, figures = run_vlm(loaded, inputs, settings=settings, **options)
        if small is not None:
            figures["drafter_prompt_tokens"] = prompt.num_tokens
            figures["drafter_prompt_time_s"] = prompt.time_s
        return rows, figures, end_ocr

    (rows, figures, end_ocr), time_s = timed(run, loaded.device)
    if end_ocr is not None:
        figures["ocr_time_s"] = end_ocr()
    return rows, figures | {"time_s": time_s}


def _theirs(
    loaded: VisionModel,
    name: str,
    encoded: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> tuple[list[list[int]], float]:
    more = dict(GENERATE[name])
    if name == "hf_assistant":
        more["assistant_model"] = assistant(loaded)

    def generate() -> list[list[int]]:
        return [
            row
            for inputs in encoded
            for row in generate_rows(
                loaded.model, inputs, eos_token_ids=loaded.eos_token_ids, **options, **more
            )
        ]

    try:
        return timed(generate, loaded.device)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        if name == "generate":
            raise
        raise Unavailable(f"{type(error).__name__}: {error}") from error


# --------------------------------------------------------------------------- tables


def sight_tables(rows: Sequence[Sample]) -> list[Section]:
    """What the bundled drafter reads and how much of its acceptance that keeps."""
    whole = {row["kind"]: row for row in rows if row["system"] == "model_all"}
    lines = []
    for row in rows:
        if "drafter_prompt_tokens" not in row:
            continue
        full = whole.get(row["kind"])
        lines.append(
            [
                *(row["kind"], row["system"]),
                percent(_of(row, full, lambda r: r["drafter_prompt_tokens"])),
                1e3 * row["drafter_prompt_time_s"] / row["num_samples"],
                row["tau"],
                percent(row["num_accepted"] / max(1, row["num_drafted"])),
                percent(_of(row, full, lambda r: r["num_accepted"] / r["num_row_steps"])),
                percent(_of(row, full, lambda r: r["num_accepted"] / max(1, r["num_drafted"]))),
            ]
        )
    headers = ["kind", "system", "tokens read", "ms", "tau", "drafts accepted"]
    headers += ["accepted per step, of all", "drafts accepted, of all"]
    return [("what the drafter reads of the prompt", table(headers, lines))] if lines else []


def _of(row: Sample, full: Sample | None, figure: Callable[[Sample], float]) -> float | None:
    """A figure as a share of that of the drafter which sees all."""
    return None if full is None else ratio(figure(row), figure(full))


if __name__ == "__main__":
    typer.run(run)
