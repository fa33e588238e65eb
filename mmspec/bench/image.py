"""Images: forwards and wall time beside transformers' own image generation, and quality.

All systems run in one process on one loaded model, in turn, with the same captions. What is timed
ends with the image tokens; turning them into pixels costs the same for all and is left out.
transformers runs with its static cache (the default) and with ``cache_implementation="dynamic"``;
the faster of the two is the yardstick. It cannot run without guidance (scale 1), where our own
plain decoding is the only yardstick.
"""

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from mmspec.adapters.token_image import image_family
from mmspec.bench.measure import (
    Budget,
    ForwardMeter,
    Sample,
    csv,
    final_line,
    median,
    open_store,
    provenance,
    timed,
)
from mmspec.bench.quality import (
    FIELDS,
    grouped,
    quality_sections,
    score,
    summarise_quality,
    title_of,
)
from mmspec.bench.report import Output, card_table, percent, publish, table
from mmspec.bench.setups import DTYPES, image_card, load_captions, load_image, seeded
from mmspec.bench.tasks import System, Task, Unavailable, interleaved, run_tasks, samples_of
from mmspec.drafters.jacobi import default_window
from mmspec.pipelines.image import ImageOutput, SpeculativeImagePipeline
from mmspec.pipelines.image_decoders import DECODERS as KNOWN_DECODERS

GENERATE = {"generate": {}, "generate_dynamic": {"cache_implementation": "dynamic"}}
Systems = dict[str, tuple[str, int | None]]
#: The same as systems: name -> what runs it and its window.
GENERATED: Systems = {name: (name, 1) for name in GENERATE}
DECODERS = ("sequential", "exact", "coupled", "sjd")
#: Rows of one call when quality is measured; only speed depends on it.
QUALITY_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One configuration of the measurement."""

    pipe: Any  # a SpeculativeImagePipeline, whose model is of a class mypy does not know
    model: str
    dtype: str
    temperature: float
    batch: int
    guidance: float
    seed: int
    is_scored: bool = False

    @property
    def label(self) -> str:
        """In words."""
        what = "quality, " if self.is_scored else ""
        heat = f"T={self.temperature:g}"
        return f"{what}{self.dtype} {heat} guidance {self.guidance:g} batch {self.batch}"

    @property
    def key(self) -> str:
        """In a file."""
        what = "quality" if self.is_scored else "image"
        where = f"g{self.guidance:g}/b{self.batch}/s{self.seed}"
        return f"{what}/{self.model}/{self.dtype}/T{self.temperature:g}/{where}"


def run(
    model: Annotated[str, typer.Option(help="avatars or tiny-image")] = "avatars",
    decoders: Annotated[str, typer.Option(help="Of ours; lossy ones too.")] = ",".join(DECODERS),
    window: Annotated[
        str, typer.Option(help="Tokens per forward; auto is the pipeline's own choice.")
    ] = "8,16,32,64,128",
    guidance: Annotated[str, typer.Option(help="Scales; 1 is none.")] = "1,3,5",
    batch: Annotated[str, typer.Option(help="Images per call.")] = "1,8",
    dtype: Annotated[str, typer.Option(help="Of float32, bfloat16, ...")] = "float32",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    prompts: Annotated[int, typer.Option(help="Captions for speed; 0 is none.")] = 8,
    quality: Annotated[int, typer.Option(help="Captions for quality, up to 200; 0 is none.")] = 96,
    quality_generate: Annotated[
        bool, typer.Option("--quality-generate", help="Judge transformers' own images as well.")
    ] = False,
    quality_guidance: Annotated[str, typer.Option(help="Scales for quality.")] = "3",
    repeats: Annotated[int, typer.Option(help="Repetitions, each with a seed of its own.")] = 3,
    minutes: Annotated[float | None, typer.Option(help="Stop then; run again to go on.")] = None,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of samples and report.")] = Path("mmspec-bench"),
    json_only: Annotated[bool, typer.Option("--json", help="Only the last line.")] = False,
) -> dict[str, Any]:
    """Measure images: forwards, wall time and quality beside transformers' own generation.

    Returns:
        The object of the last line; see `mmspec.bench.measure.FINAL_LINE`.

    Raises:
        ValueError: If an option is out of range.
        typer.Exit: With code 1 if the exact decoder was not identical in float32 or float64.
    """
    output, budget = Output(json_only=json_only), Budget(minutes)
    ours = csv(decoders, list(KNOWN_DECODERS))
    pipes = {name: load_image(model, name, device) for name in csv(dtype, list(DTYPES))}
    facts = provenance(torch.device(device), ["avatars"])
    base: dict[str, Any] = {"model": model, "temperature": temperature, "seed": seed}

    def configs(sizes: Sequence[int], scales: str, *, is_scored: bool) -> list[Config]:
        return [
            Config(pipe=pipe, dtype=name, batch=size, guidance=scale, is_scored=is_scored, **base)
            for size in sizes
            for scale in map(float, csv(scales))
            for name, pipe in pipes.items()
        ]

    speed = configs([int(size) for size in csv(batch)], guidance, is_scored=False)
    scored = configs([min(QUALITY_BATCH, quality)], quality_guidance, is_scored=True)
    speed, scored = speed if prompts else [], scored if quality else []
    card = [line for config in speed for line in _card(config)]
    sections = [("Ceiling: what a forward costs", card_table(card))] if card else []
    for title, text in sections:
        output.show(title, text)
    systems = GENERATED | _systems(
        ours, [None if width == "auto" else int(width) for width in csv(window)]
    )
    width = _default_window(next(iter(pipes.values())), min(QUALITY_BATCH, max(quality, 1)))
    defaults = _systems(ours, [width])
    defaults = (GENERATED if quality_generate else {}) | defaults
    tasks = interleaved([_tasks(config, prompts, systems) for config in speed])
    judging = interleaved([_tasks(config, quality, defaults) for config in scored])
    store = open_store(out / "image.jsonl", facts)
    missing = run_tasks([*tasks, *judging], repeats, store, budget, output.say)
    missing += _unfilled(speed, prompts)
    rows = summarise(samples_of(tasks, repeats, store))
    judged = summarise_quality(samples_of(judging, repeats, store))
    results = _sections(rows, judged)
    for title, text in results:
        output.show(title, text)
    line = final_line(
        "image",
        facts,
        [*card, *rows, *judged],
        left_out=missing,
        failures=_failures(rows),
        time_s=budget.elapsed_s,
    )
    return publish(line, [*sections, *results], out, output)


# --------------------------------------------------------------------------- tasks


def _default_window(pipe: SpeculativeImagePipeline, batch: int) -> int:
    return default_window(image_family(pipe.model).layout(None, None).num_tokens, batch)


def _systems(decoders: Sequence[str], windows: Sequence[int | None]) -> Systems:
    """Name -> decoder and window (None is the pipeline's choice); plain decoding has no window."""
    systems: Systems = {}
    for decoder in decoders:
        if decoder == "sequential":
            systems[decoder] = (decoder, 1)
        else:
            for width in windows:
                name = f"{decoder}_{'auto' if width is None else f'w{width}'}"
                systems[name] = (decoder, width)
    return systems


def _tasks(config: Config, limit: int, systems: Systems) -> list[Task]:
    entries = load_captions(limit, is_fresh=config.is_scored)
    size = config.batch
    # A call that is smaller than the others would blur the times, not the quality.
    count = len(entries) if config.is_scored else len(entries) - len(entries) % size
    return [_task(config, i, entries[i : i + size], systems) for i in range(0, count, size)]


def _unfilled(configs: Sequence[Config], limit: int) -> list[str]:
    """Captions that no task takes because they do not fill a batch."""
    count = len(load_captions(limit))
    return [
        f"{config.label}: {count % config.batch} captions that do not fill a batch"
        for config in configs
        if count % config.batch
    ]


def _task(
    config: Config,
    first: int,
    entries: Sequence[Mapping[str, Any]],
    systems: Systems,
) -> Task:
    captions = [entry["caption"] for entry in entries]

    def system(decoder: str, width: int | None) -> System:
        return lambda repeat: _measure(config, decoder, width, captions, repeat)

    def finish(samples: Mapping[str, Sample]) -> None:
        if config.is_scored and config.model == "avatars":
            score(config.pipe.model, samples.values(), [entry["attributes"] for entry in entries])
        _compare(samples, is_greedy=config.temperature == 0)

    return Task(
        key=f"{config.key}/{first:04d}",
        label=config.label,
        systems={name: system(*what) for name, what in systems.items()},
        facts={
            "type": "quality_sample" if config.is_scored else "sample",
            "model": config.model,
            "dtype": config.dtype,
            "temperature": config.temperature,
            "guidance": config.guidance,
            "batch": config.batch,
            "input": f"{first:04d}",
        },
        # One image of each kind of shape; the tokens are thrown away.
        warm_up=lambda: _warm_up(config, captions, systems),
        finish=finish,
        max_repeats=1 if config.is_scored else None,
    )


def _warm_up(config: Config, captions: Sequence[str], systems: Container[str]) -> None:
    _ours(config, "exact", 16, captions, 0)
    if config.guidance > 1 and "generate" in systems:
        _generate(config, captions[:1], 0, {})


def _measure(
    config: Config, decoder: str, width: int | None, captions: Sequence[str], repeat: int
) -> Sample:
    backbone, seed = config.pipe.model.model.language_model, config.seed + repeat
    if decoder in GENERATE and not config.guidance > 1:
        raise Unavailable("transformers' Janus needs a guidance scale above 1")
    with ForwardMeter(backbone) as meter:
        if decoder in GENERATE:
            tokens, time_s = timed(
                lambda: _generate(config, captions, seed, GENERATE[decoder]), config.pipe.device
            )
            figures = _plain_figures(meter.num_full, len(captions))
        else:
            out, time_s = timed(
                lambda: _ours(config, decoder, width, captions, seed), config.pipe.device
            )
            tokens, figures = out.tokens, _our_figures(out)
    return {
        "tokens": tokens,
        "window": width,
        "num_images": len(captions),
        "num_units": tokens.numel(),
        "time_s": time_s,
        "num_forwards": meter.num_full,
        **figures,
    }


def _ours(
    config: Config, decoder: str, width: int | None, captions: Sequence[str], seed: int
) -> ImageOutput:
    return config.pipe(
        list(captions),
        guidance_scale=config.guidance,
        generator=seeded(seed, len(captions)),
        decoder=decoder,
        window=width,
        temperature=config.temperature,
        output_type="tokens",
    )


def _our_figures(out: ImageOutput) -> Sample:
    phases = ("prefill_time_s", "draft_time_s", "verify_time_s", "other_time_s")
    return {
        "guarantee": str(out.stats.guarantee),
        "num_steps": out.stats.num_target_forwards,
        # Rows of an image batch end at different steps, so tau counts each row's own.
        "num_row_steps": sum(row.num_target_forwards for row in out.row_stats),
        **{name: getattr(out.stats, name) for name in phases},
    }


def _plain_figures(num_steps: int, num_rows: int) -> Sample:
    return {
        "guarantee": "yardstick",
        "num_steps": num_steps,
        "num_row_steps": num_steps * num_rows,
    }


def _generate(
    config: Config, captions: Sequence[str], seed: int, options: Mapping[str, Any]
) -> Tensor:
    """The same job for transformers; the whole codebook is sampled, as in ours."""
    prompts = [config.pipe._prompt_ids(text) for text in captions]
    longest, pad = max(map(len, prompts)), config.pipe.model.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
    return config.pipe.model.generate(
        ids.to(config.pipe.device),
        attention_mask=mask.to(config.pipe.device),
        generation_mode="image",
        guidance_scale=config.guidance,
        **sampling,
        **options,
    ).cpu()


def _compare(samples: Mapping[str, Sample], *, is_greedy: bool) -> None:
    """Replaces the tokens of each sample by how far they agree with the yardsticks."""
    outputs = {name: sample.pop("tokens") for name, sample in samples.items()}
    for name, sample in samples.items():
        if name.startswith(("exact", "sequential")) and "sequential" in outputs:
            same = (outputs[name] == outputs["sequential"]).all(1)
            sample["num_rows_equal_sequential"] = int(same.sum())
        if is_greedy and "generate" in outputs:
            same = (outputs[name] == outputs["generate"]).all(1)
            sample["num_rows_equal_generate"] = int(same.sum())


def _card(config: Config) -> list[Sample]:
    lines = image_card(config.pipe, config.batch, config.guidance)
    facts = {
        "type": "card",
        "model": config.model,
        "dtype": config.dtype,
        "batch": config.batch,
        "guidance": config.guidance,
    }
    return [facts | line for line in lines]


# --------------------------------------------------------------------------- rows


def summarise(samples: Sequence[Sample]) -> list[Sample]:
    """One row per configuration and system."""
    rows = []
    for key, systems in sorted(grouped(samples).items()):
        own = [name for name in GENERATE if name in systems]
        best = min(own, key=lambda name: _seconds(systems[name])) if own else None
        for name, found in systems.items():
            rows.append(
                {"type": "row", **dict(zip(FIELDS, key, strict=True)), "system": name}
                | _figures(found)
                | {
                    "yardstick": best,
                    "speedup_median": _median_speedup(found, systems.get(best or "", [])),
                    "speedup_over_sequential_median": _median_speedup(
                        found, systems.get("sequential", [])
                    ),
                }
            )
    return rows


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


def _failures(rows: Sequence[Sample]) -> list[str]:
    """Exactness is a promise where rounding does not decide: float32 and float64."""
    return [
        f"{row['dtype']} guidance {row['guidance']:g} batch {row['batch']}: {row['system']} equals "
        f"sequential in {percent(row['equal_sequential'])} of the images only"
        for row in rows
        if row["dtype"] in ("float32", "float64")
        and row["equal_sequential"] is not None
        and row["equal_sequential"] < 1
    ]


def _sections(rows: Sequence[Sample], judged: Sequence[Sample]) -> list[tuple[str, str]]:
    groups: dict[str, list[Sample]] = defaultdict(list)
    for row in rows:
        groups[title_of(row)].append(row)
    sections = [(title, _speed_table(found)) for title, found in groups.items()]
    return [*sections, *quality_sections(judged)]


def _speed_table(rows: Sequence[Sample]) -> str:
    headers = ["system", "guarantee", "forwards", "tau", "s/call", "images/min"]
    headers += ["× transformers (median)", "× sequential (median)", "= sequential", "= generate"]
    names = [
        *("system", "guarantee", "num_forwards_per_call", "tau", "time_s_per_call"),
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


if __name__ == "__main__":
    typer.run(run)
