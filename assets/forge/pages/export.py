"""Writes a trained reader or drafter to `assets/` in transformers' own format, with its pages.

    python -m mmspec.assets.forge.pages.export --work-dir build/pages --size pages

The reader's folder also gets the held-out pages (Markdown, to be drawn with
`mmspec.assets.pages.rendering`) and a few of them as pictures. May be run during the training.
"""

import argparse
import json
import shutil
from pathlib import Path
from random import Random

import torch
from transformers import Idefics3ForConditionalGeneration, PreTrainedTokenizerFast

from mmspec.assets.pages.rendering import check_page, render_page

from .compose import compose, load_blocks
from .model import SIZES, Size, make_model, make_processor, make_tokenizer

ASSETS = Path(__file__).resolve().parents[2]
NUM_HELD_OUT = 200
#: Kinds of the sample pages.
CLEAN = ("docs", "docs", "docs", "wordnet", "wordnet", "table", "table", "random")
NOISY_ONES = ("docs", "wordnet", "table", "random")
#: What "noisy" means in the figures and the samples: within what training has seen.
NOISY = {"blur": 0.6, "noise": 15.0}


def save_model(
    model: Idefics3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    size: Size,
    out: Path,
) -> None:
    """Writes weights in bfloat16, processor, tokenizer and generation defaults."""
    out.mkdir(parents=True, exist_ok=True)
    model.eval().to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    make_processor(tokenizer, size).save_pretrained(out)


def held_out_pages(work_dir: Path) -> list[dict[str, str]]:
    """Pages of text that neither training nor any decision has seen, all different."""
    blocks, rng = load_blocks(work_dir, "heldout"), Random(0)
    pages: dict[str, str] = {}
    while len(pages) < NUM_HELD_OUT:
        markdown, kind = compose(blocks, rng)
        check_page(markdown)
        pages[markdown] = kind
    return [{"kind": kind, "markdown": markdown} for markdown, kind in pages.items()]


def write_pages(work_dir: Path, out: Path) -> None:
    """Writes `held_out.jsonl`, and `samples/` with what is on each picture."""
    pages = held_out_pages(work_dir)
    (out / "held_out.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    folder = out / "samples"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    left = list(enumerate(pages))
    rows = []
    for name, kinds, how in (
        ("clean", CLEAN, {"blur": 0.0, "noise": 0.0}),
        ("noisy", NOISY_ONES, NOISY),
    ):
        for kind in kinds:
            index, page = next(one for one in left if one[1]["kind"] == kind)
            left.remove((index, page))
            file = f"{name}-{len(rows):02}.png"
            image = render_page(page["markdown"], seed=index, **how)
            image.convert("L").save(folder / file, optimize=True)
            rows.append({"file": file, "seed": index, **how, **page})
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Writes one bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--size", choices=sorted(SIZES), default="pages")
    parser.add_argument("--out", type=Path, help="folder; default: assets/SIZE")
    args = parser.parse_args()
    out, size, tokenizer = args.out or ASSETS / args.size, SIZES[args.size], make_tokenizer()
    state = torch.load(args.work_dir / f"{args.size}.pt", weights_only=True)
    weights = {k: v for k, v in state["model"].items() if not k.startswith("naming.")}
    model = make_model(size, len(tokenizer))
    model.load_state_dict(weights)
    save_model(model, tokenizer, size, out)
    if args.size == "pages":
        write_pages(args.work_dir, out)
    shutil.copyfile(args.work_dir / f"{args.size}.jsonl", out / "training_log.jsonl")


if __name__ == "__main__":
    main()
