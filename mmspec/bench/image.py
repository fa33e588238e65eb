"""Images: forwards, wall time and memory beside transformers' own image generation, and quality.

All systems run in one process on one loaded model, in turn, with the same captions. What is timed
ends with the image tokens; turning them into pixels costs the same for all and is left out.
transformers runs with its static cache (the default) and with ``cache_implementation="dynamic"``;
the faster of the two is the yardstick. It cannot run without guidance (scale 1), where our own
plain decoding is the only yardstick.
"""

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from mmspec.adapters.token_image import image_family
from mmspec.bench.image_report import GENERATE, failures, speed_sections, summarise
from mmspec.bench.image_setups import (
    bundle_of,
    image_card,
    image_models,
    judge_of,
    load_captions,
    load_image,
)
from mmspec.bench.measure import (
    Budget,
    ForwardMeter,
    Sample,
    csv,
    final_line,
    open_store,
    provenance,
    stem,
    timed,
)
from mmspec.bench.memory import measured_memory, memory_sections, summarise_memory
from mmspec.bench.quality import quality_sections, score, summarise_quality
from mmspec.bench.report import Output, card_table, publish
from mmspec.bench.setups import DTYPES, seeded
from mmspec.bench.tasks import System, Task, Unavailable, interleaved, run_tasks, samples_of
from mmspec.drafters.jacobi import default_window
from mmspec.pipelines.image import ImageOutput, SpeculativeImagePipeline
from mmspec.pipelines.image_decoders import DECODERS

Systems = dict[str, tuple[str, int | None]]
#: The same as systems: name -> what runs it and its window.
GENERATED: Systems = {name: (name, 1) for name in GENERATE}
#: Rows of one call when quality is measured; only speed depends on it.
QUALITY_BATCH = 16
#: What a task is for -> the type of its samples.
PURPOSES = {"image": "sample", "quality": "quality_sample", "memory": "memory_sample"}


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
    purpose: str = "image"
    #: Calls of this process that chose their own window, by what they share their findings with.
    chosen: Counter[tuple[str, str, float]] = field(default_factory=Counter)

    @property
    def label(self) -> str:
        """In words."""
        what = "" if self.purpose == "image" else f"{self.purpose}, "
        heat = f"T={self.temperature:g}"
        return f"{what}{self.dtype} {heat} guidance {self.guidance:g} batch {self.batch}"

    @property
    def key(self) -> str:
        """In a file."""
        where = f"g{self.guidance:g}/b{self.batch}/s{self.seed}"
        return f"{self.purpose}/{self.model}/{self.dtype}/T{self.temperature:g}/{where}"


def run(
    model: Annotated[
        str, typer.Option(help="bundled:NAME, or NAME; tiny-image, mid-image: random weights.")
    ] = "avatars",
    decoders: Annotated[str, typer.Option(help="Of ours.")] = ",".join(DECODERS),
    window: Annotated[
        str,
        typer.Option("--window", "--windows", help="Tokens per forward; auto: the default choice."),
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
    memory: Annotated[
        bool, typer.Option("--memory", help="Count the bytes that one call of each system takes.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Repetitions, each with a seed of its own.")] = 3,
    minutes: Annotated[float | None, typer.Option(help="Stop then; run again to go on.")] = None,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of samples and report.")] = Path("mmspec-bench"),
    label: Annotated[str, typer.Option(help="Part of the names of both files.")] = "",
    json_only: Annotated[bool, typer.Option("--json", help="Only the last line.")] = False,
) -> dict[str, Any]:
    """Measure images: forwards, wall time, memory, quality beside transformers' own generation.

    Returns:
        The object of the last line; see `mmspec.bench.measure.FINAL_LINE`.

    Raises:
        ValueError: If an option is out of range.
        typer.Exit: With code 1 if the exact decoder was not identical in float32 or float64.
    """
    stem("image", label)
    output, budget = Output(json_only=json_only), Budget(minutes)
    [model] = csv(model.removeprefix("bundled:"), image_models())
    ours = csv(decoders, list(DECODERS))
    systems = GENERATED | _systems(ours, [_width(width) for width in csv(window)])
    pipes = {name: load_image(model, name, device) for name in csv(dtype, list(DTYPES))}
    facts = provenance(torch.device(device), [bundle_of(model)])
    base: dict[str, Any] = {"model": model, "temperature": temperature, "seed": seed}
    base["chosen"] = Counter()

    def configs(sizes: Sequence[int], scales: str, purpose: str) -> list[Config]:
        return [
            Config(pipe=pipe, dtype=name, batch=size, guidance=scale, purpose=purpose, **base)
            for size in sizes
            for scale in map(float, csv(scales))
            for name, pipe in pipes.items()
        ]

    sizes = [int(size) for size in csv(batch)]
    speed = configs(sizes, guidance, "image") if prompts else []
    held = configs(sizes, guidance, "memory") if memory else []
    judge = judge_of(model)
    count = quality if judge is not None else 0
    scored = configs([min(QUALITY_BATCH, count)], quality_guidance, "quality") if count else []
    card = [line for config in speed for line in _card(config)]
    sections = [("Ceiling: what a forward costs", card_table(card))] if card else []
    for title, text in sections:
        output.show(title, text)
    width = _default_window(next(iter(pipes.values())), min(QUALITY_BATCH, max(count, 1)))
    defaults = (GENERATED if quality_generate else {}) | _systems(ours, [width])
    tasks = {
        "image": interleaved([_tasks(config, prompts, systems) for config in speed]),
        "quality": interleaved([_tasks(config, count, defaults) for config in scored]),
        "memory": interleaved([_tasks(config, config.batch, systems) for config in held]),
    }
    store = open_store(out, "image", label, facts)
    missing = run_tasks(
        [t for each in tasks.values() for t in each], repeats, store, budget, output.say
    )
    missing += _unfilled(speed, prompts)
    if quality and judge is None:
        missing.append(f"quality: nothing says what pictures of {model} show")
    samples = {name: samples_of(each, repeats, store) for name, each in tasks.items()}
    rows = summarise(samples["image"])
    judged, stored = summarise_quality(samples["quality"]), summarise_memory(samples["memory"])
    results = [*speed_sections(rows), *memory_sections(stored), *quality_sections(judged)]
    for title, text in results:
        output.show(title, text)
    line = final_line(
        "image",
        facts,
        [*card, *rows, *stored, *judged],
        left_out=missing,
        failures=failures(rows),
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


def _width(text: str) -> int | None:
    """A window; None where it is chosen.

    Raises:
        ValueError: If it is neither a number above 0 nor "auto".
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"a window must be a number above 0 or 'auto', got {text!r}")
    return int(text)


def _tasks(config: Config, limit: int, systems: Systems) -> list[Task]:
    is_scored = config.purpose == "quality"
    entries = load_captions(limit, config.model, is_fresh=is_scored)
    size = config.batch
    # A call that is smaller than the others would blur the times, not the quality.
    count = len(entries) if is_scored else len(entries) - len(entries) % size
    return [_task(config, i, entries[i : i + size], systems) for i in range(0, count, size)]


def _unfilled(configs: Sequence[Config], limit: int) -> list[str]:
    """Captions that no task takes because they do not fill a batch."""
    count = len(load_captions(limit, configs[0].model)) if configs else 0
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
    measure = _memory if config.purpose == "memory" else _measure

    def system(decoder: str, width: int | None) -> System:
        return lambda repeat: measure(config, decoder, width, captions, repeat)

    def finish(samples: Mapping[str, Sample]) -> None:
        judge = judge_of(config.model)
        if config.purpose == "quality" and judge is not None:
            stated = [entry["attributes"] for entry in entries]
            score(judge, config.pipe.model, samples.values(), stated)
        _compare(samples, is_greedy=config.temperature == 0)

    return Task(
        key=f"{config.key}/{first:04d}",
        label=config.label,
        systems={name: system(*what) for name, what in systems.items()},
        facts={
            "type": PURPOSES[config.purpose],
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
        repeats=None if config.purpose == "image" else 1,
    )


def _warm_up(config: Config, captions: Sequence[str], systems: Container[str]) -> None:
    _ours(config, "exact", 16, captions, 0)
    if config.guidance > 1 and "generate" in systems:
        _generate(config, captions[:1], 0, {})


def _measure(
    config: Config, decoder: str, width: int | None, captions: Sequence[str], repeat: int
) -> Sample:
    call, figures = _call(config, decoder, width, captions, repeat)
    with ForwardMeter(config.pipe.model.model.language_model) as meter:
        answer, time_s = timed(call, config.pipe.device)
    tokens, counts = figures(answer, meter.num_full)
    return {
        "tokens": tokens,
        "window": width,
        "num_images": len(captions),
        "num_units": tokens.numel(),
        "time_s": time_s,
        "num_forwards": meter.num_full,
        **counts,
    }


def _memory(
    config: Config, decoder: str, width: int | None, captions: Sequence[str], repeat: int
) -> Sample:
    call, figures = _call(config, decoder, width, captions, repeat)
    answer, sizes = measured_memory(config.pipe.model.model.language_model, call)
    tokens, counts = figures(answer, 0)
    return {
        "tokens": tokens,
        "window": width,
        "num_images": len(captions),
        "guarantee": counts["guarantee"],
        **sizes,
    }


def _call(
    config: Config, decoder: str, width: int | None, captions: Sequence[str], repeat: int
) -> tuple[Callable[[], Any], Callable[[Any, int], tuple[Tensor, Sample]]]:
    """What makes the images, and what turns its answer and the forwards into tokens and figures."""
    seed = config.seed + repeat
    if decoder in GENERATE:
        if not config.guidance > 1:
            raise Unavailable("transformers' Janus needs a guidance scale above 1")
        return (
            lambda: _generate(config, captions, seed, GENERATE[decoder]),
            lambda tokens, num_forwards: (tokens, _plain_figures(num_forwards, len(captions))),
        )
    cell = (decoder, config.dtype, config.guidance)
    num_before = config.chosen[cell]
    config.chosen[cell] += width is None
    return (
        lambda: _ours(config, decoder, width, captions, seed),
        lambda out, _: (out.tokens, _our_figures(out) | {"num_calls_before": num_before}),
    )


def _ours(
    config: Config, decoder: str, width: int | None, captions: Sequence[str], seed: int
) -> ImageOutput:
    try:
        return _image(config, decoder, width, captions, seed)
    except ValueError as error:
        if decoder in ("sequential", "exact"):
            raise
        raise Unavailable(str(error)) from error


def _image(
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
        "num_drafted": out.stats.num_drafted,
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
        if sample["guarantee"] == "exact" and "sequential" in outputs:
            same = (outputs[name] == outputs["sequential"]).all(1)
            sample["num_rows_equal_sequential"] = int(same.sum())
        if is_greedy and "generate" in outputs:
            same = (outputs[name] == outputs["generate"]).all(1)
            sample["num_rows_equal_generate"] = int(same.sum())


def _card(config: Config) -> list[Sample]:
    lines = image_card(config.pipe, config.model, config.batch, config.guidance)
    facts = {
        "type": "card",
        "model": config.model,
        "dtype": config.dtype,
        "batch": config.batch,
        "guidance": config.guidance,
    }
    return [facts | line for line in lines]


if __name__ == "__main__":
    typer.run(run)
