"""The picture of `mmspec bench video`: quality against time, one mark per setup."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmspec.bench.measure import Sample
from mmspec.bench.video_setups import BASELINES, baseline_of

#: Drawn twice as large and reduced, for smooth lines.
SCALE = 2
WIDTH, HEIGHT = 1080, 600
LEFT, RIGHT, TOP, BOTTOM = 70, 370, 40, 60
#: Of the list of names beside the plot.
LINE = 16
#: Colour of setups whose name begins so or, behind "+", holds such a part; the first that fits.
COLOURS = {
    "stitch": (170, 90, 190),
    "temporal": (200, 40, 40),
    "sharpness": (230, 130, 20),
    "noise": (150, 110, 50),
    "brisque": (20, 130, 120),
    "image-reward": (200, 0, 120),
    "random": (120, 120, 120),
    "every": (40, 100, 200),
    "": (0, 0, 0),
}


def draw_figure(rows: Sequence[Sample], path: Path) -> None:
    """Draws the rows of `mmspec.bench.video_report.summarise` into a PNG."""
    plot = _Plot(rows)
    for baseline in BASELINES:
        members = baseline_of(baseline, [row["setup"] for row in rows])
        plot.curve([row for row in rows if row["setup"] in members])
    for number, row in enumerate(rows, start=1):
        plot.mark(number, row)
    plot.image.resize((WIDTH, plot.height), Image.Resampling.LANCZOS).save(path, optimize=True)


class _Plot:
    """An empty picture with axes."""

    def __init__(self, rows: Sequence[Sample]) -> None:
        self.height = max(HEIGHT, TOP + LINE * len(rows) + BOTTOM)
        self.image = Image.new("RGB", (SCALE * WIDTH, SCALE * self.height), "white")
        self._pen = ImageDraw.Draw(self.image)
        self._font = ImageFont.load_default(13 * SCALE)
        self._seconds = _ends([row["model_s"] for row in rows] + [0.0])
        self._quality = _ends([end for row in rows for end in row["quality"][1:]])
        self._axes()

    def _place(self, seconds: float, quality: float) -> tuple[float, float]:
        across = (seconds - self._seconds[0]) / (self._seconds[1] - self._seconds[0])
        up = (quality - self._quality[0]) / (self._quality[1] - self._quality[0])
        x = LEFT + across * (WIDTH - LEFT - RIGHT)
        y = self.height - BOTTOM - up * (self.height - TOP - BOTTOM)
        return SCALE * x, SCALE * y

    def _axes(self) -> None:
        (low_s, high_s), (low_q, high_q) = self._seconds, self._quality
        grey = (205, 205, 205)
        for step in range(6):
            seconds = low_s + step / 5 * (high_s - low_s)
            quality = low_q + step / 5 * (high_q - low_q)
            ends = self._place(seconds, low_q), self._place(seconds, high_q)
            self._pen.line(ends, fill=grey, width=1)
            self._text(ends[0], f"{seconds:.3g}", "mt", shift=(0, 6))
            ends = self._place(low_s, quality), self._place(high_s, quality)
            self._pen.line(ends, fill=grey, width=1)
            self._text(ends[0], f"{quality:.3f}", "rm", shift=(-6, 0))
        bottom = self._place((low_s + high_s) / 2, low_q)
        self._text(bottom, "seconds per video (counts times prices)", "mt", shift=(0, 28))
        self._text(self._place(low_s, high_q), "quality, 95 % interval", "lb", shift=(0, -8))

    def _text(
        self, place: tuple[float, float], text: str, anchor: str, *, shift: tuple[int, int]
    ) -> None:
        x, y = (a + SCALE * b for a, b in zip(place, shift, strict=True))
        self._pen.text((x, y), text, fill=(40, 40, 40), font=self._font, anchor=anchor)

    def curve(self, rows: Sequence[Sample]) -> None:
        """Joins points by time."""
        points = sorted((row["model_s"], row["quality"][0]) for row in rows)
        if len(points) > 1:
            places = [self._place(*point) for point in points]
            self._pen.line(places, fill=(170, 170, 170), width=2 * SCALE)

    def mark(self, number: int, row: Sample) -> None:
        """A point with its interval and its number, and the name in the list."""
        value, low, high = row["quality"]
        colour = _colour(row["setup"])
        ends = [self._place(row["model_s"], one) for one in (low, high)]
        self._pen.line(ends, fill=colour, width=SCALE)
        x, y = self._place(row["model_s"], value)
        radius = 4 * SCALE
        self._pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        self._text((x, y), str(number), "lb", shift=(5, -3))
        place = SCALE * (WIDTH - RIGHT + LINE), SCALE * (TOP + LINE * (number - 1))
        self._pen.text(place, f"{number}  {row['setup']}", fill=colour, font=self._font)


def _colour(setup: str) -> tuple[int, int, int]:
    return next(colour for name, colour in COLOURS.items() if name in setup)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Of an axis, with some air; never empty."""
    low, high = min(values), max(values)
    air = 0.05 * (high - low) or 0.5
    return (low - air if low else 0.0), high + air
