"""Text of pictures by an OCR engine, with boxes and confidences: the draft of document parsing.

Engines are packages that are imported when one is opened. Importing this module sets
``OMP_THREAD_LIMIT=1`` unless it is set: Tesseract's own threads make a page slower on a machine
that has other work (20 s instead of 2.5 s were seen), and it reads the variable only once.
"""

import glob
import importlib.util
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmspec.checks import require, require_known

os.environ.setdefault("OMP_THREAD_LIMIT", "1")

Box = tuple[int, int, int, int]

#: Height of a line of text, in pixels, from which an engine reads well.
LINE_HEIGHT = 30
# Enlarging beyond this costs time and shows nothing more.
_MOST_ENLARGED = 4.0
# A space between words that is this much of the line's height stands between columns.
_COLUMN_GAP = 1.2
_INSTALL = "pip install 'mmspec[ocr]'"
_TESSDATA = ("/usr/share/tesseract-ocr/*/tessdata", "/usr/share/tessdata", "/usr/local/share/tessdata")


@dataclass(frozen=True, slots=True)
class Word:
    """A word that was read.

    Attributes:
        text: The word.
        confidence: How sure the engine is, in [0, 1].
        box: Left, top, right, bottom, in pixels of the picture that was given.
        end: Where the word ends in the text of the page.
    """

    text: str
    confidence: float
    box: Box
    end: int


@dataclass(frozen=True, slots=True)
class PageText:
    """The text of a page in reading order.

    Attributes:
        text: Words with a space between them, a tab where a column ends, a newline where a line
            ends, and an empty line where a paragraph does.
        words: The words; none where nothing is known of them.
    """

    text: str
    words: tuple[Word, ...] = ()


class TesserocrEngine:
    """Tesseract in this process, by the package tesserocr."""

    name = "tesserocr"

    def __init__(self, language: str = "eng") -> None:
        """Loads a language.

        Raises:
            ValueError: If the package or the language's data is missing; says where it was looked
                for.
        """
        tesserocr = _imported("tesserocr", self.name)
        folder = tessdata_folder(language)
        self._levels = tesserocr.RIL
        self._iterate: Any = tesserocr.iterate_level
        self._api: Any = tesserocr.PyTessBaseAPI(path=folder, lang=language, psm=tesserocr.PSM.AUTO)
        # White text on black is looked for otherwise, which costs a fifth of the time.
        self._api.SetVariable("tessedit_do_invert", "0")

    def __call__(self, image: Image.Image) -> PageText:
        """Reads a page."""
        scale, scaled = enlarged(image)
        self._api.SetImage(scaled)
        self._api.SetSourceResolution(300)
        self._api.Recognize()
        lines: list[list[tuple[str, float, Box]]] = []
        starts: list[bool] = []
        level = self._levels
        for word in self._iterate(self._api.GetIterator(), level.WORD):
            if word.Empty(level.WORD):
                continue
            if word.IsAtBeginningOf(level.TEXTLINE) or not lines:
                lines.append([])
                starts.append(word.IsAtBeginningOf(level.PARA))
            box = tuple(round(side / scale) for side in word.BoundingBox(level.WORD))
            confidence = min(max(word.Confidence(level.WORD) / 100, 0.0), 1.0)
            lines[-1].append((word.GetUTF8Text(level.WORD).strip(), confidence, box))
        return _composed(lines, starts)


class RapidOcrEngine:
    """PP-OCR on onnxruntime, by the package rapidocr; its weights come with it."""

    name = "rapidocr"

    def __init__(self) -> None:
        """Loads the models.

        Raises:
            ValueError: If the package is missing.
        """
        self._engine: Any = _imported("rapidocr", self.name).RapidOCR()

    def __call__(self, image: Image.Image) -> PageText:
        """Reads a page."""
        scale, scaled = enlarged(image)
        found = self._engine(np.asarray(scaled.convert("RGB"))[..., ::-1])
        if found.boxes is None:
            return PageText("")
        spans = []
        for text, confidence, corners in zip(found.txts, found.scores, found.boxes, strict=True):
            corners = np.asarray(corners) / scale
            box = (*corners.min(0).round().astype(int), *corners.max(0).round().astype(int))
            spans.append((text.strip(), float(confidence), tuple(map(int, box))))
        lines = _lines_of([span for span in spans if span[0]])
        return _composed(lines, [False] * len(lines))


Engine = Callable[[Image.Image], PageText]

#: Name -> (package, class), the preferred one first.
ENGINES: dict[str, tuple[str, Callable[[], Engine]]] = {
    "tesserocr": ("tesserocr", TesserocrEngine),
    "rapidocr": ("rapidocr", RapidOcrEngine),
}


def installed_engines() -> list[str]:
    """Names of the engines whose packages are there, the preferred one first."""
    return [name for name, (package, _) in ENGINES.items() if importlib.util.find_spec(package)]


def open_engine(name: str) -> Engine:
    """Loads an engine.

    Raises:
        ValueError: If the name is unknown, or the engine's package or data is missing.
    """
    require_known("OCR engine", name, ENGINES)
    return ENGINES[name][1]()


def tessdata_folder(language: str = "eng") -> str:
    """The folder with Tesseract's data of a language: ``$TESSDATA_PREFIX``, or where it usually is.

    Raises:
        ValueError: If there is none; lists where it was looked for.
    """
    own = os.environ.get("TESSDATA_PREFIX")
    looked = [own, os.path.join(own, "tessdata")] if own else []
    looked += [folder for pattern in _TESSDATA for folder in sorted(glob.glob(pattern))[::-1]]
    for folder in looked:
        if os.path.isfile(os.path.join(folder, f"{language}.traineddata")):
            return os.path.join(folder, "")
    raise ValueError(
        f"{language}.traineddata of Tesseract was not found in {', '.join(looked or _TESSDATA)}; "
        f"install it (Debian: apt-get install tesseract-ocr-{language}) or set TESSDATA_PREFIX"
    )


def enlarged(image: Image.Image, line_height: int = LINE_HEIGHT) -> tuple[float, Image.Image]:
    """A grey picture whose lines of text are high enough to be read, and its scale."""
    grey = image.convert("L")
    height = line_pitch(grey)
    scale = min(max(line_height / height, 1.0), _MOST_ENLARGED) if height else 1.0
    if scale == 1.0:
        return 1.0, grey
    size = (round(grey.width * scale), round(grey.height * scale))
    return scale, grey.resize(size, Image.Resampling.LANCZOS)


def line_pitch(grey: Image.Image) -> float | None:
    """Median distance of the lines of text, in pixels; None where there are not two of them."""
    starts = [start for start, _ in ink_bands(grey)]
    return statistics.median(np.diff(starts).tolist()) if len(starts) > 1 else None


def ink_bands(grey: Image.Image) -> list[tuple[int, int]]:
    """First and last row, exclusive, of each run of pixel rows with ink, from the top."""
    pixels = np.asarray(grey, dtype=np.int16)
    paper = np.median(pixels)
    # Ink is far from the paper's shade; a row needs more of it than stray noise leaves.
    share = (abs(pixels - paper) > 64).mean(1)
    has_ink = np.concatenate([[False], share > 0.002, [False]])
    edges = np.flatnonzero(has_ink[1:] != has_ink[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _imported(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"the OCR engine {name!r} needs the package {package}, which cannot be imported "
            f"({error}); {_INSTALL}, or pass ocr=None"
        ) from error


def _composed(
    lines: Sequence[Sequence[tuple[str, float, Box]]], is_start: Sequence[bool]
) -> PageText:
    """Lines of words as one text."""
    text = ""
    words: list[Word] = []
    for line, starts in zip(lines, is_start, strict=True):
        if text:
            text += "\n\n" if starts else "\n"
        height = statistics.median(box[3] - box[1] for _, _, box in line)
        right = None
        for written, confidence, box in line:
            if right is not None:
                text += "\t" if box[0] - right > _COLUMN_GAP * height else " "
            text += written
            right = box[2]
            words.append(Word(written, confidence, box, len(text)))
    return PageText(text, tuple(words))


def _lines_of(
    spans: Sequence[tuple[str, float, Box]],
) -> list[list[tuple[str, float, Box]]]:
    """Pieces of lines put together: what lies at one height, from the left."""
    lines: list[list[tuple[str, float, Box]]] = []
    for span in sorted(spans, key=lambda span: span[2][1] + span[2][3]):
        top, bottom = span[2][1], span[2][3]
        middle = (top + bottom) / 2
        if lines and lines[-1][0][2][1] <= middle <= lines[-1][0][2][3]:
            lines[-1].append(span)
        else:
            lines.append([span])
    return [sorted(line, key=lambda span: span[2][0]) for line in lines]
