"""Images: forwards, wall time and memory beside transformers' own image generation, and quality.

All systems run in one process on one loaded model, in turn, with the same captions. What is timed
ends with the image tokens; turning them into pixels costs the same for all and is left out.
A call may be for more images than a batch has (``--images-per-call``): transformers and our own
decoders then make them batch by batch, and exact decoders also with rows that are refilled as
images are complete.

transformers runs with its static cache (the default) and with ``cache_implementation="dynamic"``;
the faster of the two is the yardstick. It cannot run without guidance (scale 1), where our own
plain decoding is the only yardstick.
"""

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from mmspec.adapters.token_image import image_family
from mmspec.bench.image_report import GENERATE, REFILL, failures, speed_sections, summarise
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
from mmspec.checks import require
from mmspec.drafters.jacobi import default_window
from mmspec.pipelines.image import ImageOutput, SpeculativeImagePipeline
from mmspec.pipelines.image_decoders import DECODERS, refills


class Way(NamedTuple):
    """How images are made: a decoder of ours or a name of `GENERATE`, and its window.

    Attributes:
        decoder: The name.
        window: Codes per forward; None is the pipeline's choice.
        is_refilled: Whether rows of complete images are given to those that wait.
    """

    decoder: str
    window: int | None
    is_refilled: bool = False


Systems = dict[str, Way]
#: The same as systems.
GENERATED: Systems = {name: Way(name, 1) for name in GENERATE}
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
    #: Images of one call, where they are more than a batch.
    num_images: int = 0
    #: Calls of this process that chose their own window, by what they share their findings with.
    chosen: Counter[tuple[str, str, float]] = field(default_factory=Counter)

    @property
    def label(self) -> str:
        """In words."""
        what = "" if self.purpose == "image" else f"{self.purpose}, "
        heat = f"T={self.temperature:g}"
        more = f", {self.num_images} images per call" if self.num_images else ""
        return f"{what}{self.dtype} {heat} guidance {self.guidance:g} batch {self.batch}{more}"

    @property
    def key(self) -> str:
        """In a file."""
        where = f"g{self.guidance:g}/b{self.batch}/s{self.seed}"
        where += f"/n{self.num_images}" if self.num_images else ""
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
    images_per_call: Annotated[
        int, typer.Option(help="More images than a batch; 0 is a batch. For speed only.")
    ] = 0,
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
    sizes = [int(size) for size in csv(batch)]
    _check_more(images_per_call, sizes)
    systems = GENERATED | _systems(ours, [_width(width) for width in csv(window)])
    timed_systems = systems | (_refilled(systems) if images_per_call else {})
    pipes = {name: load_image(model, name, device) for name in csv(dtype, list(DTYPES))}
    facts = provenance(torch.device(device), [bundle_of(model)])
    base: dict[str, Any] = {"model": model, "temperature": temperature, "seed": seed}
    base["chosen"] = Counter()

    def configs(
        sizes: Sequence[int], scales: str, purpose: str, num_images: int = 0
    ) -> list[Config]:
        return [
            Config(
                pipe=pipe,
                dtype=name,
                batch=size,
                num_images=num_images,
                guidance=scale,
                purpose=purpose,
                **base,
            )
            for size in sizes
            for scale in map(float, csv(scales))
            for name, pipe in pipes.items()
        ]

    speed = configs(sizes, guidance, "image", images_per_call) if prompts else []
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
        "image": interleaved([_tasks(config, prompts, timed_systems) for config in speed]),
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
            systems[decoder] = Way(decoder, 1)
        else:
            for width in windows:
                name = f"{decoder}_{'auto' if width is None else f'w{width}'}"
                systems[name] = Way(decoder, width)
    return systems


def _refilled(systems: Systems) -> Systems:
    """The systems whose rows can be refilled and end at different times, with that done."""
    return {
        f"{name}{REFILL}": way._replace(is_refilled=True)
        for name, way in systems.items()
        if way.decoder in DECODERS and refills(way.decoder) and way.window != 1
    }


def _check_more(images_per_call: int, sizes: Sequence[int]) -> None:
    """Refuses calls of fewer images than a batch.

    Raises:
        ValueError: With the number.
    """
    is_good = images_per_call == 0 or images_per_call > max(sizes)
    rule = f"0 or more than a batch, {max(sizes)}"
    require(is_good, "--images-per-call", rule, images_per_call)


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
    size = config.num_images or config.batch
    # A call that is smaller than the others would blur the times, not the quality.
    count = len(entries) if is_scored else len(entries) - len(entries) % size
    return [_task(config, i, entries[i : i + size], systems) for i in range(0, count, size)]


def _unfilled(configs: Sequence[Config], limit: int) -> list[str]:
    """Captions that no task takes because they do not fill a batch."""
    count = len(load_captions(limit, configs[0].model)) if configs else 0
    left = [(config, count % (config.num_images or config.batch)) for config in configs]
    return [f"{c.label}: {more} captions that do not fill a batch" for c, more in left if more]


def _task(
    config: Config,
    first: int,
    entries: Sequence[Mapping[str, Any]],
    systems: Systems,
) -> Task:
    captions = [entry["caption"] for entry in entries]
    measure = _memory if config.purpose == "memory" else _measure

    def system(way: Way) -> System:
        return lambda repeat: measure(config, way, captions, repeat)

    def finish(samples: Mapping[str, Sample]) -> None:
        judge = judge_of(config.model)
        if config.purpose == "quality" and judge is not None:
            stated = [entry["attributes"] for entry in entries]
            score(judge, config.pipe.model, samples.values(), stated)
        _compare(samples, is_greedy=config.temperature == 0)

    return Task(
        key=f"{config.key}/{first:04d}",
        label=config.label,
        systems={name: system(way) for name, way in systems.items()},
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
    _ours(config, Way("exact", 16), captions[: config.batch], 0)
    if config.guidance > 1 and "generate" in systems:
        _generate(config, captions[:1], 0, {})


def _measure(config: Config, way: Way, captions: Sequence[str], repeat: int) -> Sample:
    call, figures = _call(config, way, captions, repeat)
    with ForwardMeter(config.pipe.model.model.language_model) as meter:
        answer, time_s = timed(call, config.pipe.device)
    tokens, counts = figures(answer, meter.num_full)
    return {
        "tokens": tokens,
        "window": way.window,
        "num_images": len(captions),
        "num_units": tokens.numel(),
        "time_s": time_s,
        "num_forwards": meter.num_full,
        **counts,
    }


def _memory(config: Config, way: Way, captions: Sequence[str], repeat: int) -> Sample:
    call, figures = _call(config, way, captions, repeat)
    answer, sizes = measured_memory(config.pipe.model.model.language_model, call)
    tokens, counts = figures(answer, 0)
    return {
        "tokens": tokens,
        "window": way.window,
        "num_images": len(captions),
        "guarantee": counts["guarantee"],
        **sizes,
    }


def _call(
    config: Config, way: Way, captions: Sequence[str], repeat: int
) -> tuple[Callable[[], Any], Callable[[Any, int], tuple[Tensor, Sample]]]:
    """What makes the images, and what turns its answer and the forwards into tokens and figures."""
    seed = config.seed + repeat
    if way.decoder in GENERATE:
        if not config.guidance > 1:
            raise Unavailable("transformers' Janus needs a guidance scale above 1")
        return (
            lambda: [
                _generate(config, part, seed + number, GENERATE[way.decoder])
                for number, part in enumerate(_batches(captions, config.batch))
            ],
            lambda tokens, num_forwards: (
                torch.cat(tokens),
                _plain_figures(num_forwards, len(captions), len(tokens)),
            ),
        )
    cell = (way.decoder, config.dtype, config.guidance)
    num_before = config.chosen[cell]
    config.chosen[cell] += way.window is None
    return (
        lambda: _ours(config, way, captions, seed),
        lambda outs, _: (
            torch.cat([out.tokens for out in outs]),
            _our_figures(outs) | {"num_calls_before": num_before},
        ),
    )


def _batches(items: Sequence[Any], size: int) -> list[Any]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def _ours(config: Config, way: Way, captions: Sequence[str], seed: int) -> list[ImageOutput]:
    try:
        return _images(config, way, captions, seed)
    except ValueError as error:
        if way.decoder in ("sequential", "exact"):
            raise
        raise Unavailable(str(error)) from error


def _images(config: Config, way: Way, captions: Sequence[str], seed: int) -> list[ImageOutput]:
    size = len(captions) if way.is_refilled else config.batch
    generators = seeded(seed, len(captions))
    return [
        config.pipe(
            list(part),
            guidance_scale=config.guidance,
            batch_size=config.batch,
            generator=own,
            decoder=way.decoder,
            window=way.window,
            temperature=config.temperature,
            output_type="tokens",
        )
        for part, own in zip(_batches(captions, size), _batches(generators, size), strict=True)
    ]


def _our_figures(outs: Sequence[ImageOutput]) -> Sample:
    phases = ("prefill_time_s", "draft_time_s", "verify_time_s", "other_time_s")
    return {
        "guarantee": str(outs[0].stats.guarantee),
        "num_steps": sum(out.stats.num_target_forwards for out in outs),
        "num_drafted": sum(out.stats.num_drafted for out in outs),
        # Rows of an image batch end at different steps, so tau counts each row's own.
        "num_row_steps": sum(row.num_target_forwards for out in outs for row in out.row_stats),
        **{name: sum(getattr(out.stats, name) for out in outs) for name in phases},
    }


def _plain_figures(num_steps: int, num_images: int, num_batches: int) -> Sample:
    return {
        "guarantee": "yardstick",
        "num_steps": num_steps,
        "num_row_steps": num_steps * num_images // num_batches,
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
