"""The page of `mmspec demo`: one self-contained HTML file, made from what was measured.

Everything is inline: style, pictures, a few lines of script for the replay. Without the script the
page shows the same results, at rest.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from mmspec.ledger import conditional_acceptance
from mmspec.page_style import SCRIPT, STYLE
from mmspec.pictures import overlay, png_data_url, step_map, upscale
from mmspec.records import Stats

#: Positions shown in a chart; later ones are reached too seldom to say much.
MAX_BARS = 32
NUM_TINTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measured generation of one row.

    Attributes:
        stats: Its figures.
        accepted: Accepted drafts of each step.
        levels: Deepest draft of each step.
    """

    stats: Stats
    accepted: list[int]
    levels: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSample:
    """A prompt answered plainly and speculatively.

    Attributes:
        kind: Kind of prompt.
        prompt: The prompt.
        pieces: The answer, token by token: text, and the step that committed it.
        plain: Plain decoding.
        fast: Speculative decoding.
        is_same: Both gave the same tokens.
    """

    kind: str
    prompt: str
    pieces: list[tuple[str, int]]
    plain: Run
    fast: Run
    is_same: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSample:
    """A prompt drawn plainly and speculatively from one seed.

    Attributes:
        prompt: The prompt.
        seed: The seed of both.
        plain_image: The image of plain decoding.
        fast_image: The image of speculative decoding.
        steps: Step of each cell of the grid.
        plain: Plain decoding.
        fast: Speculative decoding.
        is_same: Both gave the same codes.
    """

    prompt: str
    seed: int
    plain_image: Image.Image
    fast_image: Image.Image
    steps: list[list[int]]
    plain: Run
    fast: Run
    is_same: bool


Sample = TextSample | ImageSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """Sums over the runs of one decoding."""

    num_units: int
    num_target_forwards: int
    wall_time_s: float
    acceptance: list[float]

    @property
    def tau(self) -> float:
        """Units per forward."""
        return self.num_units / max(self.num_target_forwards, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "num_units": self.num_units,
            "num_target_forwards": self.num_target_forwards,
            "tau": round(self.tau, 3),
            "wall_time_s": round(self.wall_time_s, 4),
            "acceptance_by_position": [round(rate, 3) for rate in self.acceptance],
        }


def total(runs: Sequence[Run]) -> Total:
    """Adds runs up."""
    accepted = [count for run in runs for count in run.accepted]
    levels = [count for run in runs for count in run.levels]
    return Total(
        num_units=sum(run.stats.num_units for run in runs),
        num_target_forwards=sum(run.stats.num_target_forwards for run in runs),
        wall_time_s=sum(run.stats.wall_time_s for run in runs),
        acceptance=conditional_acceptance(accepted, levels),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """All samples of one modality.

    Attributes:
        name: "Images" or "Text".
        unit: What is counted.
        model: Name of the model.
        setting: How it was decoded, for people.
        plain_name: Name of the plain decoder.
        fast_name: Name of the speculative one.
        samples: The samples; empty if it was skipped.
        skipped: Why it was skipped, if it was.
        num_left_out: Samples that there was no time for.
    """

    name: str
    unit: str
    model: str
    setting: str
    plain_name: str
    fast_name: str
    samples: Sequence[Sample] = ()
    skipped: str | None = None
    num_left_out: int = 0

    @property
    def plain(self) -> Total:
        """All plain runs."""
        return total([sample.plain for sample in self.samples])

    @property
    def fast(self) -> Total:
        """All speculative runs."""
        return total([sample.fast for sample in self.samples])

    @property
    def gain(self) -> float:
        """How many times faster, in seconds."""
        return self.plain.wall_time_s / max(self.fast.wall_time_s, 1e-9)

    @property
    def is_same(self) -> bool:
        """Every sample gave the same tokens both ways."""
        return all(sample.is_same for sample in self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """All of a demo.

    Attributes:
        sections: One per modality.
        command: The command that was typed.
        facts: Versions and hardware, by name.
        path: The page.
    """

    sections: Sequence[Section]
    command: str
    facts: dict[str, str] = field(default_factory=dict)
    path: str = ""

    @property
    def is_same(self) -> bool:
        """Nothing differed anywhere."""
        return all(section.is_same for section in self.sections)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without samples."""
        rows = []
        for section in self.sections:
            row: dict[str, Any] = {"name": section.name, "model": section.model}
            if section.samples:
                row |= {
                    "plain": section.plain.to_dict(),
                    "fast": section.fast.to_dict(),
                    "gain": round(section.gain, 3),
                    "is_same": section.is_same,
                    "setting": section.setting,
                    "num_left_out": section.num_left_out,
                }
            rows.append(row | {"skipped": section.skipped})
        return {"command": self.command, "page": self.path, "facts": self.facts, "rows": rows}

    def table(self) -> str:
        """A compact table for the terminal."""
        form = "{:8} {:12} {:>7} {:>9} {:>6} {:>9} {:>7}  {}"
        lines = [form.format("", "", "tokens", "forwards", "tau", "seconds", "gain", "")]
        for section in self.sections:
            if section.skipped:
                lines.append(f"{section.name:8} skipped: {section.skipped}")
                continue
            same = "same tokens" if section.is_same else "TOKENS DIFFER"
            for name, sums, gain, verdict in (
                (section.plain_name, section.plain, "", ""),
                (section.fast_name, section.fast, f"{section.gain:.2f}x", same),
            ):
                cells = (sums.num_units, sums.num_target_forwards, f"{sums.tau:.2f}")
                seconds = f"{sums.wall_time_s:.2f}"
                lines.append(form.format(section.name, name, *cells, seconds, gain, verdict))
        lines += [f"{s.name}: {_left_out(s)}" for s in self.sections if s.num_left_out]
        return "\n".join([*lines, f"page: {self.path}"])


def render(report: DemoReport) -> str:
    """Makes the page."""
    done = [section for section in report.sections if section.samples]
    body = "".join(
        [
            _hero(report, done),
            _HOW,
            *(_section(section) for section in report.sections),
            _figures(done),
            _footer(report),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>mmspec demo</title>'
        f"<style>{STYLE}</style></head><body><main>{body}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def gain_words(gain: float) -> str:
    """A gain as people say it, also where there is none."""
    return f"{gain:.1f}× faster" if gain >= 1.05 else f"{gain:.2f}× the speed"


def _hero(report: DemoReport, done: Sequence[Section]) -> str:
    gains = [f"<b>{section.name} {gain_words(section.gain)}.</b>" for section in done]
    same = "Every token the same." if report.is_same else "But tokens differ: please report this."
    cards = "".join(
        f'<div class="card number"><span>{section.name}: forwards of the model</span>'
        f"<strong>{section.plain.num_target_forwards:,} → "
        f"{section.fast.num_target_forwards:,}</strong>"
        f"<span>{section.plain.wall_time_s:.1f} s → {section.fast.wall_time_s:.1f} s, "
        f"{section.fast.tau:.1f} {section.unit} per forward</span></div>"
        for section in done
    )
    return (
        f'<header><p class="brand">mmspec</p><h1>{" ".join(gains)} {same}</h1>'
        '<p class="lead">Measured a moment ago on the machine that wrote this page, plain decoding '
        f'beside speculative decoding.</p><div class="numbers">{cards}</div></header>'
    )


_HOW = (
    '<section><h2>How it works</h2><ol class="how">'
    "<li><b>Guess.</b> A cheap drafter writes down what probably comes next: a copy from the "
    "prompt for text, the model’s own last guesses for an image.</li>"
    "<li><b>Check.</b> The model reads all guesses in one forward, which costs little more than "
    "reading one.</li>"
    "<li><b>Keep.</b> Guesses that equal the model’s own seeded choice stay, the first one that "
    "does not is replaced by it, so the result is what plain decoding gives.</li></ol></section>"
)


def _left_out(section: Section) -> str:
    return f"{section.num_left_out} more left out for lack of time: a slow or busy machine."


def _section(section: Section) -> str:
    title = f"<h2>{section.name}</h2>"
    if section.skipped:
        return (
            f'<section>{title}<div class="card skipped"><b>Skipped.</b> '
            f"{html.escape(section.skipped)}</div></section>"
        )
    about = f'<p class="note">{html.escape(section.model)}, {html.escape(section.setting)}.'
    about += f" <b>{_left_out(section)}</b>" if section.num_left_out else ""
    if isinstance(section.samples[0], ImageSample):
        tiles = "".join(_tile(s) for s in section.samples if isinstance(s, ImageSample))
        return (
            f"<section>{title}{about} Each row: plain decoding, speculative decoding, and the "
            "step map, where an area of one shade came out of one forward.</p>"
            '<p class="legend"><span>first forward</span><i></i><span>last</span>'
            '<button type="button" id="replay" hidden>Replay</button>'
            f'<span id="pace"></span></p><div class="tiles">{tiles}</div></section>'
        )
    samples = "".join(_text(s) for s in section.samples if isinstance(s, TextSample))
    return (
        f"<section>{title}{about} Tokens on one tint came out of one forward; tokens without "
        f"a tint took a forward each.</p>{samples}</section>"
    )


def _tile(sample: ImageSample) -> str:
    steps = sample.steps
    zoom = max(1, 160 // sample.fast_image.width)
    plain, fast = upscale(sample.plain_image, zoom), upscale(sample.fast_image, zoom)
    drawn = overlay(fast, step_map(steps, num_steps=sample.fast.stats.num_target_forwards), 0.75)
    race = {
        "steps": steps,
        "forwards": sample.fast.stats.num_target_forwards,
        "plain": round(sample.plain.stats.wall_time_s, 4),
        "fast": round(sample.fast.stats.wall_time_s, 4),
    }
    prompt = html.escape(sample.prompt, quote=True)
    flag = "" if sample.is_same else '<b class="bad">codes differ</b>'
    return (
        f"<figure class=\"card tile\" data-race='{json.dumps(race, separators=(',', ':'))}'>"
        f'<div class="trio">{_shot(plain, "plain", sample.plain, prompt, "plain")}'
        f"{_shot(fast, 'speculative', sample.fast, prompt, 'fast')}"
        f'<div class="shot"><img alt="step map of: {prompt}" src="{png_data_url(drawn)}">'
        f"<small>step map<br>{sample.fast.stats.tau:.1f} per forward</small></div></div>"
        f"<figcaption>{prompt} <em>seed {sample.seed}</em>{flag}</figcaption></figure>"
    )


def _shot(image: Image.Image, name: str, run: Run, prompt: str, track: str) -> str:
    stats = run.stats
    return (
        f'<div class="shot" data-track="{track}"><img alt="{name}: {prompt}" '
        f'src="{png_data_url(image)}"><small>{name}<br>{stats.num_target_forwards} forwards, '
        f"{stats.wall_time_s:.2f} s</small></div>"
    )


def _text(sample: TextSample) -> str:
    plain, fast = sample.plain.stats, sample.fast.stats
    gain = plain.wall_time_s / max(fast.wall_time_s, 1e-9)
    flag = "same tokens" if sample.is_same else '<b class="bad">tokens differ</b>'
    share = 100 * fast.num_target_forwards / max(plain.num_target_forwards, 1)
    return (
        f'<article class="card text"><h3><span class="badge">{html.escape(sample.kind)}</span>'
        f'<span class="gain">{gain_words(gain)}</span><small>{flag}</small></h3>'
        f'<details><summary>{html.escape(_clipped(sample.prompt))}</summary><p class="prompt">'
        f'{html.escape(sample.prompt)}</p></details><p class="tokens">{_tokens(sample.pieces)}</p>'
        f'<div class="lane"><i style="width:100%"></i><span>plain: {plain.num_target_forwards} '
        f"forwards, {plain.wall_time_s:.1f} s</span></div>"
        f'<div class="lane fast"><i style="width:{share:.1f}%"></i><span>speculative: '
        f"{fast.num_target_forwards} forwards, {fast.wall_time_s:.1f} s, "
        f"{fast.tau:.1f} tokens per forward</span></div></article>"
    )


def _clipped(text: str, limit: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def _tokens(pieces: Sequence[tuple[str, int]]) -> str:
    """Tokens of one step in one tinted run; steps of one token without a tint."""
    runs: list[tuple[int, list[str]]] = []
    for text, step in pieces:
        if not runs or runs[-1][0] != step:
            runs.append((step, []))
        runs[-1][1].append(html.escape(text))
    parts, tint = [], 0
    for step, texts in runs:
        if len(texts) == 1:
            parts.append(texts[0])
            continue
        tint = (tint + 1) % NUM_TINTS
        title = f"forward {step + 1}: {len(texts)} tokens"
        parts.append(f'<mark class="t{tint}" title="{title}">{"".join(texts)}</mark>')
    return "".join(parts)


def _figures(done: Sequence[Section]) -> str:
    rows = "".join(_rows(section) for section in done)
    charts = "".join(
        f'<figure class="card chart"><figcaption>{section.name}: chance that a guess is kept if '
        f"the ones before it were, by its place in the draft</figcaption>"
        f"{bars_svg(section.fast.acceptance)}</figure>"
        for section in done
        if section.fast.acceptance
    )
    return (
        '<section><h2>Figures</h2><div class="card scroll"><table><thead><tr><th>What</th>'
        "<th>Decoding</th><th>Tokens</th><th>Forwards</th><th>Tau</th><th>Seconds</th>"
        "<th>Tokens/s</th><th>Gain</th><th>Tokens</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
        '<p class="note">Tau: tokens per forward of the model, its own included. Seconds include '
        f'reading the prompt. One run each, after a warm-up.</p><div class="charts">{charts}</div>'
        "</section>"
    )


def _rows(section: Section) -> str:
    same = "same" if section.is_same else '<b class="bad">differ</b>'
    lines = []
    for name, sums, gain, verdict in (
        (section.plain_name, section.plain, "", ""),
        (section.fast_name, section.fast, f"<b>{section.gain:.2f}×</b>", same),
    ):
        rate = sums.num_units / max(sums.wall_time_s, 1e-9)
        lines.append(
            f"<tr><td>{section.name}</td><td>{html.escape(name)}</td><td>{sums.num_units:,}</td>"
            f"<td>{sums.num_target_forwards:,}</td><td>{sums.tau:.2f}</td>"
            f"<td>{sums.wall_time_s:.2f}</td><td>{rate:.1f}</td><td>{gain}</td>"
            f"<td>{verdict}</td></tr>"
        )
    return "".join(lines)


def bars_svg(rates: Sequence[float]) -> str:
    """Bars of rates between 0 and 1, by position from 1."""
    shown = list(rates)[:MAX_BARS]
    step = min(400 / max(len(shown), 1), 40)
    parts = []
    for share, label in ((0.0, "0"), (0.5, "50 %"), (1.0, "100 %")):
        y = 120 - 100 * share
        parts.append(f'<line x1="44" x2="450" y1="{y:.0f}" y2="{y:.0f}"/>')
        parts.append(f'<text x="38" y="{y + 4:.0f}" text-anchor="end">{label}</text>')
    for index, rate in enumerate(shown):
        x, height = 48 + index * step, 100 * rate
        parts.append(
            f'<rect x="{x:.1f}" y="{120 - height:.1f}" width="{step * 0.78:.1f}" '
            f'height="{height:.1f}" rx="1.5"><title>{index + 1}: {100 * rate:.0f} %</title></rect>'
        )
        if index in (0, len(shown) - 1) or (index + 1) % 8 == 0:
            middle = x + step * 0.39
            parts.append(f'<text x="{middle:.1f}" y="137" text-anchor="middle">{index + 1}</text>')
    percent = ", ".join(f"{100 * rate:.0f}" for rate in shown)
    return (
        f'<svg viewBox="0 0 460 144" role="img" aria-label="percent kept by position: {percent}">'
        f"{''.join(parts)}</svg>"
    )


def _footer(report: DemoReport) -> str:
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in report.facts.items()
    )
    return (
        f"<footer><h2>Do it again</h2><pre>{html.escape(report.command)}</pre><dl>{facts}</dl>"
        "</footer>"
    )
