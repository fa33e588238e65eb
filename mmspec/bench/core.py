"""The core: what our loop costs beside transformers' own, and where the time of a step goes.

Two questions. Does plain decoding through our engine (no drafter, one token per forward) keep up
with ``generate`` on the same weights, attention and kind of cache? And which share of the wall time
is spent outside the forwards of the model, in the bookkeeping that speculation needs? A tiny model
makes both questions hard, for its forwards cost next to nothing; ``mid`` and ``mid-image`` have
random weights too, but forwards of about 30 ms, as a small real model has.

The first question is asked by short runs of both, back to back, many times: a single ratio of two
times is off by several percent, the median of many is not.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from mmspec.bench.image_setups import (
    bundle_of,
    image_card,
    image_engine,
    image_models,
    load_captions,
    load_image,
)
from mmspec.bench.measure import (
    Budget,
    ForwardMeter,
    PhaseClock,
    Sample,
    csv,
    final_line,
    median,
    open_store,
    provenance,
    quartiles,
    ratio,
    stem,
    timed,
)
from mmspec.bench.report import Output, card_table, percent, publish, table
from mmspec.bench.setups import (
    DTYPES,
    TEXT_MODELS,
    TextModel,
    generate_text,
    load_prompts,
    load_text,
    text_card,
    text_engine,
)
from mmspec.bench.tasks import System, Task, interleaved, run_tasks, samples_of
from mmspec.engine import Engine
from mmspec.pipelines.image import SpeculativeImagePipeline

#: Part of the engine -> its methods -> the phase they are.
PHASES = {
    "schedule": {"plan": "plan", "observe": "observe"},
    "drafter": {"propose": "propose", "commit": "learn"},
    "target": {"score": "score", "commit": "commit"},
    "rule": {"verify": "verify"},
    "ledger": {"record": "record"},
}
ORDER = ("plan", "propose", "forward", "score", "verify", "commit", "learn", "record", "observe")
#: Largest share of wall time outside forwards that we want.
GOALS = {"smollm2": 0.10, "avatars": 0.25, "tiny-image": 0.25, "mid": 0.05, "mid-image": 0.05}
GUIDANCE = 3.0
#: Windows of the exact decoder whose phases are timed.
WINDOWS = (16, 32)
#: Models whose runs are so short that a pair of them is off by several percent.
SHORT = ("tiny",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One configuration of the measurement."""

    model: str
    dtype: str
    batch: int
    temperature: float
    num_tokens: int
    num_pairs: int
    seed: int

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.model} {self.dtype} T={self.temperature:g} batch {self.batch}"

    @property
    def facts(self) -> dict[str, object]:
        """Fields of every sample."""
        names = ("model", "dtype", "temperature", "batch")
        return {name: getattr(self, name) for name in names}


def run(
    model: Annotated[
        str, typer.Option(help="Of tiny, mid, smollm2, mid-image, tiny-image, avatars, ...")
    ] = "tiny,smollm2,avatars",
    dtype: Annotated[str, typer.Option(help="Of float32, bfloat16, ...")] = "float32,bfloat16",
    temperature: Annotated[str, typer.Option(help="0 is greedy.")] = "0,1",
    batch: Annotated[str, typer.Option(help="Rows per call.")] = "1,8",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per row and call.")] = 64,
    repeats: Annotated[int, typer.Option(help="Repetitions of each call.")] = 5,
    pairs: Annotated[
        int, typer.Option(help="Repetitions of the loop beside generate for the tiny model.")
    ] = 60,
    minutes: Annotated[float | None, typer.Option(help="Stop then; run again to go on.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampled outputs.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of samples and report.")] = Path("mmspec-bench"),
    label: Annotated[str, typer.Option(help="Part of the names of both files.")] = "",
    json_only: Annotated[bool, typer.Option("--json", help="Only the last line.")] = False,
) -> dict[str, Any]:
    """Measure the core: our plain loop beside generate, and the time outside forwards.

    Returns:
        The object of the last line; see `mmspec.bench.measure.FINAL_LINE`.

    Raises:
        ValueError: If an option is out of range.
        typer.Exit: With code 1 if plain greedy decoding was not identical in float32 or float64.
    """
    stem("core", label)
    output, budget = Output(json_only=json_only), Budget(minutes)
    names = csv(model.replace("bundled:", ""), (*TEXT_MODELS, *image_models()))
    loaded = {
        (name, kind): _load(name, kind, device)
        for name in names
        for kind in csv(dtype, list(DTYPES))
    }
    configs = [
        Config(
            model=name,
            dtype=kind,
            batch=int(size),
            temperature=float(heat),
            num_tokens=max_new_tokens,
            num_pairs=pairs if name in SHORT else repeats,
            seed=seed,
        )
        for size in csv(batch)
        for heat in csv(temperature)
        for name, kind in loaded
    ]
    bundles = {bundle_of(name) for name in names if name not in TEXT_MODELS}
    facts = provenance(torch.device(device), ["prompts", *sorted(bundles)])
    sizes = [int(size) for size in csv(batch)]
    card = [
        {"type": "card", "model": name, "dtype": kind, "batch": size, **line}
        for (name, kind), what in loaded.items()
        for size in sizes
        for line in _card(what, name, size)
    ]
    output.show("Ceiling: what a forward costs", card_table(card))
    tasks = interleaved([_tasks(config, loaded[config.model, config.dtype]) for config in configs])
    store = open_store(out, "core", label, facts)
    missing = run_tasks(tasks, repeats, store, budget, output.say)
    rows = summarise(samples_of(tasks, repeats, store))
    sections = [("Ceiling: what a forward costs", card_table(card)), *_sections(rows)]
    for title, text in sections[1:]:
        output.show(title, text)
    line = final_line(
        "core",
        facts,
        [*card, *rows],
        left_out=missing,
        failures=_failures(rows),
        time_s=budget.elapsed_s,
    )
    return publish(line, sections, out, output)


def _load(name: str, dtype: str, device: str) -> TextModel | SpeculativeImagePipeline:
    if name in TEXT_MODELS:
        return load_text(name, dtype, device, ends=False)
    return load_image(name, dtype, device)


def _card(loaded: TextModel | SpeculativeImagePipeline, name: str, batch: int) -> list[Sample]:
    if isinstance(loaded, TextModel):
        return text_card(loaded, batch)
    return image_card(loaded, name, batch, GUIDANCE)


# --------------------------------------------------------------------------- tasks


def _tasks(config: Config, loaded: TextModel | SpeculativeImagePipeline) -> list[Task]:
    """The loop beside generate (text only), and the phases of our steps."""
    if isinstance(loaded, TextModel):
        return _text_tasks(config, loaded)
    return _image_tasks(config, loaded)


def _text_tasks(config: Config, loaded: TextModel) -> list[Task]:
    entries = load_prompts(["edit"], config.batch)
    prompts = [loaded.encode(entry["prompt"]) for entry in entries]

    def engine(drafter: str, num_tokens: int, seed: int) -> Engine:
        return text_engine(
            loaded,
            prompts,
            drafter=drafter,
            max_new_tokens=num_tokens,
            temperature=config.temperature,
            seed=seed,
        )

    def plain(num_tokens: int, seed: int) -> list[list[int]]:
        return list(engine("none", num_tokens, seed).run().units)

    def generate(num_tokens: int, seed: int) -> list[list[int]]:
        return generate_text(
            loaded,
            prompts,
            max_new_tokens=num_tokens,
            temperature=config.temperature,
            seed=seed,
        )

    def warm_up() -> None:
        generate(4, 0)
        engine("ngram", 16, 0).run()

    def whole(call: Callable[[int, int], list[list[int]]]) -> System:
        def measure(repeat: int) -> Sample:
            seed = config.seed + repeat
            with ForwardMeter(loaded.model) as meter:
                tokens, time_s = timed(lambda: call(config.num_tokens, seed), loaded.device)
            return {
                "tokens": tokens,
                "num_units": sum(map(len, tokens)),
                "num_forwards": meter.num_full,
                "time_s": time_s,
                "forward_time_s": meter.time_s,
            }

        return measure

    def phases(drafter: str) -> System:
        return lambda repeat: _clocked(
            lambda: engine(drafter, config.num_tokens, config.seed + repeat), loaded.model, []
        )

    key = f"{config.model}/{config.dtype}/T{config.temperature:g}/b{config.batch}"
    key += f"/n{config.num_tokens}/s{config.seed}"
    common = {"label": config.label, "warm_up": warm_up}
    return [
        Task(
            key=f"loop/{key}",
            systems={"generate": whole(generate), "plain": whole(plain)},
            facts={"type": "loop_sample", **config.facts},
            finish=lambda samples: _compare(samples, is_greedy=config.temperature == 0),
            repeats=config.num_pairs,
            **common,  # type: ignore[arg-type]
        ),
        Task(
            key=f"phases/{key}",
            systems={"plain": phases("none"), "ngram": phases("ngram")},
            facts={"type": "phase_sample", **config.facts},
            **common,  # type: ignore[arg-type]
        ),
    ]


def _image_tasks(config: Config, pipe: SpeculativeImagePipeline) -> list[Task]:
    captions = [entry["caption"] for entry in load_captions(config.batch, config.model)]
    family_model: Any = pipe.model.model

    def phases(window: int) -> System:
        return lambda repeat: _clocked(
            lambda: image_engine(
                pipe,
                captions,
                width=window,
                guidance=GUIDANCE,
                temperature=config.temperature,
                seed=config.seed + repeat,
            ),
            family_model.language_model,
            # Codes pass the aligner on their way in, in transformers' own loop as well.
            [family_model.generation_aligner, family_model.generation_head],
        )

    def warm_up() -> None:
        for width in WINDOWS:
            phases(width)(0)

    key = f"{config.model}/{config.dtype}/T{config.temperature:g}/b{config.batch}/s{config.seed}"
    return [
        Task(
            key=f"phases/{key}",
            label=config.label,
            systems={"sequential": phases(1), **{f"exact_w{w}": phases(w) for w in WINDOWS}},
            facts={"type": "phase_sample", **config.facts},
            warm_up=warm_up,
        )
    ]


@torch.no_grad()
def _clocked(make: Callable[[], Engine], model: nn.Module, heads: Sequence[nn.Module]) -> Sample:
    """Runs an engine with a clock around every part; the clocks cost about a microsecond each."""
    started = time.perf_counter()
    engine: Any = make()
    seconds: dict[str, float] = {}
    for part, methods in PHASES.items():
        setattr(engine, part, PhaseClock(getattr(engine, part), methods, seconds))
    with ForwardMeter(model, heads, exact_clock=True) as meter:
        prefilling = time.perf_counter()
        engine.prefill()
        prefill_s, prefill_forward_s = time.perf_counter() - prefilling, meter.time_s
        result = engine.run()
    wall_s = time.perf_counter() - started
    seconds["forward"] = meter.time_s - prefill_forward_s
    # A drafter may call the model too (early exit); the systems here do not.
    seconds["score"] -= seconds["forward"]
    return {
        "num_units": result.stats.num_units,
        "num_steps": len(result.steps),
        "num_forwards": meter.num_full,
        "tau": result.stats.tau,
        "guarantee": str(result.stats.guarantee),
        "time_s": wall_s,
        "prefill_time_s": prefill_s,
        "forward_time_s": meter.time_s,
        "phases_s": seconds,
    }


def _compare(samples: Mapping[str, Sample], *, is_greedy: bool) -> None:
    outputs = {name: sample.pop("tokens") for name, sample in samples.items()}
    if is_greedy:
        pairs = zip(outputs["plain"], outputs["generate"], strict=True)
        samples["plain"]["num_rows"] = len(outputs["plain"])
        samples["plain"]["num_rows_equal"] = sum(own == other for own, other in pairs)


# --------------------------------------------------------------------------- rows

_FIELDS = ("model", "dtype", "temperature", "batch")


def summarise(samples: Sequence[Sample]) -> list[Sample]:
    """Rows of both questions, one per configuration (and system)."""
    loops: dict[tuple[Any, ...], dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    phases: dict[tuple[Any, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        key = tuple(sample[name] for name in _FIELDS)
        if sample["type"] == "loop_sample":
            loops[key][sample["system"]].append(sample)
        else:
            phases[*key, sample["system"]].append(sample)
    rows = [_loop_row(key, systems) for key, systems in loops.items()]
    rows += [_phase_row(key, found) for key, found in phases.items()]
    return rows


def _loop_row(key: tuple[Any, ...], systems: Mapping[str, list[Sample]]) -> Sample:
    own, theirs = systems["plain"], {s["repeat"]: s for s in systems["generate"]}
    pairs = [(theirs[s["repeat"]], s) for s in own if s["repeat"] in theirs]
    speedups = [_per_token(other, "time_s") / _per_token(s, "time_s") for other, s in pairs]
    equal = sum(s.get("num_rows_equal", 0) for s in own)
    row = {
        "type": "loop",
        **dict(zip(_FIELDS, key, strict=True)),
        "num_pairs": len(pairs),
        "speedup_median": median(speedups),
        "speedup_quartiles": quartiles(speedups),
        "equal_generate": ratio(equal, sum(s.get("num_rows", 0) for s in own)),
    }
    for name, samples in systems.items():
        for part, measure in _PARTS.items():
            row[f"{name}_{part}_ms"] = 1e3 * (median(measure(s) for s in samples) or 0.0)
    return row


def _per_token(sample: Sample, what: str) -> float:
    return sample[what] / sample["num_units"]


#: What is said of a run of either loop, in seconds per token.
_PARTS: dict[str, Callable[[Sample], float]] = {
    "total": lambda s: _per_token(s, "time_s"),
    "forward": lambda s: _per_token(s, "forward_time_s"),
    "outside": lambda s: _per_token(s, "time_s") - _per_token(s, "forward_time_s"),
}


def _phase_row(key: tuple[Any, ...], samples: Sequence[Sample]) -> Sample:
    shares = [1 - s["forward_time_s"] / s["time_s"] for s in samples]
    steps = sum(s["num_steps"] for s in samples)
    return {
        "type": "phases",
        **dict(zip((*_FIELDS, "system"), key, strict=True)),
        "num_samples": len(samples),
        "guarantee": samples[0]["guarantee"],
        "tau": sum(s["tau"] for s in samples) / len(samples),
        "outside_share": median(shares),
        "goal_share": GOALS.get(key[0]),
        "prefill_ms": 1e3 * (median(s["prefill_time_s"] for s in samples) or 0.0),
        "us_per_step": {
            name: 1e6 * sum(s["phases_s"].get(name, 0.0) for s in samples) / steps for name in ORDER
        },
    }


def _failures(rows: Sequence[Sample]) -> list[str]:
    """Exactness is a promise where rounding does not decide: float32 and float64."""
    return [
        f"{row['model']} {row['dtype']} batch {row['batch']}: plain equals generate in "
        f"{percent(row['equal_generate'])} of the outputs only"
        for row in rows
        if row["type"] == "loop"
        and row["dtype"] in ("float32", "float64")
        and row["equal_generate"] is not None
        and row["equal_generate"] < 1
    ]


def _sections(rows: Sequence[Sample]) -> list[tuple[str, str]]:
    loops = [
        [
            *_place(row),
            row["num_pairs"],
            *(row[f"{name}_{part}_ms"] for part in _PARTS for name in ("generate", "plain")),
            f"{row['speedup_median']:.3f}",
            " to ".join(f"{quartile:.3f}" for quartile in row["speedup_quartiles"]),
            percent(row["equal_generate"]),
        ]
        for row in rows
        if row["type"] == "loop"
    ]
    phases = [
        [
            *_place(row),
            row["system"],
            row["tau"],
            percent(row["outside_share"]),
            percent(row["goal_share"]),
            *(round(row["us_per_step"][name]) for name in ORDER),
        ]
        for row in rows
        if row["type"] == "phases"
    ]
    common = ["model", "dtype", "T", "batch"]
    return [
        (
            "Our plain loop beside generate",
            table(
                [
                    *common,
                    "pairs",
                    "generate ms/token",
                    "plain ms/token",
                    "generate, forwards",
                    "plain, forwards",
                    "generate, outside",
                    "plain, outside",
                    "× generate (median)",
                    "quartiles",
                    "= generate",
                ],
                loops,
            ),
        ),
        (
            "Share of wall time outside forwards, and microseconds per step by phase",
            table([*common, "system", "tau", "outside", "goal at most", *ORDER], phases),
        ),
    ]


def _place(row: Sample) -> list[object]:
    return [row["model"], row["dtype"], f"{row['temperature']:g}", row["batch"]]


if __name__ == "__main__":
    typer.run(run)
