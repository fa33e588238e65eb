"""Reading ahead: in order, only so far, and with nothing left behind."""

import threading
import time

import pytest
from PIL import Image

from mmspec.documents import Sheet
from mmspec.jobs.pages import PageTask
from mmspec.jobs.read_ahead import read_ahead

TASKS = [PageTask(file=f"p{number}.png", page=1) for number in range(9)]
BATCHES = [TASKS[first : first + 2] for first in range(0, 9, 2)]


class Drawer:
    """Draws pages whose size is their number; one of them cannot be drawn."""

    def __init__(self, bad=None):
        self.begun = []
        self.bad = bad

    def __call__(self, task):
        self.begun.append(task)
        if task.file == self.bad:
            raise ValueError(f"{task} is bad")
        return Sheet(image=Image.new("L", (int(task.file[1]) + 1, 1)))


def settled(begun, count):
    """Whether so many pages are begun soon, and no more a moment later."""
    deadline = time.monotonic() + 5
    while len(begun) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    return len(begun) == count


@pytest.mark.parametrize("num_batches", [0, 1, 2])
def test_pages_come_in_order_and_only_so_many_are_read_ahead(num_batches):
    draw = Drawer()
    for number, (batch, sheet_of) in enumerate(read_ahead(draw, BATCHES, num_batches)):
        assert batch == BATCHES[number]
        assert settled(draw.begun, min(2 * (number + 1 + num_batches), 9))
        widths = [sheet_of(task).image.width - 1 for task in batch]
        assert widths == [TASKS.index(task) for task in batch]
    assert draw.begun == TASKS


def test_a_bad_page_raises_when_it_is_its_turn():
    told = []
    for batch, sheet_of in read_ahead(Drawer("p3.png"), BATCHES, 2):
        for task in batch:
            try:
                told.append(sheet_of(task).image.width - 1)
            except ValueError as error:
                told.append(str(error))
    assert told == [0, 1, 2, "p3.png, page 1 is bad", 4, 5, 6, 7, 8]


def test_closing_waits_for_what_is_being_read_and_reads_no_more():
    draw, gate = Drawer(), threading.Event()

    def slow(task):
        gate.wait(5)
        return draw(task)

    coming = read_ahead(slow, BATCHES, 3)
    next(coming)
    threading.Timer(0.05, gate.set).start()
    coming.close()
    assert draw.begun == TASKS[:1]
    assert not [one for one in threading.enumerate() if one.name.startswith("mmspec-read")]
