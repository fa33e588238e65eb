"""Documents as pages: PDF files, pictures, scans of several pages, and folders of them.

A page is drawn when it is asked for, in any thread, so a job needs the memory of the pages that it
is at, whatever the document. What cannot be read is a `ValueError` that names
the file and the page.
"""

import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pypdfium2
from PIL import Image, ImageOps
from pypdfium2.raw import FPDF_ERR_PASSWORD

from mmspec.checks import is_integer, reason_of, require

if TYPE_CHECKING:
    from mmspec.ocr_reading import PendingReading, Reading

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
DOCUMENTS = (".pdf", *PICTURES)
#: Only these are read as scans of several pages: the further frames of a telephone's JPEG are
#: previews.
_SCANS = (".tif", ".tiff")

#: PDFium does not bear calls from two threads at once, not even for two documents.
_PDFIUM = threading.Lock()

#: A page that is drawn larger would take more than 300 MB.
MAX_PIXELS = 100_000_000
_POINTS_PER_INCH = 72
#: Characters that stand in text layers for a hyphen at the end of a line.
_HYPHENS = re.compile("[\x02\xad\ufffe]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A file that could be opened.

    Attributes:
        file: Its path.
        digest: First 16 hexadecimal digits of the SHA-256 of its content.
        num_pages: At least 1.
    """

    file: Path
    digest: str
    num_pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A page that was read.

    Attributes:
        image: RGB, upright, on white.
        text: The text layer of a born-digital page, what an OCR engine reads ahead, or None.
        wait_time_s: Seconds in which the model waited for it.
    """

    image: Image.Image
    text: "str | PendingReading | Reading | None" = None
    wait_time_s: float = 0.0

    @property
    def is_blank(self) -> bool:
        """Whether all pixels have one colour."""
        ranges = cast(tuple[tuple[int, int], ...], self.image.getextrema())
        return all(low == high for low, high in ranges)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How documents are read.

    Attributes:
        dpi: Pixels per inch at which PDF pages are drawn; pictures keep their own pixels.
        password: Opens protected PDF files.
    """

    dpi: int = 150
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuses a resolution at which nothing can be drawn."""
        require(is_integer(self.dpi) and self.dpi >= 1, "dpi", "an integer >= 1", self.dpi)

    def open(self, file: str | Path) -> Document:
        """Counts the pages of a file, without drawing any.

        Raises:
            ValueError: If it is empty, broken, or protected by another password.
        """
        file = Path(file)
        try:
            if file.stat().st_size == 0:
                raise ValueError(f"{file} is empty (0 bytes)")
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()[:16]
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from error
        num_pages = self._num_pages(file)
        if num_pages == 0:
            raise ValueError(f"{file} has no pages")
        return Document(file=file, digest=digest, num_pages=num_pages)

    def read(self, file: str | Path, number: int) -> Sheet:
        """Draws a page and takes its text layer.

        Args:
            file: The document.
            number: The page, from 1.

        Raises:
            ValueError: If the page cannot be read or would be larger than `MAX_PIXELS`.
        """
        file = Path(file)
        where = name_of(file, number)
        if _is_pdf(file):
            with self._pdf(file, where) as pdf, _reasons(where):
                return Sheet(image=self._drawn(pdf, number), text=_text_layer(pdf, number))
        with _reasons(where):
            return Sheet(image=_picture(file, number))

    def _num_pages(self, file: Path) -> int:
        if _is_pdf(file):
            with self._pdf(file, str(file)) as pdf, _reasons(str(file)):
                return len(pdf)
        with _reasons(str(file)), Image.open(file) as image:
            return getattr(image, "n_frames", 1) if file.suffix.lower() in _SCANS else 1

    @contextmanager
    def _pdf(self, file: Path, where: str) -> Iterator[pypdfium2.PdfDocument]:
        with _PDFIUM:
            try:
                pdf = pypdfium2.PdfDocument(file, password=self.password)
            except pypdfium2.PdfiumError as error:
                if error.err_code == FPDF_ERR_PASSWORD:
                    given = "none was given" if self.password is None else "the given one is wrong"
                    raise ValueError(f"{file} is protected by a password, and {given}") from error
                raise ValueError(f"{file} cannot be read as a PDF: {error}") from error
            except Exception as error:
                raise ValueError(f"{where} cannot be read: {reason_of(error)}") from error
            try:
                with _reasons(where):
                    pdf.init_forms()  # else the fields of a filled form stay empty
                yield pdf
            finally:
                pdf.close()

    def _drawn(self, pdf: pypdfium2.PdfDocument, number: int) -> Image.Image:
        page = pdf[number - 1]
        scale = self.dpi / _POINTS_PER_INCH
        width, height = (round(side * scale) for side in page.get_size())
        rule = f"at most {MAX_PIXELS} pixels; take a lower dpi"
        require(width * height <= MAX_PIXELS, "size of the page", rule, f"{width} x {height}")
        return _on_white(page.render(scale=scale).to_pil())


def name_of(file: str | Path, number: int | None) -> str:
    """What messages call a page; None is the whole document."""
    return str(file) if number is None else f"{file}, page {number}"


def find_files(
    paths: Sequence[str | Path], suffixes: Sequence[str], *, recursive: bool = False
) -> dict[Path, str]:
    """The documents of files and folders.

    Args:
        paths: Files, which must have one of the suffixes, and folders, of which those files are
            taken that have one and whose names do not begin with a dot. Folders are sorted with
            numbers in their order: ``page2`` before ``page10``.
        suffixes: `DOCUMENTS` or `PICTURES`.
        recursive: Also look into the folders of folders.

    Returns:
        File to its name relative to the folder in which it was found.

    Raises:
        ValueError: If a path does not exist or is of another kind, a file comes twice, or there
            is none.
    """
    found: dict[Path, str] = {}
    for path in map(Path, paths):
        for file in _files_of(path, suffixes, recursive):
            require(file not in found, "documents", "different files", str(file))
            found[file] = str(file.relative_to(path)) if path.is_dir() else file.name
    known = ", ".join(suffixes)
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no files with {known}")
    return found


def _files_of(path: Path, suffixes: Sequence[str], recursive: bool) -> list[Path]:
    if path.is_dir():
        inside = path.rglob("*") if recursive else path.iterdir()
        files = [file for file in inside if file.suffix.lower() in suffixes and file.is_file()]
        shown = [file for file in files if not _is_hidden(file.relative_to(path))]
        return sorted(shown, key=lambda file: _natural(str(file)))
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} is of another kind; known: {', '.join(suffixes)}")
    return [path]


def page_ranges(text: str) -> list[range]:
    """Pages such as ``1-3,7,10-``, which counts from 1 and may be open at its end.

    Raises:
        ValueError: If it is written otherwise or goes backwards.
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:(-)\s*(\d{1,9})?)?\s*", part)
        first = int(match[1]) if match else 0
        last = _last(match, first) if match else 0
        require(1 <= first <= last, "pages", "like 1-3,7,10- and count from 1", text)
        ranges.append(range(first, last + 1))
    return ranges


def _last(match: re.Match[str], first: int) -> int:
    if match[2] is None:
        return first
    return 10**9 if match[3] is None else int(match[3])


def _is_pdf(file: Path) -> bool:
    return file.suffix.lower() == ".pdf"


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


@contextmanager
def _reasons(where: str) -> Iterator[None]:
    """Names the page. Decoders of broken data raise errors of many kinds."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{where} cannot be read: {reason_of(error)}") from error


def _text_layer(pdf: pypdfium2.PdfDocument, number: int) -> str | None:
    """The text in the order of the file, which is the reading order of most producers."""
    text = pdf[number - 1].get_textpage().get_text_bounded()
    joined = _HYPHENS.sub("-", text.replace("\r\n", "\n")).strip()
    return joined or None


def _picture(file: Path, number: int) -> Image.Image:
    with Image.open(file) as image:
        if number > 1:
            image.seek(number - 1)
        return _on_white(ImageOps.exif_transpose(image))


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow cuts 16 bits off at 255 where they have to be scaled.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    drawn = image.convert("RGBA")
    paper = Image.new("RGBA", drawn.size, "white")
    return Image.alpha_composite(paper, drawn).convert("RGB")
