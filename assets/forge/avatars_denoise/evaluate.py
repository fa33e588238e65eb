"""Counts the forwards of `jacobi-denoise` beside those of `exact`, and judges the pictures.

    python -m mmspec.assets.forge.avatars_denoise.evaluate --model bundled:avatars-denoise \
        --windows 16,32,64 --steps 1,2,4 --out build/avatars_denoise/forwards.jsonl

Forwards are those of single images: the rows of a batch do not move one another. Every run's
tokens are compared with plain decoding's.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmspec.assets.avatars.scoring import attribute_accuracy
from mmspec.assets.forge.avatars.captions import BUNDLE, SETS
from mmspec.denoiser import NoiseSchedule
from mmspec.pipelines.image import ImageOutput, SpeculativeImagePipeline


def numbers(text: str) -> list[float]:
    """Splits a list of numbers."""
    return [float(part) for part in text.split(",") if part]


def runs(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], NoiseSchedule | None]]:
    """The options of every call, and its schedule."""
    for window in map(int, numbers(args.windows)):
        if args.exact:
            yield {"decoder": "exact", "window": window}, None
        for steps in map(int, numbers(args.steps)):
            for clean in map(int, numbers(args.clean)):
                for sigma in numbers(args.sigma_max):
                    schedule = NoiseSchedule(
                        num_steps=steps,
                        num_clean=clean,
                        sigma_max=sigma,
                        sigma_min=min(sigma, args.sigma_min),
                    )
                    yield {"decoder": "jacobi-denoise", "window": window}, schedule


class Bench:
    """One model and its captions; every run is written as one line."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pipe = SpeculativeImagePipeline.from_pretrained(args.model, dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        with (BUNDLE / f"{args.captions}.jsonl").open() as lines:
            self.rows = [json.loads(line) for line in lines][: args.num_captions]

    def run(self, guidance: float, **options: Any) -> ImageOutput:
        """Makes one image per caption, caption i with seed i."""
        seeds = [torch.Generator().manual_seed(seed) for seed in range(len(self.rows))]
        captions = [row["caption"] for row in self.rows]
        return self.pipe(captions, guidance_scale=guidance, generator=seeds, **options)

    def write(self, guidance: float, out: ImageOutput, **facts: Any) -> None:
        """Appends a line, and shows it."""
        forwards = [stats.num_target_forwards for stats in out.row_stats]
        line = {
            "model": self.args.model,
            "captions": self.args.captions,
            "num_captions": len(self.rows),
            "guidance": guidance,
            **facts,
            "forwards": round(float(np.mean(forwards)), 2),
        }
        print(json.dumps(line), flush=True)
        with self.args.out.open("a") as file:
            file.write(json.dumps(line | {"forwards_by_image": forwards}) + "\n")

    def compare(self, guidance: float) -> None:
        """Plain decoding, and everything that must give its tokens."""
        plain = self.run(guidance, decoder="sequential", output_type="np")
        stated = [row["attributes"] for row in self.rows]
        found = attribute_accuracy(plain.images, stated)
        self.write(guidance, plain, decoder="sequential", accuracy=found)
        for options, schedule in runs(self.args):
            facts: dict[str, Any] = dict(options)
            if schedule is not None:
                self.pipe.denoiser.schedule = schedule
                facts["schedule"] = asdict(schedule)
            out = self.run(guidance, output_type="tokens", **options)
            facts["is_sequential"] = torch.equal(out.tokens, plain.tokens)
            self.write(guidance, out, **facts)


def main() -> None:
    """Writes one line per configuration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--windows", default="", help="none is plain decoding alone")
    parser.add_argument("--guidance", default="3")
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", default="", help="schedules of jacobi-denoise: num_steps")
    parser.add_argument("--clean", default="0", help="num_clean")
    parser.add_argument("--sigma-max", default="80")
    parser.add_argument("--sigma-min", type=float, default=1.0)
    parser.add_argument("--num-captions", type=int, default=16)
    parser.add_argument("--captions", choices=list(SETS), default="heldout")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    bench = Bench(args)
    for guidance in numbers(args.guidance):
        bench.compare(guidance)


if __name__ == "__main__":
    main()
