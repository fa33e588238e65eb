"""Video files: mp4, gif, webp, or a folder of PNG; written as the pictures come.

Every picture is encoded and forgotten, so memory does not grow with the video. Pillow writes an
animation only when it has all of its pictures; here it encodes them one by one, and the containers
of GIF and WebP are written around them. mp4 is encoded by the ffmpeg of the package imageio-ffmpeg.

| format | pictures |
|---|---|
| frames | bit for bit |
| webp | bit for bit |
| gif | 256 colours, chosen for each picture |
| mp4 | H.264 at CRF 12, BT.709, colours at half the resolution (4:2:0) as players want it |
"""

import io
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from PIL.GifImagePlugin import getdata
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mmspec.checks import is_integer, is_list, is_number, require, require_known
from mmspec.pictures import read_png_metadata
from mmspec.whole_file import whole_file, whole_folder

FORMATS = ("mp4", "gif", "webp", "frames")
#: Pictures a second at most: the shortest time of a GIF is 1/50 s in every browser, and times of a
#: WebP are whole milliseconds.
MAX_FPS = {"gif": 50, "webp": 1000, "mp4": 1000, "frames": 1000}
#: Of a side: a GIF has 16 bits for it, a picture of a WebP 14.
MAX_SIDE = {"gif": 65_535, "webp": 16_383, "mp4": 16_384, "frames": 65_535}

_FRAME = "frame-{:05d}.png"
#: Name of the text that says how a video was made, in PNG and mp4.
_COMMENT = "comment"
_EXIF_DESCRIPTION = 0x010E
# The flags: round to nearest, and average the colours of four pixels. Players go by the tags.
_FILTER = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int+area,"
    "setparams=color_primaries=bt709:color_trc=bt709"
)
_H264 = (
    *("-an", "-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p"),
    *("-movflags", "+faststart", "-f", "mp4"),
)


class _Encoder(Protocol):
    def add(self, picture_HW3: np.ndarray) -> None: ...

    def end(self) -> None: ...

    def abandon(self) -> None: ...


class VideoFile:
    """A video that is being written; made by `open_video`.

    Attributes:
        num_frames: Pictures so far.
    """

    def __init__(self, building: Path, kind: str, fps: float, scale: int, text: str) -> None:
        """Writes nothing before the first picture.

        Args:
            building: The file or folder to write to.
            kind: One of `FORMATS`.
            fps: Pictures a second.
            scale: Enlargement, a whole number.
            text: How the video was made; empty is nothing.
        """
        self._building = building
        self._kind = kind
        self._fps = fps
        self._scale = scale
        self._text = text
        self._encoder: _Encoder | None = None
        self._sides: tuple[int, int] | None = None
        self.num_frames = 0

    def add(self, frames: Any) -> None:
        """Writes pictures.

        Args:
            frames: Of one video, as `VideoBlock.frames` has them: a tensor ``[F, 3, H, W]`` or an
                array ``[F, H, W, 3]`` in [0, 1], or a list of PIL images.

        Raises:
            ValueError: If they are something else, or of another size than those before.
            OSError: If they cannot be written.
        """
        for picture in as_bytes(frames):
            large = picture.repeat(self._scale, 0).repeat(self._scale, 1)
            sides = (large.shape[0], large.shape[1])
            if self._encoder is None:
                check_sides(self._kind, *sides)
                self._sides = sides
                self._encoder = self._begun(*sides)
            require(
                sides == self._sides, "pictures of a video", f"of one size, {self._sides}", sides
            )
            self._encoder.add(np.ascontiguousarray(large))
            self.num_frames += 1

    def end(self) -> None:
        """Writes what stands behind the last picture.

        Raises:
            ValueError: If there was no picture.
            OSError: If it cannot be written.
        """
        if self._encoder is None:
            raise ValueError("a video needs at least one picture")
        self._encoder.end()
        self._encoder = None

    def abandon(self) -> None:
        """Lets go of the file."""
        if self._encoder is not None:
            self._encoder.abandon()

    def _begun(self, height: int, width: int) -> _Encoder:
        if self._kind == "frames":
            return _Frames(self._building, self._text)
        kinds: dict[str, type[_Mp4 | _Gif | _Webp]] = {"mp4": _Mp4, "gif": _Gif, "webp": _Webp}
        return kinds[self._kind](self._building, height, width, self._fps, self._text)


@contextmanager
def open_video(
    path: str | Path,
    *,
    fps: float,
    scale: int = 1,
    metadata: Mapping[str, Any] | None = None,
) -> Iterator[VideoFile]:
    """A video file to add pictures to; it appears whole at the end of the block, or not at all.

    Example:
        >>> with open_video("cat.mp4", fps=16) as file:  # doctest: +SKIP
        ...     for block in pipe.stream("a cat on a lawn"):
        ...         file.add(block.frames[0])

    Args:
        path: Its ending is the format: .mp4, .gif, .webp. A name without an ending is a folder of
            PNG files, which must not be there or be empty.
        fps: Pictures a second; a folder has none.
        scale: Enlarge by a whole number, keeping pixels square.
        metadata: How the video was made: anything that JSON holds. See `read_video_metadata`.

    Raises:
        ValueError: If the ending is unknown or a number is out of its range.
        ImportError: If mp4 is asked for without the package imageio-ffmpeg.
        OSError: If it cannot be written to. All of this comes before the first picture.
    """
    path = Path(path)
    kind = video_format(path)
    check_format(kind, fps, scale)
    text = json.dumps(dict(metadata)) if metadata else ""
    with whole_folder(path) if kind == "frames" else whole_file(path) as building:
        if kind != "frames":
            building.touch()
        file = VideoFile(building, kind, fps, scale, text)
        try:
            yield file
            file.end()
        finally:
            file.abandon()


def save_video(
    frames: Any,
    path: str | Path,
    *,
    fps: float,
    scale: int = 1,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a whole video; arguments and errors as in `VideoFile.add` and `open_video`.

    Example:
        >>> save_video(out.frames[0], "cat.webp", fps=16)  # doctest: +SKIP
    """
    with open_video(path, fps=fps, scale=scale, metadata=metadata) as file:
        file.add(frames)


def video_format(path: str | Path) -> str:
    """The format that a name asks for.

    Raises:
        ValueError: If the ending is unknown.
    """
    ending = Path(path).suffix.lower()
    known = [f".{name}" for name in FORMATS[:-1]]
    rule = f"{', '.join(known)}, or none for a folder of PNG files"
    require(ending in ("", *known), f"the ending of {str(path)!r}", rule, ending)
    return ending[1:] or "frames"


def check_format(kind: str, fps: float, scale: int) -> None:
    """Refuses what cannot be written.

    Raises:
        ValueError: If the format is unknown or a number is out of its range.
        ImportError: If mp4 is asked for without the package imageio-ffmpeg.
    """
    require_known("format", kind, FORMATS)
    most = MAX_FPS[kind]
    require(
        is_number(fps) and 0 < fps <= most, "fps", f"above 0 and at most {most} for {kind}", fps
    )
    require(is_integer(scale) and scale >= 1, "scale", "an integer >= 1", scale)
    if kind == "mp4":
        _ffmpeg()


def check_sides(kind: str, height: int, width: int) -> None:
    """Refuses pictures that a format cannot hold; sides are those that are written.

    Raises:
        ValueError: With the sides.
    """
    sides, most = (height, width), MAX_SIDE[kind]
    require(max(sides) <= most, f"the sides for {kind}", f"at most {most} pixels", sides)
    is_good = kind != "mp4" or not (height % 2 or width % 2)
    rule = "even, for its colours have half the resolution (scale=2 makes them even)"
    require(is_good, "the sides for mp4", rule, sides)


def read_video_metadata(path: str | Path) -> dict[str, Any] | None:
    """Reads how a video was made.

    Args:
        path: A file or folder that `open_video` has written.

    Returns:
        Its metadata; None if there is no such video or it does not say.

    Raises:
        ValueError: If the ending is unknown.
        ImportError: If it is an mp4 and the package imageio-ffmpeg is missing.
    """
    path = Path(path)
    kind = video_format(path)
    try:
        found = json.loads(_COMMENT_OF[kind](path))
    except (OSError, ValueError, SyntaxError):
        return None
    return found if isinstance(found, dict) else None


def as_bytes(frames: Any) -> Iterator[np.ndarray]:
    """Pictures ``[H, W, 3]`` in uint8, rounded as diffusers rounds for PIL.

    Args:
        frames: As `VideoFile.add` takes them.

    Raises:
        ValueError: If they are no pictures.
    """
    if is_list(frames, lambda one: isinstance(one, Image.Image)):
        yield from (np.asarray(image.convert("RGB")) for image in frames)
        return
    array = frames
    if isinstance(frames, Tensor) and frames.ndim == 4:
        array = frames.permute(0, 2, 3, 1).float().cpu().numpy()
    is_good = isinstance(array, np.ndarray) and array.ndim == 4 and array.shape[3] == 3
    got = tuple(frames.shape) if hasattr(frames, "shape") else type(frames).__name__
    rule = "a tensor [F, 3, H, W], an array [F, H, W, 3] or a list of PIL images"
    require(is_good, "frames", rule, got)
    for picture in array:
        low, high = float(picture.min()), float(picture.max())
        # False too for NaN.
        is_good = picture.dtype.kind == "f" and 0 <= low <= high <= 1
        require(is_good, "frames", "floats in [0, 1]", (str(picture.dtype), low, high))
        yield (picture * 255).round().astype(np.uint8)


def _times(fps: float, per_second: int) -> Iterator[int]:
    """How long each picture is shown, in whole parts of a second that add up as they should."""
    number, before = 0, 0
    while True:
        number += 1
        now = round(number * per_second / fps)
        yield now - before
        before = now


class _Frames:
    """PNG files."""

    def __init__(self, folder: Path, text: str) -> None:
        self._folder = folder
        self._number = 0
        self._chunks = PngInfo()
        if text:
            self._chunks.add_text(_COMMENT, text)

    def add(self, picture_HW3: np.ndarray) -> None:
        path = self._folder / _FRAME.format(self._number)
        Image.fromarray(picture_HW3).save(path, format="PNG", pnginfo=self._chunks)
        self._number += 1

    def end(self) -> None:
        """Nothing: the files are there."""

    def abandon(self) -> None:
        """Nothing is open."""


class _Gif:
    """Pictures with a palette of their own each (GIF89a; the loop is Netscape's extension)."""

    def __init__(self, path: Path, height: int, width: int, fps: float, text: str) -> None:
        self._file = path.open("wb")
        self._times = _times(fps, 100)
        sides = width.to_bytes(2, "little") + height.to_bytes(2, "little")
        self._file.write(b"GIF89a" + sides + bytes(3))
        self._file.write(b"!\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")
        if text:
            content = text.encode()
            pieces = [content[start : start + 255] for start in range(0, len(content), 255)]
            blocks = b"".join(bytes([len(piece)]) + piece for piece in pieces)
            self._file.write(b"!\xfe" + blocks + b"\x00")

    def add(self, picture_HW3: np.ndarray) -> None:
        image = Image.fromarray(picture_HW3).quantize(256, kmeans=1)
        milliseconds = 10 * next(self._times)
        self._file.writelines(getdata(image, duration=milliseconds, include_color_table=True))

    def end(self) -> None:
        self._file.write(b";")
        self._file.close()

    def abandon(self) -> None:
        self._file.close()


class _Webp:
    """Lossless pictures in a RIFF container (RFC 9649, section 2.7)."""

    def __init__(self, path: Path, height: int, width: int, fps: float, text: str) -> None:
        self._file = path.open("wb")
        self._times = _times(fps, 1000)
        self._text = text
        self._sides = _three_bytes(width - 1) + _three_bytes(height - 1)
        flags = 0b10 | (0b1000 if text else 0)  # an animation; EXIF
        self._file.write(b"RIFF" + bytes(4) + b"WEBP")
        self._write(b"VP8X", bytes([flags, 0, 0, 0]) + self._sides)
        self._write(b"ANIM", bytes([0, 0, 0, 255, 0, 0]))  # background; again and again

    def add(self, picture_HW3: np.ndarray) -> None:
        buffer = io.BytesIO()
        Image.fromarray(picture_HW3).save(buffer, "WEBP", lossless=True)
        single = buffer.getvalue()[12:]  # what stands behind RIFF, size, WEBP: one chunk
        place = bytes(6) + self._sides
        over = bytes([0b10])  # replaces what was there
        self._write(b"ANMF", place + _three_bytes(next(self._times)) + over + single)

    def end(self) -> None:
        if self._text:
            exif = Image.Exif()
            exif[_EXIF_DESCRIPTION] = self._text
            self._write(b"EXIF", exif.tobytes().removeprefix(b"Exif\x00\x00"))
        size = self._file.tell() - 8
        self._file.seek(4)
        self._file.write(size.to_bytes(4, "little"))
        self._file.close()

    def abandon(self) -> None:
        self._file.close()

    def _write(self, name: bytes, content: bytes) -> None:
        padding = bytes(len(content) % 2)
        size = self._file.tell() + 8 + len(content) + len(padding)
        require(size < 2**32, "the size of a webp", "below 4 GB", size)
        self._file.write(name + len(content).to_bytes(4, "little") + content + padding)


def _three_bytes(value: int) -> bytes:
    return value.to_bytes(3, "little")


class _Mp4:
    """A pipe into ffmpeg."""

    def __init__(self, path: Path, height: int, width: int, fps: float, text: str) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        rate = str(Fraction(fps).limit_denominator(100_000))
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate]
        comment = ["-metadata", f"{_COMMENT}={text}"] if text else []
        command = [_ffmpeg(), "-v", "error", "-y", *raw, "-i", "-", "-vf", _FILTER, *_H264]
        self._process = subprocess.Popen(
            [*command, *comment, str(path)], stdin=subprocess.PIPE, stderr=self._said
        )

    def add(self, picture_HW3: np.ndarray) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(picture_HW3.data)
        except OSError:  # it has ended, and says why
            self.end()
            raise

    def end(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        code = self._process.wait()
        if code:
            self._said.seek(0)
            said = self._said.read().decode("utf-8", "replace").strip().splitlines()
            raise OSError(f"ffmpeg could not write the video: {said[-1] if said else code}")
        self._said.close()

    def abandon(self) -> None:
        self._process.kill()
        with suppress(OSError):
            self._process.communicate()
        self._said.close()


def _ffmpeg() -> str:
    """The program.

    Raises:
        ImportError: With how to install it.
    """
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return str(get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            "mp4 files need the package imageio-ffmpeg: pip install 'mmspec[video]', "
            "or write gif, webp or frames"
        ) from error


def _comment_of_folder(path: Path) -> str:
    return (read_png_metadata(path / _FRAME.format(0)) or {}).get(_COMMENT, "")


def _comment_of_gif(path: Path) -> str:
    with Image.open(path, formats=["GIF"]) as image:
        return bytes(image.info.get("comment", b"")).decode("utf-8")


def _comment_of_webp(path: Path) -> str:
    with Image.open(path, formats=["WEBP"]) as image:
        return str(image.getexif().get(_EXIF_DESCRIPTION, ""))


def _comment_of_mp4(path: Path) -> str:
    command = [_ffmpeg(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    said = subprocess.run(command, capture_output=True, check=False).stdout.decode("utf-8")
    found = re.search(rf"^{_COMMENT}=((?:\\.|[^\\\n])*)$", said, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\\(.)", r"\1", found[1], flags=re.DOTALL) if found else ""


_COMMENT_OF = {
    "frames": _comment_of_folder,
    "gif": _comment_of_gif,
    "webp": _comment_of_webp,
    "mp4": _comment_of_mp4,
}
