"""What `mmspec demo` runs: every modality plainly and speculatively, compared token by token."""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmspec.assets import bundled_path
from mmspec.jobs import generators, read_items
from mmspec.jobs.text import as_request
from mmspec.page import DemoReport, ImageSample, Run, Section, TextSample, render
from mmspec.pipelines.image import SpeculativeImagePipeline
from mmspec.pipelines.text import SpeculativeTextPipeline

Note = Callable[[str], None]

IMAGE_PROMPTS = (
    "a pixel avatar with red hair, glasses and a blue top",
    "a pixel portrait of a person with a green hat, tan skin and a smile",
    "an avatar with blonde hair, sunglasses and a black top on a yellow background",
    "a pixel avatar with a beard, brown hair and a checkered red shirt",
    "a portrait with pink hair, dark skin and a purple top on a blue background",
    "a pixel avatar with a white hat, glasses and a green top",
    "an avatar with black hair, light skin, a smile and an orange top",
    "a pixel portrait of a person with blue hair, a beard and a frown",
)
#: One of each kind; the easiest and the hardest to draft come first, so that what is left out on a
#: slow machine does not flatter the mean.
TEXT_PROMPTS = (("edit", 0), ("chat", 0), ("structured", 0), ("code", 0))
#: Samples that would begin later than this are left out: the demo ends within three minutes even
#: on a busy machine.
IMAGE_DEADLINE_S, TEXT_DEADLINE_S = 45.0, 100.0


class _Steps:
    """Collects what each step of a single-row call drafted, kept and committed."""

    def __init__(self) -> None:
        self.accepted: list[int] = []
        self.levels: list[int] = []
        self.emitted: list[int] = []

    def __call__(self, pipe: Any, index: int, details: dict[str, Any]) -> None:
        record = details["record"]
        self.accepted.append(record.num_accepted[0])
        self.levels.append(record.num_levels[0])
        self.emitted.append(record.num_emitted[0])

    def run(self, stats: Any) -> Run:
        return Run(stats=stats, accepted=self.accepted, levels=self.levels)


def run_demo(
    out: Path,
    *,
    quick: bool,
    seed: int,
    text_model: str,
    image_model: str,
    note: Note,
) -> DemoReport:
    """Runs all parts and writes ``index.html`` and ``report.json`` into a folder.

    Args:
        out: The folder.
        quick: Fewer and shorter samples.
        seed: Image k uses ``seed + k``.
        text_model: Language model; left out with the reason if its package is missing.
        image_model: Image model.
        note: Told what is going on, a line at a time.

    Returns:
        What was measured.
    """
    started = time.perf_counter()
    images = _images(image_model, quick, seed, started + IMAGE_DEADLINE_S, note)
    texts = _texts(text_model, quick, started + TEXT_DEADLINE_S, note)
    report = DemoReport(
        sections=(images, texts),
        command=f"mmspec demo{' --quick' if quick else ''} --seed {seed}",
        facts=_facts() | {"Demo": f"{time.perf_counter() - started:.0f} s in all"},
        path=str(out / "index.html"),
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.html").write_text(render(report), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    return report


def _images(model: str, quick: bool, seed: int, deadline: float, note: Note) -> Section:
    note(f"images: {model}")
    prompts = IMAGE_PROMPTS[: 2 if quick else None]
    pipe = SpeculativeImagePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    for decoder in ("sequential", "exact"):  # the first forwards of a process are slow
        pipe(prompts[0], decoder=decoder, callback_on_step_end=lambda _pipe, index, _: index >= 3)
    samples: list[ImageSample] = []
    for k, prompt in enumerate(prompts):
        if _is_late(deadline, samples, note):
            break
        samples.append(_image_sample(pipe, prompt, seed + k))
        note(f"  {k + 1}/{len(prompts)} {prompt}")
    return Section(
        name="Images",
        unit="codes",
        model=model,
        setting="guidance 3, temperature 1, float32, one image at a time",
        plain_name="sequential",
        fast_name="exact",
        samples=samples,
        num_left_out=len(prompts) - len(samples),
    )


def _image_sample(pipe: SpeculativeImagePipeline, prompt: str, seed: int) -> ImageSample:
    results, runs = [], []
    for decoder in ("sequential", "exact"):
        steps = _Steps()
        result = pipe(
            prompt, decoder=decoder, generator=generators([seed]), callback_on_step_end=steps
        )
        results.append(result)
        runs.append(steps.run(result.stats))
    return ImageSample(
        prompt=prompt,
        seed=seed,
        plain_image=results[0].images[0],
        fast_image=results[1].images[0],
        steps=results[1].step_maps[0].tolist(),
        plain=runs[0],
        fast=runs[1],
        is_same=torch.equal(results[0].tokens, results[1].tokens),
    )


def _is_late(deadline: float, samples: Sequence[Any], note: Note) -> bool:
    """Time is up and there is something to show."""
    if not samples or time.perf_counter() < deadline:
        return False
    note("  the rest is left out: this machine is slow or busy")
    return True


def _texts(model: str, quick: bool, deadline: float, note: Note) -> Section:
    section: dict[str, Any] = {
        "name": "Text",
        "unit": "tokens",
        "model": "SmolLM2-135M-Instruct (Q4_1, dequantized)" if model == "smollm2" else model,
        "setting": "greedy, float32, drafts copied from the prompt and the answer so far (ngram)",
        "plain_name": "sequential",
        "fast_name": "ngram",
    }
    note(f"text: {model} (converted on first use, half a minute)")
    try:
        pipe = SpeculativeTextPipeline.from_pretrained(model, dtype=torch.float32)
    except ImportError as error:
        reason = "; ".join(map(str.strip, str(error).splitlines())).replace(":; ", ": ")
        note(f"  skipped: {reason}")
        return Section(**section, skipped=reason)
    pipe.set_progress_bar_config(disable=True)
    pipe("Warm up, warm up, warm", max_new_tokens=8)
    samples: list[TextSample] = []
    budget = 48 if quick else 112
    prompts = TEXT_PROMPTS[: 2 if quick else None]
    for kind, index in prompts:
        if _is_late(deadline, samples, note):
            break
        item = read_items(bundled_path("prompts") / f"{kind}.jsonl")[index]
        samples.append(_text_sample(pipe, kind, item.prompt, budget))
        note(f"  {kind}: tau {samples[-1].fast.stats.tau:.2f}")
    return Section(**section, samples=samples, num_left_out=len(prompts) - len(samples))


def _text_sample(pipe: Any, kind: str, prompt: str, max_new_tokens: int) -> TextSample:
    request = as_request(pipe, prompt, raw=False)
    steps = {"sequential": _Steps(), "exact": _Steps()}
    outputs = {
        decoder: pipe(
            request,
            max_new_tokens=max_new_tokens,
            drafter="ngram",
            decoder=decoder,
            callback_on_step_end=collected,
        )
        for decoder, collected in steps.items()
    }
    plain, fast = outputs["sequential"], outputs["exact"]
    owners = [i for i, count in enumerate(steps["exact"].emitted) for _ in range(count)]
    return TextSample(
        kind=kind,
        prompt=prompt,
        pieces=token_pieces(pipe.tokenizer, fast.tokens[0].tolist(), owners),
        plain=steps["sequential"].run(plain.stats),
        fast=steps["exact"].run(fast.stats),
        is_same=torch.equal(plain.tokens[0], fast.tokens[0]),
    )


def token_pieces(
    tokenizer: Any, tokens: Sequence[int], steps: Sequence[int]
) -> list[tuple[str, int]]:
    """The text that each token adds, with the token's step.

    A character that takes several tokens is shown with the last of them.

    Args:
        tokenizer: The tokenizer.
        tokens: The answer.
        steps: Step of each token.
    """
    pieces = []
    shown = 0
    for index, step in enumerate(steps):
        text = tokenizer.decode(tokens[: index + 1], skip_special_tokens=True)
        is_whole = not text.endswith("\ufffd")
        pieces.append((text[shown:] if is_whole else "", step))
        shown = len(text) if is_whole else shown
    return pieces


def _facts() -> dict[str, str]:
    packages = ("mmspec", "torch", "transformers")
    return {
        "Versions": ", ".join(f"{name} {version(name)}" for name in packages)
        + f", Python {platform.python_version()}",
        "Hardware": f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores used",
        "Date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _processor() -> str:
    """Name of the processor, or of its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
