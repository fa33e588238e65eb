"""Whether denoising steps can be drafted without changing the law of what is made.

    python benchmarks/denoising_steps.py --out benchmarks/results

The steps of a stochastic sampler are drafted and verified as in `mmspec.bench.step_chain`, over
mixtures of Gaussians whose data can be predicted in closed form, or over an AnyFlow-FAR pipeline
and its drafter. Steps and forwards are counted; no clock is read. "frozen" is a drafter that takes
the data to be what the target predicted last.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FlowMapEulerDiscreteScheduler
from torch import Tensor

from mmspec.adapters.block_video import Context, Prompt
from mmspec.adapters.video_anyflow import FarFamily, FarModel
from mmspec.bench.measure import Budget, Sample, csv, final_line, open_store, provenance
from mmspec.bench.report import Output, percent, publish, table
from mmspec.bench.step_chain import NOISES, Sampler, StepRows, step_engine
from mmspec.noise import row_keys
from mmspec.pipelines import SpeculativeVideoPipeline
from mmspec.records import StepRecord

COUNTS = ("steps", "forwards", "states", "tested", "accepted")
#: Numbers of a block: one latent frame of 8 channels and 8 x 8 places, and AnyFlow-FAR's three of
#: 16 channels at 480 x 832 pixels.
BLOCK_DIMS = (512, 299_520)
#: Between two predictions of the data, whose own deviation is about 1.
GAPS = (0.01, 0.03, 0.1)
#: Of the noise levels of Wan 2.1.
VIDEO_SHIFT = 5.0
PROMPTS = "a red sneaker moving up left slowly;a blue bag moving right quickly"


@dataclass(frozen=True, slots=True)
class Mixture:
    """Gaussians of equal weight, whose data can be predicted in closed form.

    Attributes:
        means_KD: Of the K components.
        std: Of each of them in every direction.
    """

    means_KD: Tensor
    std: float

    def __call__(self, states_BND: Tensor, levels_BN: Tensor) -> Tensor:
        """The mean of the data, given states at noise levels: a `Predict`."""
        level = levels_BN[..., None, None]
        centre = (1 - level) * self.means_KD
        variance = ((1 - level) * self.std).square() + level.square()
        gap = states_BND[..., None, :] - centre
        share = (-gap.square().sum(-1) / (2 * variance[..., 0])).softmax(-1)
        data = self.means_KD + (1 - level) * self.std**2 / variance * gap
        return (share[..., None] * data).sum(-2)


def levels_of(num_steps: int, shift: float) -> Tensor:
    """Of noise, from 1 to 0, spaced as `FlowMapEulerDiscreteScheduler` spaces them."""
    scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas.double()


class FlowMapPredict:
    """AnyFlow-FAR as a `Predict` for the next block of one video.

    For the ancestral sampler the data are what the velocity at the state's time leads to, their
    mean; for the other one, what the flow map leads to in one step.
    """

    def __init__(self, model: FarModel, context: Context, shape: Sequence[int], noise: str) -> None:
        """Keeps what a block is made from; ``shape`` is ``[1, F, C, H, W]``."""
        self._model = model
        self._context = context
        self._shape = shape
        self._noise = noise

    def __call__(self, states_BND: Tensor, levels_BN: Tensor) -> Tensor:
        """One forward of the transformer per state: how many run at once changes no count."""
        flat = zip(states_BND.flatten(0, 1), levels_BN.flatten(), strict=True)
        return torch.stack([self._clean(*one) for one in flat]).view_as(states_BND)

    def _clean(self, state_D: Tensor, level: Tensor) -> Tensor:
        time = level * 1000
        end = time if self._noise == "ancestral" else torch.zeros_like(time)
        state = state_D.float().view(*self._shape)
        return state_D - level * self._model.velocity(self._context, state, time, end).flatten()


def run_toy(
    num_dims: int, num_steps: int, noise: str, drafter: str, window: int, num_rows: int
) -> Sample:
    """Counts of a mixture in D directions; the drafter's has other means by a tenth."""
    means = torch.randn(4, num_dims, generator=seeded(0), dtype=torch.float64)
    other = means + 0.1 * torch.randn(4, num_dims, generator=seeded(1), dtype=torch.float64)
    draft = Mixture(other, 0.5) if drafter == "model" else None
    start = torch.randn(num_rows, num_dims, generator=seeded(2), dtype=torch.float64)
    sampler = Sampler.make(levels_of(num_steps, 1.0), noise)
    rows = StepRows(sampler, start, row_keys(seeded(3), num_rows))
    engine = step_engine(rows, Mixture(means, 0.5), draft, window)
    return counts([step for step, _ in engine.stream()])


@torch.no_grad()
def run_video(
    target: Any,
    draft: Any,
    num_steps: int,
    noise: str,
    window: int,
    side: int,
    prompts: Sequence[str],
    defaults: Mapping[str, Any],
) -> Sample:
    """Counts over all blocks of a video for each prompt.

    Args:
        target: `AnyFlowFARPipeline`.
        draft: Another, or None for the frozen target.
        num_steps: Of a block.
        noise: Of `NOISES`.
        window: Steps drafted at most.
        side: Pixels.
        prompts: Each has a seed of its own.
        defaults: Of a call of the pair: guidance, attention and tokens of a prompt count.
    """
    sizes = target.transformer.config.chunk_partition
    num_frames = (sum(sizes) - 1) * target.vae_scale_factor_temporal + 1
    layout = FarFamily(target).layout(num_frames, side, side, None)
    names = ("guidance_scale", "drafter_guidance_scale")
    models = [
        FarFamily(pipe).model(layout, defaults.get(name, 1.0), defaults.get("attention"))
        for pipe, name in zip((target, draft), names, strict=True)
        if pipe is not None
    ]
    sampler = Sampler.make(levels_of(num_steps, target.scheduler.config.shift), noise)
    steps: list[StepRecord] = []
    for seed, text in enumerate(prompts):
        context = Context(prompt_of(target, text, seed, defaults))
        for size in layout.block_sizes:
            shape = (1, size, layout.channels, layout.height, layout.width)
            predicts = [FlowMapPredict(model, context, shape, noise) for model in models]
            generator = seeded(1000 * seed + len(context.blocks))
            start = torch.randn(1, math.prod(shape), generator=generator, dtype=torch.float64)
            rows = StepRows(sampler, start, row_keys(generator, 1))
            engine = step_engine(rows, predicts[0], predicts[1] if draft else None, window)
            steps += [step for step, _ in engine.stream()]
            block = rows.states_BD.float().view(shape).permute(0, 2, 1, 3, 4)
            context = replace(context, blocks=(*context.blocks, block))
    return counts(steps) | {"dims": math.prod(shape)}


def prompt_of(pipe: Any, text: str, seed: int, defaults: Mapping[str, Any]) -> Prompt:
    """The prompt, or random embeddings where there is no text encoder."""
    if pipe.text_encoder is None:
        embeds = torch.randn(1, 8, pipe.transformer.config.text_dim, generator=seeded(seed))
        return Prompt(text=None, embeds=embeds)
    lengths = {key: defaults[key] for key in ("max_sequence_length",) if key in defaults}
    embeds, negative = pipe.encode_prompt(
        prompt=text, do_classifier_free_guidance=defaults.get("guidance_scale", 1.0) > 1, **lengths
    )
    return Prompt(text=text, embeds=embeds, negative_embeds=negative)


def counts(steps: Sequence[StepRecord]) -> Sample:
    """Sums over rows: steps, forwards, states in them, drafts that were tested and accepted."""
    rows = [
        row
        for step in steps
        for row in zip(
            step.num_emitted, step.num_drafted, step.num_accepted, step.was_active, strict=True
        )
        if row[3]
    ]
    return {
        "steps": sum(emitted for emitted, *_ in rows),
        "forwards": len(rows),
        "states": sum(1 + drafted for _, drafted, *_ in rows),
        # Behind the first draft that is refused none is tested.
        "tested": sum(min(drafted, accepted + 1) for _, drafted, accepted, _ in rows),
        "accepted": sum(accepted for _, _, accepted, _ in rows),
    }


def expected_forwards(sampler: Sampler, num_dims: int, gap: float) -> float:
    """Forwards of a block if both predict data that differ by ``gap`` in every number.

    With no limit to the window each noisy step is tested once, and every refusal costs a forward.
    """
    scale = sampler.clean_weight_S[:-1] / sampler.std_S[:-1]
    shift = scale * gap * math.sqrt(num_dims)
    return float(1 + torch.special.erf(shift / math.sqrt(8)).sum())


def seeded(seed: int) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def main(
    target: Annotated[Path | None, typer.Option(help="An AnyFlow-FAR pipeline.")] = None,
    drafter: Annotated[Path | None, typer.Option(help="A smaller one.")] = None,
    dims: Annotated[str, typer.Option(help="Of the mixtures.")] = "1,2,16,64,256,1024",
    steps: Annotated[str, typer.Option(help="Denoising steps.")] = "4,8,16,32",
    window: Annotated[int, typer.Option(help="Steps drafted at most.")] = 8,
    rows: Annotated[int, typer.Option(help="Samples of a mixture.")] = 64,
    prompts: Annotated[str, typer.Option(help="Of the videos, separated by semicolons.")] = PROMPTS,
    side: Annotated[int, typer.Option(help="Pixels of the videos.")] = 32,
    minutes: Annotated[float | None, typer.Option(help="Stop then; run again to go on.")] = None,
    label: Annotated[str, typer.Option(help="Added to the names of the files.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of samples and report.")] = Path("mmspec-bench"),
) -> None:
    """Measures what is missing and writes the report."""
    budget, output = Budget(minutes), Output(json_only=False)
    facts = provenance(torch.device("cpu"))
    store = open_store(out, "denoising_steps", label, facts)
    names, places = ["frozen", "model"], [("mixture", int(size)) for size in csv(dims)]
    pipe = None
    if target:
        pipe = SpeculativeVideoPipeline.from_pretrained(target, drafter=drafter)
        names, places = names[: 1 + (drafter is not None)], [(target.name, None)]
    found, missing = [], []
    for noise, (model, size), num_steps, name in product(
        NOISES, places, map(int, csv(steps)), names
    ):
        place = {"model": model, "dims": size, "noise": noise, "num_steps": num_steps}
        place |= {"drafter": name, "window": window}
        key = "/".join(map(str, [*place.values(), rows if size else prompts]))
        if key not in store and budget.is_spent:
            missing.append(key)
            continue
        if key not in store:
            if pipe is None:
                figures = run_toy(size, num_steps, noise, name, window, rows)
            else:
                draft, texts = pipe.drafter if name == "model" else None, prompts.split(";")
                figures = run_video(
                    pipe.target, draft, num_steps, noise, window, side, texts, pipe.defaults
                )
            store.add([{"key": key, **place, **figures}])
        sample = store.samples[key]
        found.append({"type": "row"} | {k: sample[k] for k in [*place, *COUNTS]})
        output.say(f"{key}: {sample['steps'] / sample['forwards']:.2f} steps per forward")
    line = final_line(
        "denoising_steps", facts, found, left_out=missing, failures=[], time_s=budget.elapsed_s
    )
    sections = [("Steps per forward", _table(found)), ("What a gap allows", _gap_table())]
    publish(line, sections, out, output)


def _table(rows: Sequence[Sample]) -> str:
    """A line per setting; the verified states per step are the work of the target."""
    headers = ["model", "numbers", "noise", "steps", "drafter", "accepted", "steps/forward"]
    lines = [
        [
            *(row[name] for name in ("model", "dims", "noise", "num_steps", "drafter")),
            percent(row["accepted"] / row["tested"] if row["tested"] else None),
            row["steps"] / row["forwards"],
            row["states"] / row["steps"],
        ]
        for row in rows
    ]
    return table([*headers, "states/step"], lines)


def _gap_table() -> str:
    """Computed: steps per forward where two models differ by so much in every number."""
    columns = [(size, gap) for size in BLOCK_DIMS for gap in GAPS]
    lines = []
    for noise, num_steps in product(NOISES, (4, 8, 16, 32, 1000)):
        sampler = Sampler.make(levels_of(num_steps, VIDEO_SHIFT), noise)
        cells = [num_steps / expected_forwards(sampler, *column) for column in columns]
        lines.append([noise, num_steps, *cells])
    return table(
        ["noise", "steps", *(f"{size} numbers, gap {gap}" for size, gap in columns)], lines
    )


if __name__ == "__main__":
    typer.run(main)
