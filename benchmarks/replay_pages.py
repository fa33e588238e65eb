"""What drafting would cost and bring on pages and captions, counted and not clocked.

The bundled model writes its held-out inputs once, plainly, and the tokens are kept in a file.
Then the real drafters and the real schedule replay them: an oracle accepts what agrees with them, a
table says what a forward of each width takes, and the host's work counts by the seconds of its own
thread.

    python benchmarks/replay_pages.py --model pages --keep /tmp/pages.json
    python benchmarks/replay_pages.py --model captioner --keep /tmp/captions.json
"""

import argparse
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from mmspec.assets import bundled_path
from mmspec.bench.document import garbled
from mmspec.bench.vlm import new_store
from mmspec.bench.vlm_setups import load_captions, load_pages, load_vlm, run_vlm
from mmspec.drafters.ngram import NgramDrafter
from mmspec.drafters.reference import ReferenceDrafter
from mmspec.ledger import Ledger
from mmspec.ocr import installed_engines, open_engine
from mmspec.records import Guarantee, Outcome, Proposal, Scores
from mmspec.retrieval_schedule import RetrievalSchedule
from mmspec.rows import TokenRows
from mmspec.speculation import DEFAULT_WIDTHS, Settings

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
#: Milliseconds of a forward, as the cards in `benchmarks/results/` have them, by model, dtype and
#: rows. "steep" is bfloat16 and "clock" float32 as the steps themselves took it.
FORWARDS = {
    ("pages", "float32", 1): (2.47, 2.7, 3.0, 3.17, 3.56, 4.18, 5.52),
    ("pages", "bfloat16", 1): (7.37, 7.62, 7.56, 7.74, 8.02, 8.71, 9.72),
    ("pages", "steep", 1): (5.0, 7.0, 7.2, 7.5, 8.0, 9.5, 11.0),
    ("pages", "clock", 1): (2.2, 2.9, 3.0, 3.3, 4.1, 4.9, 6.7),
    ("pages", "float32", 8): (6.85, 7.15, 7.50, 9.13, 11.82, 21.0, 31.76),
    ("pages", "bfloat16", 8): (8.26, 9.5, 10.0, 10.79, 15.0, 20.16, 25.15),
    ("captioner", "float32", 8): (2.13, 2.29, 2.43, 2.67, 3.16, 4.07, 5.73),
    ("captioner", "bfloat16", 8): (3.18, 3.32, 3.33, 3.57, 4.03, 4.80, 5.96),
}
#: Milliseconds of a step besides forward and drafter, without drafts and with them: packing, the
#: mask, the walk, moving keys.
OTHER = {1: (0.4, 1.0), 8: (0.5, 1.5)}
#: Seconds of the OCR for a page.
OCR_S = 0.22
#: What a plain forward behind a drafted one takes of a plain one in a run of them.
LONE = 1.25
#: Relative spread of a forward's time; one in a hundred takes three times as long.
NOISE = 0.05
SYSTEMS = {
    "pages": ("ngram", "ngram_store", "reference", "reference_store", "text_layer"),
    "captioner": ("ngram", "ngram_store"),
}
KINDS = {"clean": 16, "noisy": 8, "tables": 16}


def written(model: str, keep: Path) -> list[dict[str, Any]]:
    """The inputs: prompt, output and texts of each; from the file if it is there."""
    if keep.exists():
        return list(json.loads(keep.read_text()))
    loaded, found = load_vlm(model, "float32"), []
    if model == "pages":
        reader = open_engine(installed_engines()[0])
        entries = [one for kind in KINDS for one in load_pages(model, [kind], KINDS[kind])]
    else:
        entries = load_captions(model)
    for first in range(0, len(entries), 8):
        batch = entries[first : first + 8]
        inputs = loaded.encode(batch)
        outputs, _ = run_vlm(
            loaded,
            inputs,
            settings=Settings(drafter="none"),
            max_new_tokens=batch[0]["max_new_tokens"],
            temperature=0.0,
            seed=0,
        )
        is_token = inputs["attention_mask"].bool()
        for row, (entry, tokens) in enumerate(zip(batch, outputs, strict=True)):
            prompt = inputs["input_ids"][row][is_token[row]].tolist()
            texts = {}
            if "text" in entry:
                texts = {"text": entry["text"], "ocr": reader(entry["image"]).text}
            found.append({"kind": entry["kind"], "prompt": prompt, "tokens": tokens, **texts})
    keep.write_text(json.dumps(found))
    return found


@dataclass
class Tally:
    """What a replay counts; seconds are estimates."""

    num_tokens: int = 0
    num_row_steps: int = 0
    num_forwards: int = 0
    num_nodes: int = 0
    seconds: float = 0.0
    host_s: float = 0.0
    plain_s: float = 0.0
    widths: Counter[int] = field(default_factory=Counter)

    def line(self, ocr_s: float) -> str:
        """The figures; speeds are those over plain decoding, with and without the OCR's seconds."""
        return (
            f"tau {self.num_tokens / self.num_row_steps:5.2f} forwards {self.num_forwards:5} "
            f"nodes {self.num_nodes:6} host {1e3 * self.host_s / self.num_forwards:5.2f} ms "
            f"speed {self.plain_s / self.seconds:5.2f} "
            f"with OCR {self.plain_s / (self.seconds + ocr_s):5.2f} "
            f"widths {dict(sorted(self.widths.items()))}"
        )


class Clock:
    """What steps take by the table."""

    def __init__(self, model: str, dtype: str, num_rows: int) -> None:
        self._tables = {
            rows: dict(zip(WIDTHS, FORWARDS[model, dtype, rows], strict=True))
            for rows in {num_rows, 1}
            if (model, dtype, rows) in FORWARDS
        }
        self._dice = random.Random(0)

    def forward_s(self, num_rows: int, width: int) -> float:
        """Seconds of a forward; rows between those of two tables lie on a line."""
        fewest, most = min(self._tables), max(self._tables)
        low, high = self._tables[fewest][width], self._tables[most][width]
        share = (num_rows - fewest) / max(most - fewest, 1)
        return (low + max(share, 0.0) * (high - low)) / 1e3

    def noise(self) -> float:
        """Spread of one step."""
        return 1 + NOISE * self._dice.random() + 2 * (self._dice.random() < 0.01)


def replay(
    drafter: Any,
    rows: TokenRows,
    truths: Sequence[list[int]],
    schedule: Any,
    clock: Clock,
    tally: Tally,
) -> None:
    """Decodes a batch whose target writes the truths."""
    drafter.prefill()
    ledger = Ledger(drafter=drafter.name, guarantee=Guarantee.EXACT)
    other, last_width = OTHER[min(rows.num_rows, 8)], 1
    while not rows.is_done:
        active = [not done for done in rows.host_done]
        plan = schedule.plan()
        began = time.thread_time()
        proposal = drafter.propose(plan)
        proposed = time.thread_time()
        new = [
            _agreed(proposal, r, truth[len(rows.new_tokens(r)) :]) if on else []
            for r, (truth, on) in enumerate(zip(truths, active, strict=True))
        ]
        for r, tokens in enumerate(new):
            rows.host_tokens[r] += tokens
            rows.host_done[r] = len(rows.new_tokens(r)) == len(truths[r])
        outcome = Outcome(
            new_units=tuple(new),
            num_accepted=tuple(max(len(tokens) - 1, 0) for tokens in new),
            done=tuple(rows.host_done),
            was_active=tuple(active),
        )
        learning = time.thread_time()
        drafter.commit(proposal, None, None, outcome)
        host_s = proposed - began, time.thread_time() - learning
        is_first = not ledger.steps
        noise = clock.noise()
        forward_s = 0.0 if is_first else clock.forward_s(sum(active), proposal.width) * noise
        if proposal.width == 1 < last_width:
            forward_s *= LONE
        last_width = proposal.width
        scores = Scores(
            logits_BNV=proposal.tokens_BN, positions_BN=proposal.tokens_BN, forward_time_s=forward_s
        )
        step_s = sum(host_s) + forward_s + other[proposal.width > 1] / 1e3
        schedule.observe(ledger.record(proposal, scores, outcome, host_s[0], step_s))
        tally.num_tokens += sum(map(len, new))
        tally.num_row_steps += sum(active)
        tally.num_forwards += 1
        tally.num_nodes += sum(active) * proposal.width
        tally.seconds += step_s
        tally.host_s += sum(host_s)
        tally.widths[proposal.width] += 1
    lengths = sorted(map(len, truths))
    for r, length in enumerate(lengths):
        steps = length - (lengths[r - 1] if r else 0)
        tally.plain_s += steps * (clock.forward_s(rows.num_rows - r, 1) * 1.045 + other[0] / 1e3)


def _agreed(proposal: Proposal, row: int, truth: list[int]) -> list[int]:
    """What a target that writes the truth emits."""
    tokens, parents = proposal.tokens_BN[row].tolist(), proposal.parents_BN[row].tolist()
    valid = proposal.valid_BN[row].tolist()
    children = {}
    for n in range(len(tokens) - 1, 0, -1):
        if valid[n]:
            children[parents[n], tokens[n]] = n
    node, new = 0, []
    for token in truth:
        new.append(token)
        node = children.get((node, token))
        if node is None:
            break
    return new


def drafter_of(system: str, rows: TokenRows, batch: Sequence[dict[str, Any]], memory: Any) -> Any:
    """The drafter of a system for a batch."""
    folder = bundled_path("captioner" if batch[0]["kind"] == "captions" else "pages")
    vocab_size = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    prompt = batch[0]["prompt"]
    options = {"memory": memory, "placeholders": [max(set(prompt), key=prompt.count)]}
    if system.startswith("ngram"):
        return NgramDrafter(rows, vocab_size, **options)
    texts = [one["text" if system == "text_layer" else "ocr"] for one in batch]
    if batch[0]["kind"] == "failed":
        texts = list(map(garbled, texts))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return ReferenceDrafter(rows, vocab_size, references=texts, tokenizer=tokenizer, **options)


def measured(
    clock: Clock, system: str, inputs: Sequence[dict[str, Any]], size: int, known: dict[int, Any]
) -> Tally:
    """Replays inputs of a kind batch after batch; what steps cost is remembered in ``known``."""
    tally, memory = Tally(), new_store() if system.endswith("store") else None
    for first in range(0, len(inputs), size):
        batch = inputs[first : first + size]
        rows = TokenRows(
            [one["prompt"] for one in batch],
            max_new_tokens=[40 if batch[0]["kind"] == "captions" else 480] * len(batch),
            keys_B=torch.zeros(len(batch), dtype=torch.long),
            eos_token_ids=[batch[0]["tokens"][-1]],
        )
        drafter = drafter_of(system, rows, batch, memory)
        remaining = partial(getattr, rows, "max_remaining")
        schedule = RetrievalSchedule(DEFAULT_WIDTHS[drafter.name], remaining, costs=known)
        replay(drafter, rows, [one["tokens"] for one in batch], schedule, clock, tally)
        known.clear()
        known.update(schedule.costs)
    return tally


def main() -> None:
    """Prints a line for each configuration, kind and system."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=list(SYSTEMS), default="pages")
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--kinds", nargs="*")
    parser.add_argument("--systems", nargs="*")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "clock", "bfloat16", "steep"])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--inputs", type=int, default=4, help="Of each kind; at least a batch.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    inputs = written(args.model, args.keep)
    inputs += [one | {"kind": "failed"} for one in inputs if one["kind"] == "clean"]
    for dtype, size in itertools.product(args.dtypes, args.batch):
        if (args.model, dtype, size) not in FORWARDS:
            continue
        known: dict[int, Any] = {}
        for kind in args.kinds or sorted({one["kind"] for one in inputs}):
            chosen = [one for one in inputs if one["kind"] == kind][: max(args.inputs, size)]
            for system in args.systems or SYSTEMS[args.model]:
                clock = Clock(args.model, dtype, size)
                tally = measured(clock, system, chosen, size, known)
                ocr_s = OCR_S * len(chosen) if "reference" in system else 0.0
                print(f"{dtype:8} x{size} {kind:8} {system:15} {tally.line(ocr_s)}", flush=True)


if __name__ == "__main__":
    main()
