"""The benchmarks of vision-language models run on a tiny one, resume, and tell the truth."""

import json
import threading
import time

import pytest
import torch
import typer
from typer.testing import CliRunner

from mmspec import ocr_reading
from mmspec.bench import document, vlm, written
from mmspec.bench.measure import check_final_line
from mmspec.bench.vlm_setups import TINY, load_captions, load_pages, load_vlm, run_vlm
from mmspec.ocr import PageText
from mmspec.speculation import Settings

CAPTIONS = {"model": TINY, "captions": 2, "max_new_tokens": 12, "repeats": 1}
CAPTIONS |= {"dtype": "float64", "batch": "1,2", "temperature": "0,1"}
CAPTIONS |= {"schedule": "fixed", "width": 4, "series": 1}
PAGES = {"model": TINY, "pages": 2, "document": 2, "max_new_tokens": 16, "repeats": 1}
PAGES |= {"dtype": "float64", "batch": "1,2"}

# What transformers' own processors and assisted decoding warn of.
pytestmark = pytest.mark.filterwarnings("default")


def rows_of(line):
    names = ("temperature", "batch", "kind", "system")
    return {tuple(r[n] for n in names): r for r in line["rows"] if r["type"] == "row"}


def test_captions(tmp_path, capsys):
    line = vlm.run(**CAPTIONS, systems=",".join(vlm.SYSTEMS), out=tmp_path)
    check_final_line(line)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    assert (line["failures"], line["left_out"]) == ([], [])
    rows = rows_of(line)
    assert {key[3] for key in rows if key[1] == 1} == set(vlm.SYSTEMS)
    assert {key[3] for key in rows if key[1] == 2} == {"generate", *vlm.OURS}
    for (temperature, _, _, system), row in rows.items():
        assert row["tau"] >= 1
        if system in vlm.OURS:
            assert (row["equal_plain"], row["guarantee"]) == (1, "exact")
            assert row["phases_s"]["vision"] > 0
        if temperature == 0:
            assert row["equal_generate"] == 1
    generate = rows[0.0, 1, "all", "generate"]
    assert (generate["num_forwards"], generate["tau"]) == (2 * 12, 1)

    # The drafter reads the prompt of each caption: 3 letters, and 16, 1, 1, 1 or no visual tokens;
    # without any, it reads the first token of the answer with it.
    read = {key[3]: row.get("drafter_prompt_tokens") for key, row in rows.items() if key[0] == 0}
    assert read["model_all"] == 2 * 19
    assert read["model_uniform"] == read["model_attention"] == read["model_pool"] == 2 * 4
    assert read["model_none"] == 2 * 4
    assert read["ngram"] is None

    # The same command has nothing left to do, and another filter looks at its own samples.
    samples = (tmp_path / "vlm.jsonl").read_text()
    again = vlm.run(**CAPTIONS | {"batch": "1", "temperature": "0"}, out=tmp_path, minutes=0)
    assert (tmp_path / "vlm.jsonl").read_text() == samples
    assert (again["left_out"], {r["batch"] for r in again["rows"]}) == ([], {1})
    adaptive = vlm.run(**CAPTIONS | {"schedule": "adaptive"}, out=tmp_path, minutes=0)
    assert "inputs not measured" in adaptive["left_out"][0]


def written_on(entries):
    """What a tiny model writes of each page, as a text."""
    loaded = load_vlm(TINY, "float64")
    settings = Settings(drafter="none")
    options = {"settings": settings, "max_new_tokens": 16, "temperature": 0.0, "seed": 0}
    for entry in entries:
        [tokens], _ = run_vlm(loaded, loaded.encode([entry]), **options)
        yield loaded.processor.tokenizer.decode(tokens)


@pytest.fixture
def pages(monkeypatch):
    """Pages whose text is what the model will write, and an engine that finds it."""
    entries = load_pages(TINY, ["clean", "failed"], 2)
    entries = [e | {"text": t} for e, t in zip(entries, written_on(entries), strict=True)]
    by_pixels = {e["image"].tobytes(): e["text"] for e in entries}
    monkeypatch.setattr(document, "load_pages", lambda *_: entries)
    monkeypatch.setattr(document, "installed_engines", lambda: ["tesserocr"])
    monkeypatch.setattr(
        ocr_reading, "open_engine", lambda name: lambda image: PageText(by_pixels[image.tobytes()])
    )


def test_pages_with_a_text_to_draft_from(tmp_path, pages):
    line = document.run(**PAGES, ocr_wait=True, out=tmp_path)
    check_final_line(line)
    assert (line["failures"], line["left_out"]) == ([], [])
    rows = rows_of(line)
    for batch in (1, 2):
        for system in ("reference", "text_layer"):
            clean, failed = (rows[0.0, batch, kind, system]["tau"] for kind in ("clean", "failed"))
            assert clean > 2 > failed >= 1
        row = rows[0.0, batch, "clean", "reference"]
        assert row["phases_s"]["OCR"] > 0
        assert 1e3 * row["phases_s"]["OCR"] < row["ms_per_token"] * row["num_units"]
        assert "OCR" not in rows[0.0, batch, "clean", "text_layer"]["phases_s"]
    assert all(row["equal_generate"] == 1 for row in rows.values())
    [report] = tmp_path.glob("document_*.md")
    assert "OCR beside the model" in report.read_text()


def test_an_ocr_that_is_too_slow_holds_nothing_up(tmp_path, pages, monkeypatch):
    """It is not on the clock, and what it has begun ends before the next system does."""
    busy, found_busy = threading.Lock(), []

    def slow(image):
        found_busy.append(busy.locked())
        with busy:
            time.sleep(1.0)
        return PageText("a text")

    monkeypatch.setattr(ocr_reading, "open_engine", lambda name: slow)
    line = document.run(**PAGES | {"batch": "2"}, systems="plain,reference", out=tmp_path)
    row = rows_of(line)[0.0, 2, "clean", "reference"]
    assert row["phases_s"]["OCR"] > 1e-3 * row["ms_per_token"] * row["num_units"]
    # Of two pages one was begun and one given up, in warm-up and sample, clean and failed.
    assert line["failures"] == []
    assert 0 < len(found_busy) <= 4
    assert not any(found_busy)


def test_a_store_drafts_from_earlier_pages_of_the_document(tmp_path, monkeypatch):
    page = load_pages(TINY, ["clean"], 1)[0]
    monkeypatch.setattr(document, "load_pages", lambda *_: [page, page | {"id": "again"}])
    options = PAGES | {"batch": "1", "systems": "generate,plain,ngram,ngram_store"}
    rows = rows_of(document.run(**options, out=tmp_path))
    with_store, without = (
        rows[0.0, 1, "clean", n]["num_row_steps"] for n in ("ngram_store", "ngram")
    )
    assert with_store < without


def test_without_an_engine_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "installed_engines", list)
    options = PAGES | {"batch": "1", "pages": 1, "document": 1, "kinds": "clean"}
    line = document.run(**options, systems="generate,plain,reference", out=tmp_path)
    assert line["left_out"] == [
        "float64 T=0 batch 1: reference not measured: no OCR engine is installed"
    ]


def test_pages_that_do_not_fill_a_document_are_named(tmp_path):
    options = PAGES | {"batch": "1", "pages": 3, "kinds": "clean", "systems": "generate"}
    line = document.run(**options, out=tmp_path)
    assert line["left_out"] == [
        "float64 T=0 batch 1: clean inputs that do not fill a document of 2: clean-2"
    ]


def test_an_exact_output_that_differs_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(written, "num_equal", lambda rows, others: 0)
    with pytest.raises(typer.Exit) as stopped:
        vlm.run(
            **CAPTIONS | {"batch": "1", "temperature": "0"}, systems="generate,plain", out=tmp_path
        )
    assert stopped.value.exit_code == 1


def test_garbling_keeps_the_lines_and_spoils_most_letters():
    text = "several words on\ntwo lines of a page that was read well"
    spoilt = document.garbled(text)
    assert spoilt == document.garbled(text)
    assert [len(line) for line in spoilt.split("\n")] == [len(line) for line in text.split("\n")]
    assert 0.4 < sum(a != b for a, b in zip(text, spoilt, strict=True)) / len(text) < 0.7


@pytest.mark.parametrize("module", [vlm, document])
def test_a_command_line_mounts_the_function(module):
    app = typer.Typer()
    app.command()(module.run)
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "--schedule" in result.output


def test_unknown_names_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="known: generate, prompt_lookup"):
        vlm.run(**CAPTIONS, systems="fast", out=tmp_path)
    with pytest.raises(ValueError, match="known: clean, noisy, failed, tables"):
        document.run(**PAGES | {"kinds": "torn"}, out=tmp_path)
    with pytest.raises(ValueError, match="unknown OCR engine 'eyes'"):
        document.run(**PAGES, ocr="eyes", out=tmp_path)
    with pytest.raises(ValueError, match="unknown schedule 'later'"):
        vlm.run(**CAPTIONS | {"schedule": "later"}, out=tmp_path)
    with pytest.raises(ValueError, match="inputs must be at least one, got 0"):
        vlm.run(**CAPTIONS | {"captions": 0}, out=tmp_path)
    with pytest.raises(ValueError, match="inputs of a task must be at least 1, got 0"):
        document.run(**PAGES | {"document": 0}, out=tmp_path)
    with pytest.raises(ValueError, match="unknown model 'huge'"):
        load_vlm("huge", "float32")
    with pytest.raises(ValueError, match="no pictures to caption come with 'pages'"):
        load_captions("pages")


def test_a_batch_is_its_rows():
    loaded, entries = load_vlm(TINY, "float64"), load_captions(TINY, 3)
    assert loaded.model.dtype == torch.float64
    options = {"settings": Settings(), "max_new_tokens": 8, "temperature": 0.0, "seed": 0}
    rows, figures = run_vlm(loaded, loaded.encode(entries), **options)
    assert rows == [run_vlm(loaded, loaded.encode([e]), **options)[0][0] for e in entries]
    assert figures["num_row_steps"] >= figures["num_steps"] > 0
