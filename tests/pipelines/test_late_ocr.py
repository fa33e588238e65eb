"""OCR beside the model: the same tokens whenever a text comes, and nothing is left behind."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from vlm_processors import loaded_vlm

import mmspec.ocr_reading as ocr_reading
from mmspec.documents import Reader
from mmspec.jobs.documents import ParseJob
from mmspec.jobs.journal import Journal
from mmspec.jobs.page_run import run_pages
from mmspec.jobs.pages import PageTask
from mmspec.ocr import PageText
from mmspec.pipelines import SpeculativeDocumentPipeline

NUM_TOKENS = 24
NEVER = 10**6


def page(*bands):
    """Noise in bands of a white page."""
    values = torch.full((64, 48, 3), 255, dtype=torch.uint8)
    for top, bottom in bands:
        generator = torch.Generator().manual_seed(top)
        values[top:bottom] = torch.randint(0, 256, (bottom - top, 48, 3), generator=generator)
    return Image.fromarray(values.numpy())


#: The last one's text is short.
PAGES = [page((6, 11), (14, 19), (40, 45), (48, 53)), page((6, 11), (14, 19)), page((0, 64))]


class Engine:
    """Finds the texts of pages, each when it is told to."""

    def __init__(self, texts):
        self.texts = {one.tobytes(): text for one, text in zip(PAGES, texts, strict=True)}
        self.gates = {content: threading.Event() for content in self.texts}
        self.begun = []

    def open(self, image):
        self.gates[image.tobytes()].set()

    def __call__(self, image):
        content = image.tobytes()
        self.begun.append(content)
        assert self.gates[content].wait(60)
        if isinstance(self.texts[content], Exception):
            raise self.texts[content]
        return PageText(self.texts[content])


@pytest.fixture(scope="module")
def loaded():
    return loaded_vlm("idefics3")


@pytest.fixture(scope="module")
def plain(loaded):
    pipe = SpeculativeDocumentPipeline.from_model(*loaded)
    pages = read(pipe, PAGES, decoder="sequential", ocr=None).pages
    assert [len(one.tokens) for one in pages] == [NUM_TOKENS, NUM_TOKENS, 6]
    return pages


@pytest.fixture
def engine(plain, monkeypatch):
    engine = Engine([one.text for one in plain])
    monkeypatch.setattr(ocr_reading, "open_engine", lambda name: engine)
    yield engine
    for gate in engine.gates.values():
        gate.set()


@pytest.fixture
def pipe(loaded, engine):
    pipe = SpeculativeDocumentPipeline.from_model(*loaded, schedule="fixed")
    yield pipe
    for gate in engine.gates.values():
        gate.set()
    pipe.stop_reading(wait=True)
    assert not [one for one in threading.enumerate() if one.name.startswith("mmspec-ocr")]


def read(pipe, pages, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(pages, **({"max_new_tokens": NUM_TOKENS, "store": False} | options))


def tokens_of(pages):
    return [one.tokens.tolist() for one in pages]


def read_when(pipe, engine, arrivals, **options):
    """Reads pages as a batch whose texts come before a step each: 0 is before the call."""
    pages = PAGES[: len(arrivals)]
    readings = [pipe.read_ahead(one, ocr="tesserocr", ocr_workers=len(pages)) for one in pages]

    def arrive(num_steps):
        for image, reading, arrival in zip(pages, readings, arrivals, strict=True):
            if arrival == num_steps:
                engine.open(image)
                reading.wait()

    arrive(0)
    steps = iter(range(1, NUM_TOKENS + 2))
    return read(
        pipe,
        pages,
        references=readings,
        batch_size=len(pages),
        callback_on_step_end=lambda *_: arrive(next(steps)),
        **options,
    )


@pytest.mark.parametrize("is_broken", [False, True])
def test_whenever_a_text_comes_the_tokens_are_those_of_plain_decoding(
    pipe, engine, plain, is_broken
):
    if is_broken:
        engine.texts[PAGES[0].tobytes()] = RuntimeError("torn")
    there = read(pipe, PAGES[:1], ocr=None, references=plain[0].text)
    alone = read(pipe, PAGES[:1], ocr=None)
    forwards = []
    for arrival in (0, 1, 9, NEVER):
        engine.gates[PAGES[0].tobytes()].clear()
        out = read_when(pipe, engine, [arrival])
        assert tokens_of(out.pages) == tokens_of(plain[:1])
        told = out.pages[0]
        is_read = arrival < NEVER and not is_broken
        assert told.reference == ("tesserocr" if is_read else "none")
        assert (told.sources.get("reference", 0) > 0) is is_read
        late = "tesserocr came too late: the page was complete"
        assert told.error == (
            None if is_read else late if arrival == NEVER else "tesserocr failed: torn"
        )
        assert told.ocr_time_s > 0.0 == told.ocr_wait_s
        forwards.append(out.stats.num_target_forwards)
        engine.open(PAGES[0])
    # A text that is there from the beginning is drafted from as one that was given.
    best = alone if is_broken else there
    assert forwards[0] == best.stats.num_target_forwards
    assert forwards[3] == alone.stats.num_target_forwards
    assert forwards == sorted(forwards)
    assert is_broken or forwards[0] < forwards[2] < forwards[3]


@pytest.mark.parametrize("schedule", ["fixed", "adaptive"])
def test_the_texts_of_a_batch_come_one_by_one(pipe, engine, plain, schedule):
    pipe.reader.schedule = schedule
    for arrivals in ([7, 0, NEVER], [3, NEVER, 1]):
        for gate in engine.gates.values():
            gate.clear()
        out = read_when(pipe, engine, arrivals)
        assert tokens_of(out.pages) == tokens_of(plain)
        kinds = ["none" if arrival == NEVER else "tesserocr" for arrival in arrivals]
        assert [one.reference for one in out.pages] == kinds
        for one in out.pages:
            assert one.reference != "none" or "reference" not in one.sources
        for image in PAGES:
            engine.open(image)


def test_a_seed_gives_the_same_tokens_whenever_a_text_comes(pipe, engine):
    options = {"temperature": 1.0, "top_k": 20}
    seeds = lambda: [torch.Generator().manual_seed(seed) for seed in range(2)]  # noqa: E731
    sampled = read(pipe, PAGES[:2], ocr=None, decoder="sequential", generator=seeds(), **options)
    out = read_when(pipe, engine, [3, 8], generator=seeds(), **options)
    assert tokens_of(out.pages) == tokens_of(sampled.pages)


def test_pages_that_are_complete_first_are_not_read_any_more(pipe, engine, plain):
    out = read(pipe, PAGES, ocr="tesserocr")
    assert tokens_of(out.pages) == tokens_of(plain)
    assert engine.begun == [PAGES[0].tobytes()]
    never = "tesserocr had not begun when the page was complete"
    assert [one.error for one in out.pages] == [
        "tesserocr came too late: the page was complete",
        never,
        never,
    ]
    assert out.pages[0].ocr_time_s > 0.0 == out.pages[1].ocr_time_s
    # The engine is none the worse for it: the next call has it back.
    for image in PAGES:
        engine.open(image)
    again = read(pipe, PAGES[:2], ocr="tesserocr", ocr_wait=True)
    assert [one.reference for one in again.pages] == ["tesserocr"] * 2


def test_a_call_that_fails_or_is_stopped_gives_its_readings_up(pipe, engine):
    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(pipe, PAGES, ocr="tesserocr", callback_on_step_end=fail)
    out = read(pipe, PAGES, ocr="tesserocr", callback_on_step_end=lambda *_: True)
    assert out.interrupted
    assert len(out.pages) == 1
    for image in PAGES:
        engine.open(image)
    pipe.stop_reading(wait=True)
    assert set(engine.begun) == {PAGES[0].tobytes()}


def test_a_job_that_is_stopped_gives_its_readings_up(pipe, engine, tmp_path):
    tasks = [PageTask(file=str(tmp_path / f"{n}.png"), page=1, digest=str(n)) for n in range(3)]
    for task, image in zip(tasks, PAGES, strict=True):
        image.save(task.file)
    job = ParseJob(
        load=lambda: pipe,
        model="tiny",
        dtype="float64",
        reader=Reader(),
        options={"max_new_tokens": 4, "drafter": None},
        ocr="tesserocr",
    )

    def stop(answers):
        told.extend(answers)
        raise KeyboardInterrupt

    told = []
    with Journal(None, job.settings) as journal, pytest.raises(KeyboardInterrupt):
        run_pages(
            job,
            tasks,
            tasks,
            journal,
            batch_size=1,
            num_workers=1,
            report=print,
            after_batch=stop,
            prefetch=2,
        )
    [first] = told
    assert (first.record["drafts"], first.record["wait_seconds"]) == (
        "none",
        pytest.approx(0, abs=5),
    )
    assert first.record["note"] == "tesserocr came too late: the page was complete"
    for image in PAGES:
        engine.open(image)
    pipe.stop_reading(wait=True)
    assert engine.begun == [PAGES[0].tobytes()]


def test_a_reading_that_was_given_up_is_waited_for_by_nobody(pipe, engine):
    readings = [pipe.read_ahead(one, ocr="tesserocr") for one in PAGES]
    pipe.stop_reading()
    assert [one.poll() for one in readings] == [None] * 3
    assert readings[1].wait().error == "tesserocr had not begun when the page was complete"


SCRIPT = """
import threading
from PIL import Image
from mmspec import ocr_reading

class Slow:
    def __call__(self, image):
        begun.set()
        threading.Event().wait(0.3)
        print("read")
        raise RuntimeError("torn")

begun = threading.Event()
ocr_reading.open_engine = lambda name: Slow()
reader = ocr_reading.OcrReader("slow")
readings = [reader.begin(Image.new("L", (1, 1))) for _ in range(2)]
begun.wait()
print([one.end().error for one in readings])
"""


def test_an_interpreter_may_end_while_an_engine_reads():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert done.stdout.splitlines() == [
        "['slow came too late: the page was complete', "
        "'slow had not begun when the page was complete']",
        "read",
    ]
