"""Text of pictures by an OCR engine, with boxes and confidences: the draft of document parsing.

Engines are packages that are imported when one is opened. Tesseract is loaded with
``OMP_THREAD_LIMIT=1`` unless it is set: its own threads make a page slower on a machine that has
other work (20 s instead of 2.5 s were seen), and it reads the variable only once.
"""

import glob
import importlib
import importlib.util
import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from mmspec.checks import require_known

Box = tuple[int, int, int, int]

#: Distance of two lines of text, in pixels, from which an engine reads well.
LINE_PITCH = 44
# Standard deviation of the blur, in pixels.
_SMOOTHING = 1.0
#: Enlarging beyond this costs time and shows nothing more.
MOST_ENLARGED = 4.0
# A space between words that is this much of the line's height stands between columns.
_COLUMN_GAP = 1.2
#: A step between lines that is this much of the usual one starts a paragraph.
PARAGRAPH_GAP = 1.3
# A line that ends before this share of its block's width ends a paragraph.
_FULL_LINE = 0.8
# Most words of a line, on average, in a block that may be a column of a table.
_WORDS_OF_A_CELL = 3.0
# How alike a picture must be to itself a line further down, against no shift.
_LEAST_RECURRENCE = 0.15
_TESSDATA = (
    "/usr/share/tesseract-ocr/*/tessdata",
    "/usr/share/tessdata",
    "/usr/local/share/tessdata",
)


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

    def between(
        self, top: float, bottom: float, left: float = -math.inf, right: float = math.inf
    ) -> "PageText":
        """The text of the words whose middle lies between these heights and sides, in pixels.

        Where words are left out, the widest of the blanks around them stays.
        """
        text, blank, end = "", "", 0
        words: list[Word] = []
        for word in self.words:
            start = word.end - len(word.text)
            blank = max(blank, self.text[end:start], key=_width_of)
            end = word.end
            across, down = (word.box[0] + word.box[2]) / 2, (word.box[1] + word.box[3]) / 2
            if left <= across < right and top <= down < bottom:
                text += (blank if words else "") + word.text
                words.append(replace(word, end=len(text)))
                blank = ""
        return PageText(text, tuple(words))


def _width_of(blank: str) -> tuple[int, bool, int]:
    return blank.count("\n"), "\t" in blank, len(blank)


_Span = tuple[str, float, Box]


@dataclass(frozen=True, slots=True)
class _Line:
    spans: list[_Span]
    starts_paragraph: bool


_Block = list[_Line]


class TesserocrEngine:
    """Tesseract in this process, by the package tesserocr."""

    name = "tesserocr"

    def __init__(self, language: str = "eng") -> None:
        """Loads a language.

        Raises:
            ValueError: If the package or the language's data is missing; says where it was looked
                for.
        """
        with _one_thread():
            tesserocr = _imported("tesserocr", "ocr")
        folder = tessdata_folder(language)
        self._levels = tesserocr.RIL
        self._iterate: Any = tesserocr.iterate_level
        self._api: Any = tesserocr.PyTessBaseAPI(path=folder, lang=language, psm=tesserocr.PSM.AUTO)
        # White text on black is looked for otherwise, which costs a fifth of the time.
        self._api.SetVariable("tessedit_do_invert", "0")

    def __call__(self, image: Image.Image, pitch: float | None = None) -> PageText:
        """Reads a page, or a part of one whose lines are so many pixels apart."""
        scale, scaled = prepared(image, pitch)
        self._api.SetImage(scaled)
        self._api.SetSourceResolution(300)
        self._api.Recognize()
        blocks: list[_Block] = []
        level = self._levels
        for word in self._iterate(self._api.GetIterator(), level.WORD):
            if word.Empty(level.WORD):
                continue
            if word.IsAtBeginningOf(level.BLOCK) or not blocks:
                blocks.append([])
            if word.IsAtBeginningOf(level.TEXTLINE) or not blocks[-1]:
                blocks[-1].append(_Line([], word.IsAtBeginningOf(level.PARA)))
            box = tuple(round(side / scale) for side in word.BoundingBox(level.WORD))
            confidence = min(max(word.Confidence(level.WORD) / 100, 0.0), 1.0)
            span = (word.GetUTF8Text(level.WORD).strip(), confidence, box)
            if span[0]:
                blocks[-1][-1].spans.append(span)
        return _composed(_in_rows(list(map(_in_paragraphs, blocks))))


class RapidOcrEngine:
    """PP-OCR on onnxruntime, by the package rapidocr; its weights come with it."""

    name = "rapidocr"

    def __init__(self) -> None:
        """Loads the models.

        Raises:
            ValueError: If the package is missing.
        """
        self._engine: Any = _imported("rapidocr", "rapidocr").RapidOCR()

    def __call__(self, image: Image.Image, pitch: float | None = None) -> PageText:
        """Reads a page, or a part of one whose lines are so many pixels apart."""
        scale, scaled = prepared(image, pitch)
        found = self._engine(np.asarray(scaled.convert("RGB"))[..., ::-1])
        if found.boxes is None:
            return PageText("")
        spans: list[_Span] = []
        for text, confidence, corners in zip(found.txts, found.scores, found.boxes, strict=True):
            corners = np.asarray(corners) / scale
            left, top = map(round, corners.min(0).tolist())
            right, bottom = map(round, corners.max(0).tolist())
            spans.append((text.strip(), float(confidence), (left, top, right, bottom)))
        # The engine knows no paragraphs; a short line is as likely the row of a table.
        lines = _lines_of([span for span in spans if span[0]])
        return _composed(_in_paragraphs(lines, full_line=0.0))


#: Reads a page; of a part, which has few lines, the distance of the page's lines is given too.
Engine = Callable[..., PageText]

#: Name -> (package, class), the preferred one first.
ENGINES: dict[str, tuple[str, Callable[[], Engine]]] = {
    "tesserocr": ("tesserocr", TesserocrEngine),
    "rapidocr": ("rapidocr", RapidOcrEngine),
}


def installed_engines() -> list[str]:
    """Names of the engines whose packages and data are there, the preferred one first."""
    return [
        name
        for name, (package, _) in ENGINES.items()
        if importlib.util.find_spec(package) and (name != "tesserocr" or _tessdata("eng"))
    ]


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
    folder = _tessdata(language)
    if folder is None:
        raise ValueError(
            f"{language}.traineddata of Tesseract was not found in {', '.join(_looked_at())}; "
            f"install it (Debian: apt-get install tesseract-ocr-{language}) or set TESSDATA_PREFIX"
        )
    return folder


def _tessdata(language: str) -> str | None:
    for pattern in _looked_at():
        for folder in sorted(glob.glob(pattern), reverse=True):
            if os.path.isfile(os.path.join(folder, f"{language}.traineddata")):
                return os.path.join(folder, "")
    return None


def _looked_at() -> list[str]:
    own = os.environ.get("TESSDATA_PREFIX")
    return [
        *([glob.escape(own), glob.escape(os.path.join(own, "tessdata"))] if own else []),
        *_TESSDATA,
    ]


def prepared(image: Image.Image, pitch: float | None = None) -> tuple[float, Image.Image]:
    """The picture in grey, as engines read it best, and by how much it was enlarged.

    Lines of text are made high enough, and a slight blur takes the noise of a scan: with a standard
    deviation of 40 Tesseract finds no text at all without it, and clean pages do not suffer.

    Args:
        image: The picture.
        pitch: Distance of its lines; found if it is None.
    """
    grey = image.convert("L")
    pitch = pitch or line_pitch(grey)
    scale = min(max(LINE_PITCH / pitch, 1.0), MOST_ENLARGED) if pitch else 1.0
    if scale > 1.0:
        size = (round(grey.width * scale), round(grey.height * scale))
        grey = grey.resize(size, Image.Resampling.LANCZOS)
    return scale, grey.filter(ImageFilter.GaussianBlur(_SMOOTHING))


def line_pitch(grey: Image.Image) -> float | None:
    """Distance of the lines of text, in pixels, by autocorrelation; None where nothing recurs."""
    profile = np.asarray(grey, dtype=np.float64).mean(1)
    profile -= profile.mean()
    spectrum = np.fft.rfft(profile, 2 * len(profile))
    similar = np.fft.irfft(abs(spectrum) ** 2)[: len(profile) // 4]
    if len(similar) < 3 or similar[0] <= 0:
        return None
    inner = similar[1:-1]
    peaks = 1 + np.flatnonzero((inner > similar[:-2]) & (inner >= similar[2:]))
    if not len(peaks) or similar[peaks].max() < _LEAST_RECURRENCE * similar[0]:
        return None
    # Twice the distance is nearly as good; letters alone make small peaks before.
    return float(peaks[similar[peaks] > 0.8 * similar[peaks].max()][0])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limits libraries that are loaded meanwhile. Worker processes would inherit it for torch."""
    name = "OMP_THREAD_LIMIT"
    is_given = name in os.environ
    os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if not is_given:
            del os.environ[name]


def _imported(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"this OCR engine needs the package {package}, which cannot be imported ({error}); "
            f"pip install 'mmspec[{extra}]', or pass ocr=None"
        ) from error


def _composed(lines: Sequence[_Line]) -> PageText:
    """Lines of words as one text."""
    text = ""
    words: list[Word] = []
    for line in lines:
        if not line.spans:
            continue
        if text:
            text += "\n\n" if line.starts_paragraph else "\n"
        height = statistics.median(box[3] - box[1] for _, _, box in line.spans)
        right = None
        for written, confidence, box in line.spans:
            if right is not None:
                text += "\t" if box[0] - right > _COLUMN_GAP * height else " "
            text += written
            right = box[2]
            words.append(Word(written, confidence, box, len(text)))
    return PageText(text, tuple(words))


def _in_paragraphs(block: _Block, full_line: float = _FULL_LINE) -> _Block:
    """The lines of a block; a paragraph starts below a gap or below a line that is not full.

    The engine alone sees paragraphs wherever a sentence happens to end with its line.
    """
    tops = [line.spans[0][2][1] if line.spans else 0 for line in block]
    rights = [line.spans[-1][2][2] if line.spans else 0 for line in block]
    steps = [below - above for above, below in itertools.pairwise(tops)]
    usual = statistics.median(steps) if steps else 0
    left = min((line.spans[0][2][0] for line in block if line.spans), default=0)
    full = left + full_line * (max(rights, default=0) - left)
    lines = [_Line(line.spans, True) for line in block[:1]]
    for line, step, right in zip(block[1:], steps, rights[:-1], strict=True):
        is_apart = step > PARAGRAPH_GAP * usual or right < full
        lines.append(_Line(line.spans, line.starts_paragraph and is_apart))
    return lines


def _in_rows(blocks: Sequence[_Block]) -> list[_Line]:
    """The lines of all blocks; blocks beside each other with few words a line are a table.

    Its columns are read row by row, as any output has them, wherever the engine put them: it likes
    to end the first column with what stands below the table.
    """
    tables = _tables([block for block in blocks if _is_column(block, blocks)])
    lines: list[_Line] = []
    for block in blocks:
        table = next((table for table in tables if any(block is one for one in table)), [block])
        if len(table) == 1:
            lines += block
        elif block is table[0]:
            rows = _lines_of([span for one in table for line in one for span in line.spans])
            lines += [_Line(row.spans, index == 0) for index, row in enumerate(rows)]
    return lines


def _tables(columns: Sequence[_Block]) -> list[list[_Block]]:
    """Columns that stand at one height, in the order in which they came."""
    tables: list[list[_Block]] = []
    end = 0
    for block in sorted(columns, key=_extent):
        top, bottom = _extent(block)
        if tables and top < end:
            tables[-1].append(block)
            end = max(end, bottom)
        else:
            tables.append([block])
            end = bottom
    return tables


def _is_column(block: _Block, blocks: Sequence[_Block]) -> bool:
    """Narrow, and another one stands beside it."""
    if sum(len(line.spans) for line in block) > _WORDS_OF_A_CELL * len(block):
        return False
    top, bottom = _extent(block)
    for other in blocks:
        above, below = _extent(other)
        if other is not block and min(bottom, below) > max(top, above):
            return True
    return False


def _extent(block: _Block) -> tuple[int, int]:
    boxes = [box for line in block for _, _, box in line.spans]
    return min((box[1] for box in boxes), default=0), max((box[3] for box in boxes), default=0)


def _lines_of(spans: Sequence[_Span]) -> list[_Line]:
    """Pieces of lines put together: what lies at one height, from the left.

    Each may start a paragraph.
    """
    lines: list[list[_Span]] = []
    for span in sorted(spans, key=lambda span: span[2][1] + span[2][3]):
        top, bottom = span[2][1], span[2][3]
        middle = (top + bottom) / 2
        if lines and lines[-1][0][2][1] <= middle <= lines[-1][0][2][3]:
            lines[-1].append(span)
        else:
            lines.append([span])
    return [_Line(sorted(line, key=lambda span: span[2][0]), True) for line in lines]
