"""What a job over pages has done so far: records in a JSONL file, one for each page.

Records are appended as they come and are on the disk before the next batch begins. The last record
of a page counts, so a page can be done again. At the end the file is brought into the order of the
input.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from mmspec.jobs import check_writable, cut_half_line, stored_rows
from mmspec.whole_file import whole_file

#: File and page; None is a file that could not be opened.
Key = tuple[str, int | None]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a record is, and what is asked of it often.

    Attributes:
        start: Its first byte in the file.
        digest: That of the file's content when the page was done.
        has_failed: Its page has a reason instead of a text.
    """

    start: int
    digest: str
    has_failed: bool


class Journal:
    """Records by file and page.

    Attributes:
        path: The file, or None for one that vanishes.
        entries: Of each page the last record, in no order.
    """

    def __init__(
        self, path: Path | None, settings: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        """Reads what is there, and cuts off a last line that a kill left half-written.

        Args:
            path: JSONL; its folder is made if needed. None keeps the records for this run only.
            settings: What the records of this run are made with; written into each.
            overwrite: Begin anew; what is there stays until the first record comes.

        Raises:
            ValueError: If a record was made with other settings.
            OSError: If the file cannot be written.
        """
        self.path = path
        self.entries: dict[Key, Entry] = {}
        self._settings = dict(settings)
        self._num_lines = 0
        self._end = 0
        if path is None:
            self._file = cast(BinaryIO, tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
        else:
            self._file = self._opened(path, overwrite)

    def _opened(self, path: Path, overwrite: bool) -> BinaryIO:
        check_writable(path.parent)
        self.entries, self._num_lines = {}, 0
        try:
            if not overwrite:
                for start, record in stored_rows(path, self._settings, "file"):
                    self._note(record, start)
                cut_half_line(path)
            # Without a buffer nothing is left behind that a full disk would refuse once more.
            file = cast(BinaryIO, path.open("a+b", buffering=0))
        except OSError as error:
            raise OSError(f"cannot write to {path}: {error.strerror}") from error
        self._end = 0 if overwrite else file.seek(0, os.SEEK_END)
        return file

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, key: Key) -> dict[str, Any] | None:
        """Reads the record of a page."""
        entry = self.entries.get(key)
        return None if entry is None else cast(dict[str, Any], json.loads(self._line(entry.start)))

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends records.

        Raises:
            OSError: If they cannot be written; the file then ends with the last whole batch.
        """
        lines = []
        for record in records:
            text = json.dumps({**record, "settings": self._settings}, ensure_ascii=False)
            # What a file name may have and UTF-8 does not becomes an escape of JSON.
            lines.append((text + "\n").encode("utf-8", "backslashreplace"))
        self._append(b"".join(lines))
        for record, line in zip(records, lines, strict=True):
            self._note(record, self._end)
            self._end += len(line)

    def sort(self, keys: Sequence[Key], is_stale: Callable[[Key, Entry], bool]) -> None:
        """Brings the file into the order of the input, unless it is in that order already.

        Args:
            keys: The pages of this run in their order. Records of other pages stand before them.
            is_stale: Which records to drop.

        Raises:
            OSError: If the new file cannot be written; the old one is kept.
        """
        if self.path is None:
            return
        rank = {key: place for place, key in enumerate(keys)}
        kept = [key for key, entry in self.entries.items() if not is_stale(key, entry)]
        kept.sort(key=lambda key: (rank.get(key, -1), self.entries[key].start))
        starts = [self.entries[key].start for key in kept]
        if len(starts) == self._num_lines and starts == sorted(starts):
            return
        try:
            with whole_file(self.path) as building, building.open("wb") as file:
                file.writelines(self._lines(starts))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"cannot write to {self.path}: {error.strerror}") from error
        self._file.close()
        self._file = self._opened(self.path, overwrite=False)

    def _note(self, record: Mapping[str, Any], start: int) -> None:
        has_failed = record.get("error") is not None
        key = (str(record["file"]), record.get("page"))
        self.entries[key] = Entry(start, str(record.get("digest")), has_failed)
        self._num_lines += 1

    def _append(self, content: bytes) -> None:
        rest = memoryview(content)
        try:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise OSError(
                f"cannot write to {self.path}: {error.strerror}; what was finished is kept"
            ) from error

    def _lines(self, starts: Sequence[int]) -> Iterator[bytes]:
        return (self._line(start) for start in starts)

    def _line(self, start: int) -> bytes:
        self._file.seek(start)
        pieces = []
        while True:
            piece = self._file.read(1 << 14)
            pieces.append(piece.split(b"\n", 1)[0])
            if not piece or b"\n" in piece:
                return b"".join(pieces) + b"\n"
