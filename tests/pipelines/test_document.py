"""Document pipeline: the tokens of plain decoding, whatever the drafts are made of."""

import time

import pytest
import torch
from PIL import Image, ImageOps
from vlm_processors import loaded_vlm

import mmspec.ocr_reading as ocr_reading
import mmspec.pipelines.document as document
from mmspec.ocr import PageText, Word
from mmspec.pipelines import SpeculativeDocumentPipeline

NUM_TOKENS = 24


def page(seed, size=(48, 64)):
    """Noise in two bands, with white between them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.full((size[1], size[0], 3), 255, dtype=torch.uint8)
    for top in (6, 14, 40, 48):
        values[top : top + 5] = torch.randint(0, 200, (5, size[0], 3), generator=generator)
    return Image.fromarray(values.numpy())


PAGES = [page(1), page(2), page(3, (40, 56))]


def make_pipe(name="idefics3", **options):
    pipe = SpeculativeDocumentPipeline.from_model(*loaded_vlm(name), schedule="fixed", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


@pytest.fixture(scope="module")
def plain(pipe):
    """Pages as plain decoding writes them."""
    out = pipe(PAGES, ocr=None, decoder="sequential", max_new_tokens=NUM_TOKENS)
    assert out.stats.tau == 1.0
    assert [one.sources for one in out.pages] == [{}] * 3
    return out


def read(pipe, pages=PAGES, **options):
    return pipe(pages, **({"ocr": None, "max_new_tokens": NUM_TOKENS, "store": False} | options))


def tokens_of(out):
    return [one.tokens.tolist() for one in out.pages]


def test_plain_is_generate(pipe, plain):
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": PAGES[0]},
                {"type": "text", "text": "Convert this page to docling."},
            ],
        }
    ]
    inputs = pipe.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(pipe.reader.dtype)
    out = pipe.model.generate(**inputs, do_sample=False, max_new_tokens=NUM_TOKENS)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == tokens_of(plain)[0]


@pytest.mark.parametrize(
    ("regions", "store", "batch_size"), [(False, False, 1), (False, True, 3), (True, True, 1)]
)
@pytest.mark.parametrize("kind", ["none", "right", "other", "lies"])
def test_any_reference_gives_the_tokens_of_plain_decoding(
    pipe, plain, kind, regions, store, batch_size
):
    pipe.clear_store()
    texts = [one.text for one in plain.pages]
    references = {
        "none": None,
        "right": texts,
        "other": [texts[1], None, texts[0][::-1]],
        "lies": ["\x00\udc80\U0010ffff \ufffd", "a" * 3000, "ß<image>漢字\n\n\t| --- |"],
    }[kind]
    options = {"references": references, "regions": regions, "batch_size": batch_size}
    out = read(pipe, store=store, **options)
    assert tokens_of(out) == tokens_of(plain)
    assert [one.text for one in out.pages] == texts
    for one in out.pages:
        assert sum(one.sources.values()) == one.stats.num_units
        assert one.reference == ("regions" if regions else one.reference)
        assert (one.region_stats is not None) is regions
    if store:
        # What was written once is drafted from the store, whatever the references say.
        again = read(pipe, store=True, **options)
        assert tokens_of(again) == tokens_of(plain)
        assert again.stats.num_target_forwards < out.stats.num_target_forwards


def test_a_right_reference_takes_few_forwards(pipe, plain):
    lone = read(pipe, PAGES[:1])
    out = read(pipe, PAGES[:1], references=plain.pages[0].text, width=64)
    assert out.pages[0].reference == "given"
    # The text has no special tokens, of which a random model writes some.
    assert out.pages[0].sources["reference"] > 0.6 * out.pages[0].stats.num_units
    assert out.stats.num_target_forwards < 0.5 * lone.stats.num_target_forwards


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "gemma3", "got_ocr2"])
def test_other_families(name):
    pipe = make_pipe(name)
    plain = read(pipe, PAGES[:2], decoder="sequential", max_new_tokens=12)
    texts = [one.text for one in plain.pages]
    out = read(pipe, PAGES[:2], references=texts, batch_size=2, regions=True, max_new_tokens=12)
    assert tokens_of(out) == tokens_of(plain)


def test_a_seed_gives_the_tokens_of_sequential(pipe):
    """The region pass draws from a generator of its own."""
    options = {"temperature": 1.0, "top_k": 20, "batch_size": 2, "max_new_tokens": 12}
    seeds = lambda: [torch.Generator().manual_seed(seed) for seed in range(3)]  # noqa: E731
    one = lambda: torch.Generator().manual_seed(4)  # noqa: E731
    for made in (seeds, one):
        plain = read(pipe, decoder="sequential", generator=made(), **options)
        out = read(pipe, references=["abc"] * 3, regions=True, generator=made(), **options)
        assert tokens_of(out) == tokens_of(plain)


# --------------------------------------------------------------------------- regions


def columned(seed):
    """Noise in eight lines over 160 x 80 pixels: one across, then two columns."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.full((80, 160, 3), 255, dtype=torch.uint8)
    values[4:9, 8:150] = torch.randint(0, 120, (5, 142, 3), generator=generator)
    for top in range(20, 76, 8):
        for left in (6, 90):
            values[top : top + 5, left : left + 60] = torch.randint(
                0, 120, (5, 60, 3), generator=generator
            )
    return Image.fromarray(values.numpy())


def worded(text, left):
    """A text with its words below each other, in a column."""
    words, end = [], 0
    for number, word in enumerate(text.split()):
        end = text.index(word, end) + len(word)
        top = 20 + 7 * number % 56
        words.append(Word(word, 0.9, (left, top, left + 5, top + 3), end))
    return PageText(text, tuple(words))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 20}])
@pytest.mark.parametrize("kind", ["none", "right", "lies"])
def test_columns_are_regions_of_their_own(pipe, kind, options, monkeypatch):
    pages = [columned(1), columned(2)]
    seeds = lambda: [torch.Generator().manual_seed(seed) for seed in range(2)]  # noqa: E731
    plain = read(pipe, pages, decoder="sequential", generator=seeds(), **options)
    texts = [one.text for one in plain.pages]
    references = {
        "none": None,
        "right": texts,
        "lies": [worded("all of it is \x00 wrong", 10), worded("| --- |", 100)],
    }[kind]
    asked = []

    def ask(images, prompt, **given):
        asked.append((images, given["drafter"]["references"]))
        return SpeculativeDocumentPipeline._ask(pipe, images, prompt, **given)

    monkeypatch.setattr(pipe, "_ask", ask)
    given = options | {"references": references, "generator": seeds()}
    out = read(pipe, pages, regions=True, **given)
    assert tokens_of(out) == tokens_of(plain)
    assert [one.text for one in out.pages] == texts
    assert [one.reference for one in out.pages] == ["regions"] * 2
    crops, whole, *_ = asked
    assert len(asked) == 4
    # This processor shows all pictures at one size, so each part is put on paper of the page's.
    assert [image.size for image in crops[0]] == [(160, 80)] * 3
    inked = [ImageOps.invert(image.convert("L")).getbbox() for image in crops[0]]
    assert [box[2] for box in inked] == pytest.approx([150, 66, 64], abs=3)
    assert [box[3] for box in inked] == pytest.approx([9, 57, 57], abs=3)
    assert [image.size for image in whole[0]] == [(160, 80)]
    if kind == "lies":
        drafts = [[one().text for one in references] for _, references in asked[::2]]
        assert drafts == [["", "all of it is \x00 wrong", ""], ["", "", "| --- |"]]


# --------------------------------------------------------------------------- OCR


class Reader:
    """An engine that reads what it is told."""

    def __init__(self, texts):
        self.texts = iter(texts)

    def __call__(self, image):
        text = next(self.texts)
        if isinstance(text, Exception):
            raise text
        return text


def test_engines_read_the_pages_without_reference(pipe, plain, monkeypatch, caplog):
    words = plain.pages[0].text
    boxed = PageText(words, (Word(words, 0.9, (0, 0, 48, 64), len(words)),))
    read_by = {"tesserocr": Reader([boxed, PageText(" \n"), RuntimeError("broken")])}
    monkeypatch.setattr(ocr_reading, "open_engine", read_by.get)
    monkeypatch.setattr(document, "installed_engines", lambda: ["tesserocr"])
    fresh = make_pipe()
    references = [None, " ", None, words]
    out = read(fresh, [*PAGES, PAGES[0]], ocr="auto", ocr_wait=True, references=references)
    assert tokens_of(out) == tokens_of(plain) + tokens_of(plain)[:1]
    assert [one.reference for one in out.pages] == ["tesserocr", "none", "none", "given"]
    assert [one.error for one in out.pages] == [
        None,
        "tesserocr found no text",
        "tesserocr failed: broken",
        None,
    ]
    assert "broken" in caplog.text
    assert out.pages[0].ocr_time_s > 0 == out.pages[3].ocr_time_s


def test_pages_that_were_read_ahead_are_not_read_again(pipe, plain, monkeypatch):
    words = PageText(plain.pages[0].text)
    engines = iter([Reader([words, RuntimeError("broken")])])
    monkeypatch.setattr(ocr_reading, "open_engine", lambda name: next(engines))
    fresh = make_pipe()
    readings = [fresh.read_ahead(page, ocr="tesserocr") for page in PAGES[:2]]
    assert fresh.read_ahead(PAGES[0], ocr="tesserocr", drafter="jacobi") is None
    assert fresh.read_ahead(PAGES[0], ocr=None) is None
    found = [reading.wait() for reading in readings]
    # The engine has nothing more to read from, so a third page would fail.
    out = read(fresh, PAGES[:2], references=readings, ocr="tesserocr")
    assert tokens_of(out) == tokens_of(plain)[:2]
    assert [one.reference for one in out.pages] == ["tesserocr", "none"]
    assert [one.error for one in out.pages] == [None, "tesserocr failed: broken"]
    assert [one.ocr_time_s for one in out.pages] == [one.time_s for one in found]
    # They are as good in a later call, as what was found and as what was waited for.
    again = read(fresh, PAGES[:2], references=[readings[0], found[1]])
    assert [one.reference for one in again.pages] == ["tesserocr", "none"]
    assert out.stats.ocr_wait_s == 0.0 < out.stats.ocr_time_s


def test_the_seconds_of_waiting_are_told(pipe, plain, monkeypatch):
    """Three engines read at once; the call waits for the slowest, not for their sum."""

    def slow(image):
        time.sleep(0.3)
        return PageText(plain.pages[0].text)

    monkeypatch.setattr(ocr_reading, "open_engine", lambda name: slow)
    wait = {"ocr": "tesserocr", "ocr_wait": True}
    out = read(make_pipe(), ocr_workers=3, batch_size=3, **wait)
    assert tokens_of(out) == tokens_of(plain)
    assert out.stats.ocr_time_s >= 0.9
    assert out.stats.ocr_wait_s < 0.6
    alone = read(make_pipe(), PAGES[:1], **wait).pages[0]
    assert 0.0 < alone.ocr_wait_s <= alone.ocr_time_s


def test_without_an_engine_auto_says_so(plain, monkeypatch, caplog):
    monkeypatch.setattr(document, "installed_engines", list)
    pipe = make_pipe()
    for _ in range(2):
        out = read(pipe, PAGES[:1], ocr="auto")
    assert tokens_of(out) == tokens_of(plain)[:1]
    assert out.pages[0].error.startswith("no OCR engine is installed; pip install 'mmspec[ocr]'")
    assert len(caplog.records) == 1
    assert read(pipe, PAGES[:1], ocr=None).pages[0].error is None


def test_another_drafter_is_used_alone(pipe, plain):
    out = read(pipe, drafter="jacobi", ocr="nonsense", references=["a"] * 3)
    assert tokens_of(out) == tokens_of(plain)
    assert [one.sources for one in out.pages] == [{}] * 3
    chains = {"name": "reference", "branching": 1}
    out = read(pipe, drafter=chains, references=[one.text for one in plain.pages])
    assert tokens_of(out) == tokens_of(plain)
    assert out.stats.tau > 2.5


# --------------------------------------------------------------------------- the call


def test_an_interrupted_call_returns_what_was_begun(pipe, plain):
    steps = []

    def stop(reader, step, details):
        steps.append(step)
        return len(steps) == 34

    out = read(pipe, decoder="sequential", callback_on_step_end=stop)
    assert out.interrupted
    assert [len(tokens) for tokens in tokens_of(out)] == [len(tokens_of(plain)[0]), 10]
    assert not read(pipe, PAGES[:1]).interrupted


def test_a_document_within_a_document_is_interrupted_alone(pipe, plain):
    inner = []

    def press(*_):
        pipe.interrupt()

    def ask(reader, step, details):
        if not inner:
            inner.append(read(pipe, PAGES[1:], callback_on_step_end=press))

    out = read(pipe, PAGES[:1], callback_on_step_end=ask)
    assert inner[0].interrupted
    assert len(inner[0].pages) == 1, "the page that was begun"
    assert not out.interrupted
    assert tokens_of(out) == tokens_of(plain)[:1]


REFUSED = [
    ([], {}, "at least one page is needed"),
    ("none.png", {}, r"page 0 \(none.png\) cannot be read: No such file"),
    ([PAGES[0], Image.new("RGB", (0, 5))], {}, r"size of page 1 must be at least .*, got \(0, 5\)"),
    ([PAGES[0], 3], {}, "page 1 must be a PIL image or the path of a file"),
    (PAGES, {"references": "one"}, "references must be one text or None for each of 3 pages"),
    (PAGES[0], {"references": [None, "b"]}, "references must be one text or None for each of 1"),
    (
        PAGES[0],
        {"references": [3]},
        "reference 0 must be a text, a PageText, a Reading, a PendingReading or None, got 3",
    ),
    (PAGES[0], {"ocr": "nonsense"}, "unknown OCR engine 'nonsense'; known: tesserocr, rapidocr"),
    (PAGES[0], {"ocr_workers": 0}, "ocr_workers must be an integer >= 1, got 0"),
    (PAGES[0], {"ocr_wait": 1}, "ocr_wait must be True or False, got 1"),
    (PAGES[0], {"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
    (PAGES[0], {"prompt": 3}, "prompt must be None or a text, got 3"),
    (PAGES[0], {"drafter": "nonsense"}, "unknown drafter 'nonsense'"),
    (PAGES[0], {"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
    (PAGES, {"generator": [torch.Generator()]}, "generator must be one per page, 3"),
]


@pytest.mark.parametrize(("pages", "options", "message"), REFUSED)
def test_bad_arguments_are_refused_before_any_forward(pipe, monkeypatch, pages, options, message):
    def fail(*args, **kwargs):
        raise AssertionError("a forward ran")

    monkeypatch.setattr(pipe.model, "forward", fail)
    with pytest.raises(ValueError, match=message):
        read(pipe, pages, **options)


def test_pages_of_an_earlier_process_are_drafted_from(pipe, plain):
    text = plain.pages[0].text
    fresh = make_pipe()
    without = read(fresh, PAGES[:1], store=True)
    fresh.clear_store()
    fresh.remember([text, ""])
    again = read(fresh, PAGES[:1], store=True)
    assert tokens_of(again) == tokens_of(without) == tokens_of(plain)[:1]
    assert again.stats.num_target_forwards < without.stats.num_target_forwards


def test_save_and_load(pipe, plain, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = SpeculativeDocumentPipeline.from_pretrained(tmp_path, schedule="fixed")
    again.set_progress_bar_config(disable=True)
    PAGES[0].save(tmp_path / "page.png")
    assert tokens_of(read(again, tmp_path / "page.png")) == tokens_of(plain)[:1]
