"""OCR part by part: the same tokens whenever a part comes, and none is read for nothing."""

import itertools
import threading
import time

import pytest
import torch
from PIL import Image
from vlm_processors import loaded_vlm

import mmspec.ocr_reading as ocr_reading
from mmspec.bench.document import garbled
from mmspec.ocr import PageText
from mmspec.ocr_parts import cuts_of
from mmspec.ocr_reading import OcrReader
from mmspec.pipelines import SpeculativeDocumentPipeline

NUM_TOKENS = 96
NEVER = 10**6
UNLIKE = "tesserocr's text did not agree with the page"


def page(seed):
    """Twelve lines of noise."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.full((192, 96, 3), 255, dtype=torch.uint8)
    for top in range(4, 192, 16):
        values[top : top + 9] = torch.randint(0, 256, (9, 96, 3), generator=generator)
    return Image.fromarray(values.numpy())


#: The second one's text is short.
PAGES = [page(0), page(1), page(4)]


def crops(image):
    edges = cuts_of(image).edges
    assert len(edges) == 4
    return [image.crop((0, top, image.width, bottom)) for top, bottom in itertools.pairwise(edges)]


def thirds(text):
    return [text[:26], text[26:52], text[52:]]


class Engine:
    """Finds the text of each part of some pages when it is told to."""

    def __init__(self, pages, texts):
        self.parts = [
            (number, part, crop.tobytes(), text)
            for number, (image, text) in enumerate(zip(pages, texts, strict=True))
            for part, (crop, text) in enumerate(zip(crops(image), thirds(text), strict=True))
        ]
        self.texts = {(number, part): text for number, part, _, text in self.parts}
        self.gates = {place: threading.Event() for place in self.texts}
        self.begun = []

    def __call__(self, image, pitch):
        assert pitch == 16
        [place] = [(n, part) for n, part, content, _ in self.parts if content == image.tobytes()]
        self.begun.append(place)
        assert self.gates[place].wait(60)
        if isinstance(self.texts[place], Exception):
            raise self.texts[place]
        return PageText(self.texts[place])

    def open(self, *places):
        for place in places or self.gates:
            self.gates[place].set()

    def close(self):
        self.begun.clear()
        for gate in self.gates.values():
            gate.clear()

    def spoil(self, number):
        for part in range(3):
            self.texts[number, part] = garbled(self.texts[number, part], 0.9)


@pytest.fixture(scope="module")
def loaded():
    return loaded_vlm("idefics3")


@pytest.fixture(scope="module")
def plain(loaded):
    pipe = SpeculativeDocumentPipeline.from_model(*loaded)
    pages = read(pipe, PAGES, decoder="sequential", ocr=None).pages
    assert [len(one.tokens) for one in pages] == [NUM_TOKENS, 75, NUM_TOKENS]
    return pages


@pytest.fixture
def engine(plain, monkeypatch):
    engine = Engine(PAGES, [one.text for one in plain])
    monkeypatch.setattr(ocr_reading, "open_engine", lambda name: engine)
    yield engine
    engine.open()


@pytest.fixture
def pipe(loaded, engine):
    pipe = SpeculativeDocumentPipeline.from_model(*loaded, schedule="fixed")
    yield pipe
    engine.open()
    pipe.stop_reading(wait=True)
    assert not [one for one in threading.enumerate() if one.name.startswith("mmspec-ocr")]


def read(pipe, pages, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(pages, **({"max_new_tokens": NUM_TOKENS, "store": False} | options))


def tokens_of(pages):
    return [one.tokens.tolist() for one in pages]


def settled(reading, part):
    """Waits until a part was read, or may not be read."""
    changed = reading._reader.changed
    with changed:
        assert changed.wait_for(
            lambda: reading._num_read > part or not (reading.is_busy or reading.is_ready), 60
        )


def trust(pipe, num_threads=1):
    """As if a page had agreed."""
    pipe._ocr_reader("tesserocr", num_threads).is_trusted = True


def read_when(pipe, engine, arrivals, **options):
    """Reads pages as a batch whose parts come before a step each: 0 is before the call."""
    pages = PAGES[: len(arrivals)]
    engine.close()
    trust(pipe, len(pages))
    readings = [pipe.read_ahead(one, ocr="tesserocr", ocr_workers=len(pages)) for one in pages]

    def arrive(num_steps):
        for number, (reading, steps) in enumerate(zip(readings, arrivals, strict=True)):
            for part, step in enumerate(steps):
                if step == num_steps:
                    engine.open((number, part))
                    settled(reading, part)

    arrive(0)
    steps = iter(range(1, NUM_TOKENS + 2))
    out = read(
        pipe,
        pages,
        references=readings,
        batch_size=len(pages),
        callback_on_step_end=lambda *_: arrive(next(steps)),
        **options,
    )
    engine.open()
    for reading in readings:
        reading.wait()
    return out


def test_whenever_a_part_comes_the_tokens_are_those_of_plain_decoding(pipe, engine, plain):
    whole = "\n".join(thirds(plain[0].text))
    there = read(pipe, PAGES[:1], ocr=None, references=whole)
    alone = read(pipe, PAGES[:1], ocr=None)
    forwards = []
    for steps in ((0, 0, 0), (0, 1, 9), (0, 9, 20), (9, 15, 40), (9, NEVER, NEVER), (NEVER,) * 3):
        out = read_when(pipe, engine, [steps])
        assert tokens_of(out.pages) == tokens_of(plain[:1])
        told = out.pages[0]
        has_text = steps[0] < NEVER
        assert told.reference == ("tesserocr" if has_text else "none")
        assert (told.sources.get("reference", 0) > 0) is has_text
        late = "tesserocr came too late: the page was complete"
        assert told.error == (None if has_text else late)
        assert told.ocr_time_s > 0.0 == told.ocr_wait_s
        forwards.append(out.stats.num_target_forwards)
    assert forwards[0] == there.stats.num_target_forwards
    assert forwards[-1] == alone.stats.num_target_forwards
    # Parts that are there are drafted from before the page is read.
    assert forwards[1] <= forwards[0]
    assert forwards[1] < forwards[3] < forwards[4] < forwards[5]


def test_a_page_of_which_the_model_writes_something_else_is_not_read_on(pipe, engine, plain):
    engine.spoil(0)
    engine.open()
    out = read(pipe, PAGES[:1], ocr="tesserocr")
    assert tokens_of(out.pages) == tokens_of(plain[:1])
    assert (out.pages[0].reference, out.pages[0].error) == ("tesserocr", UNLIKE)
    assert engine.begun == [(0, 0)]
    # Nor is more than the first part of other pages read ahead, until one agrees.
    engine.close()
    engine.open()
    readings = [pipe.read_ahead(one, ocr="tesserocr") for one in PAGES[1:]]
    for reading in readings:
        settled(reading, 0)
    assert engine.begun == [(1, 0), (2, 0)]
    out = read(pipe, PAGES[1:], references=readings)
    assert tokens_of(out.pages) == tokens_of(plain[1:])
    assert [one.error for one in out.pages] == [None, None]
    assert sorted(engine.begun) == [(n, part) for n in (1, 2) for part in range(3)]


def test_a_page_that_was_read_ahead_is_judged_too(pipe, engine, plain):
    for part in range(3):
        engine.texts[0, part] = "qqvw wvvq"
    engine.open()
    trust(pipe)
    reading = pipe.read_ahead(PAGES[0], ocr="tesserocr")
    for part in range(3):
        settled(reading, part)
    out = read(pipe, PAGES[:1], references=[reading])
    assert tokens_of(out.pages) == tokens_of(plain[:1])
    assert (out.pages[0].reference, out.pages[0].error) == ("tesserocr", None)
    settled(pipe.read_ahead(PAGES[1], ocr="tesserocr"), 1)
    assert engine.begun == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_what_was_read_before_a_failure_is_used(pipe, engine, plain):
    engine.texts[0, 1] = RuntimeError("torn")
    engine.open()
    alone = read(pipe, PAGES[:1], ocr=None)
    for steps in ((0, 1, NEVER), (0, 0, NEVER), (9, 10, NEVER)):
        out = read_when(pipe, engine, [steps])
        assert tokens_of(out.pages) == tokens_of(plain[:1])
        assert out.pages[0].reference == "tesserocr"
        assert out.pages[0].error == "tesserocr failed: torn"
        assert out.stats.num_target_forwards < alone.stats.num_target_forwards
        assert (0, 2) not in engine.begun


@pytest.mark.parametrize("schedule", ["fixed", "adaptive"])
def test_parts_of_a_batch_come_one_by_one(pipe, engine, plain, schedule):
    pipe.reader.schedule = schedule
    engine.spoil(1)
    engine.texts[2, 1] = RuntimeError("torn")
    out = read_when(pipe, engine, [(3, 9, 20), (0, 1, 2), (1, 4, NEVER)])
    assert tokens_of(out.pages) == tokens_of(plain)
    assert out.pages[0].error is None
    assert out.pages[2].error in (None, "tesserocr failed: torn")
    again = read_when(pipe, engine, [(NEVER,) * 3, (9, 9, 9), (0, 30, NEVER)])
    assert tokens_of(again.pages) == tokens_of(plain)
    assert again.pages[1].error in (None, UNLIKE)


def test_a_seed_gives_the_same_tokens_whenever_a_part_comes(pipe, engine):
    options = {"temperature": 1.0, "top_k": 20}
    seeds = lambda: [torch.Generator().manual_seed(seed) for seed in range(2)]  # noqa: E731
    sampled = read(pipe, PAGES[:2], ocr=None, decoder="sequential", generator=seeds(), **options)
    out = read_when(pipe, engine, [(0, 3, 8), (5, 6, 30)], generator=seeds(), **options)
    assert tokens_of(out.pages) == tokens_of(sampled.pages)


def test_who_waits_gets_the_whole_page_whatever_is_on_it(pipe, engine, plain):
    engine.spoil(1)
    engine.open()
    runs = [read(pipe, PAGES, ocr="tesserocr", ocr_wait=True, batch_size=3) for _ in range(2)]
    for out in runs:
        assert tokens_of(out.pages) == tokens_of(plain)
        assert [one.error for one in out.pages] == [None] * 3
    assert runs[0].stats.num_target_forwards == runs[1].stats.num_target_forwards
    assert [one.sources for one in runs[0].pages] == [one.sources for one in runs[1].pages]
    assert len(engine.begun) == 18


def test_a_call_that_is_stopped_gives_up_the_parts_that_are_left(pipe, engine):
    engine.open((0, 0))
    steps = iter(range(NUM_TOKENS))
    out = read(pipe, PAGES, ocr="tesserocr", callback_on_step_end=lambda *_: next(steps) == 30)
    assert out.interrupted
    engine.open()
    pipe.stop_reading(wait=True)
    assert len(engine.begun) == 2


# --------------------------------------------------------------------------- the order of parts


@pytest.fixture
def reader(engine):
    reader = OcrReader("tesserocr")
    reader.is_trusted = True
    yield reader
    engine.open()
    reader.stop(wait=True)


def test_parts_of_pages_at_work_come_first_and_those_read_ahead_page_by_page(reader, engine):
    readings = [reader.begin(image) for image in PAGES]
    while not engine.begun:
        time.sleep(0.001)
    for reading in readings[1:]:
        reading.attend()
    for reading in readings[1:]:
        reading.judge(True)
    engine.open()
    for reading in readings[::-1]:
        assert reading.wait().is_final
    # The first was begun before any page was at work.
    at_work = [(1, 0), (2, 0), (1, 1), (2, 1), (1, 2), (2, 2)]
    assert engine.begun == [(0, 0), *at_work, (0, 1), (0, 2)]


def test_a_page_at_work_waits_for_its_judge_and_others_do_not(reader, engine):
    first, second = (reader.begin(image) for image in PAGES[:2])
    first.attend()
    engine.open()
    assert second.wait().is_final
    assert engine.begun == [(0, 0), (1, 0), (1, 1), (1, 2)]
    told = first.poll()
    assert (told.text.text, told.is_final) == (engine.texts[0, 0], False)
    first.judge(False)
    given_up = first.poll()
    assert (given_up.text, given_up.error, given_up.is_final) == (told.text, UNLIKE, True)
    assert first.wait() == first.end() == given_up
    assert len(engine.begun) == 4


def test_a_part_that_says_nothing_is_not_waited_for(reader, engine):
    engine.texts[0, 0] = "1 of 12"
    reading = reader.begin(PAGES[0])
    reading.attend()
    engine.open()
    settled(reading, 1)
    assert engine.begun == [(0, 0), (0, 1)]
    assert reading.poll().text.text == "1 of 12\n" + engine.texts[0, 1]
