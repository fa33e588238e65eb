"""Tokens per forward of document drafts, replayed: the target is assumed to write the truth.

Pages of prose and tables are rendered, read by a real OCR engine and drafted from by the real
drafters; an oracle accepts what agrees with the page's Markdown. No model runs, so the figures are
bounds of what a good reader gives, and the same on every machine.

    python benchmarks/replay_references.py [--pages 8] [--engine tesserocr]
"""

import argparse
import pydoc_data.topics
import random
import re
import textwrap
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mmspec.adapters.smollm2 import load_smollm2
from mmspec.drafters.reference import ReferenceDrafter
from mmspec.drafters.trie import NgramTrie
from mmspec.ocr import open_engine
from mmspec.records import Outcome, Plan
from mmspec.rows import TokenRows
from mmspec.tree import BUCKETS

FONT = "/usr/share/fonts/truetype/dejavu/DejaVuSerif.ttf"
PAPER = (1275, 1650)


@dataclass(frozen=True)
class Page:
    """What is drawn, line by line, and what a reader should write.

    A line is a list of (column in pixels, text).
    """

    lines: list[list[tuple[int, str]]]
    markdown: str

    def drawn(self, size: int = 26) -> Image.Image:
        """The page in black on white."""
        image = Image.new("L", PAPER, 255)
        draw = ImageDraw.Draw(image)
        for number, line in enumerate(self.lines):
            for left, text in line:
                font = ImageFont.truetype(FONT, size)
                draw.text((75 + left, 75 + number * int(1.4 * size)), text, fill=0, font=font)
        return image


def prose_page(index: int) -> Page:
    """A title and paragraphs of Python's manual."""
    topics = sorted(pydoc_data.topics.topics.items(), key=lambda item: -len(item[1]))
    title, topic = topics[index]
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", topic)]
    paragraphs = [p for p in paragraphs if len(p) > 150 and "::=" not in p][:9]
    lines, written = (
        [[(0, f"{index + 1}. {title.title()}")], []],
        [f"# {index + 1}. {title.title()}"],
    )
    for paragraph in paragraphs:
        wrapped = textwrap.wrap(paragraph, 78)
        if len(lines) + len(wrapped) > 38:
            break
        lines += [[(0, line)] for line in wrapped] + [[]]
        written.append(paragraph)
    return Page(lines, "\n\n".join(written))


def table_page(index: int) -> Page:
    """A title and one table of names and numbers, whose columns recur from page to page."""
    draw = random.Random(index)
    columns = ["Article", "Region", "Units", "Price", "Total", "State"]
    regions = ["North", "South", "East", "West", "Central"]
    states = ["shipped", "in stock", "ordered", "returned"]
    items = ["Bolt M6", "Bolt M8", "Washer", "Hex nut", "Bracket", "Hinge", "Screw set", "Spring"]
    rows = []
    for _ in range(22):
        units, price = draw.randint(1, 400), draw.randint(5, 9000) / 100
        rows.append(
            [
                draw.choice(items),
                draw.choice(regions),
                str(units),
                f"{price:.2f}",
                f"{units * price:.2f}",
                draw.choice(states),
            ]
        )
    title = f"Delivery note {1000 + 7 * index}"
    cells = [columns, *rows]
    lines = [[(0, title)], []] + [
        [(190 * column, cell) for column, cell in enumerate(row)] for row in cells
    ]
    written = [" | ".join(row) for row in cells]
    written.insert(1, " | ".join(["---"] * len(columns)))
    return Page(lines, f"# {title}\n\n" + "\n".join(f"| {row} |" for row in written))


def noisy(image: Image.Image, blur: float, noise: float, seed: int = 0) -> Image.Image:
    """A bad scan."""
    if not blur:
        return image
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), dtype=float)
    pixels = pixels + np.random.default_rng(seed).normal(0, noise, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


@dataclass
class Tally:
    """What a replay counts."""

    num_tokens: int = 0
    num_forwards: int = 0
    num_nodes: int = 0

    @property
    def tau(self) -> float:
        """Tokens per forward."""
        return self.num_tokens / max(self.num_forwards, 1)


def replay(
    drafter: ReferenceDrafter,
    rows: TokenRows,
    truth: list[int],
    width: int,
    price: float,
    tally: Tally,
) -> None:
    """Decodes one row whose target writes the truth."""
    prices = {w: price * (w - 1) for w in (*BUCKETS, width)}
    drafter.prefill()
    made = 0
    while made < len(truth):
        plan = Plan(width=width if made else 1, prices=prices)
        proposal = drafter.propose(plan)
        tokens, parents = proposal.tokens_BN[0].tolist(), proposal.parents_BN[0].tolist()
        valid = proposal.valid_BN[0].tolist()
        node, new = 0, []
        while made + len(new) < len(truth):
            wanted = truth[made + len(new)]
            new.append(wanted)
            node = next(
                (
                    n
                    for n in range(1, len(tokens))
                    if parents[n] == node and tokens[n] == wanted and valid[n]
                ),
                None,
            )
            if node is None:
                break
        rows.host_tokens[0] += new
        made += len(new)
        rows.host_done[0] = made == len(truth)
        outcome = Outcome(
            new_units=(new,),
            num_accepted=(len(new) - 1,),
            done=(rows.host_done[0],),
            was_active=(True,),
        )
        drafter.commit(proposal, None, None, outcome)
        tally.num_tokens += len(new)
        tally.num_forwards += 1
        tally.num_nodes += len(tokens)


#: Blur and noise; "other" is a clean scan of another page, as lying as a reference can be.
SCANS = {
    "clean": (0.0, 0.0),
    "moderate": (1.2, 25.0),
    "bad": (1.8, 40.0),
    "other": (0.0, 0.0),
}


def main() -> None:
    """Prints a line for each kind of page, scan and width."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pages", type=int, default=8)
    parser.add_argument("--engine", default="tesserocr")
    parser.add_argument("--widths", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--price", type=float, default=0.0)
    args = parser.parse_args()
    engine = open_engine(args.engine)
    _, tokenizer = load_smollm2()
    end = tokenizer.eos_token_id
    prompt = tokenizer.encode(
        "<|im_start|>user\nConvert this page.<|im_end|>\n<|im_start|>assistant\n"
    )
    for kind, make in (("prose", prose_page), ("table", table_page)):
        pages = [make(index) for index in range(args.pages)]
        truths = [[*tokenizer.encode(page.markdown), end] for page in pages]
        drawn = [page.drawn() for page in pages]
        for scan, (blur, noise) in {"none": (0, 0), **SCANS}.items():
            texts = [None] * len(pages)
            if scan != "none":
                texts = [engine(noisy(image, blur, noise)) for image in drawn]
            if scan == "other":
                texts = texts[1:] + texts[:1]
            for width in args.widths:
                tally, store, sources = Tally(), NgramTrie(max_draft=128), Counter()
                for text, truth in zip(texts, truths, strict=True):
                    rows = TokenRows(
                        [prompt],
                        max_new_tokens=[9999],
                        keys_B=torch.zeros(1).long(),
                        eos_token_ids=[end],
                    )
                    drafter = ReferenceDrafter(
                        rows,
                        len(tokenizer),
                        references=[text],
                        tokenizer=tokenizer,
                        memory=store,
                        sources=[sources],
                    )
                    replay(drafter, rows, truth, width, args.price, tally)
                    del drafter
                print(
                    f"{kind:6} ocr {scan:9} width {width:3}: {tally.tau:5.2f} tokens per forward, "
                    f"{tally.num_nodes / tally.num_forwards:5.1f} nodes, {dict(sources)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
