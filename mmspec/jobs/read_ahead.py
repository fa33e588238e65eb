"""Pages that are drawn in a thread, while the model writes those before them."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice

from mmspec.documents import Sheet
from mmspec.jobs.journal import Key
from mmspec.jobs.pages import PageTask

Read = Callable[[PageTask], Sheet]
_Sheets = dict[Key, Future[Sheet]]


def read_ahead(
    read: Read, batches: Sequence[Sequence[PageTask]], num_batches: int
) -> Generator[tuple[Sequence[PageTask], Read], None, None]:
    """Reads the pages of batches in their order, some batches ahead.

    Args:
        read: Reads a page.
        batches: Of pages.
        num_batches: Batches that are read ahead of the one that was given out last.

    Yields:
        A batch, and what gives each of its pages once, or raises what `read` has raised. Closing
        the generator waits for the page that is being read, and reads no more.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="mmspec-read")
    coming = iter(batches)
    begun: deque[tuple[Sequence[PageTask], _Sheets]] = deque()
    try:
        while True:
            for batch in islice(coming, num_batches + 1 - len(begun)):
                begun.append((batch, {task.key: pool.submit(read, task) for task in batch}))
            if not begun:
                return
            batch, sheets = begun.popleft()
            yield batch, partial(_taken, sheets)
    finally:
        pool.shutdown(cancel_futures=True)


def _taken(sheets: _Sheets, task: PageTask) -> Sheet:
    """A page, which is not kept for longer than it is needed."""
    return sheets.pop(task.key).result()
