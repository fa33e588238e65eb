"""`mmspec caption` and `mmspec parse` with tiny random models."""

import io
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from pdfs import write_pdf
from PIL import Image
from saved import save_vlm
from typer.testing import CliRunner

from mmspec import cli_documents
from mmspec.cli import app
from mmspec.documents import Reader
from mmspec.jobs.captions import image_request
from mmspec.jobs.documents import ParseJob, markdown
from mmspec.jobs.journal import Journal
from mmspec.jobs.pages import Answer
from mmspec.ocr import PageText
from mmspec.pipelines import SpeculativeDocumentPipeline, SpeculativeVLMPipeline


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture
def pictures(tmp_path):
    """Six pictures of several sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        shape = (8, 8 + 2 * number, 3)
        values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(folder / f"p{number}.png")
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


CAPTION = ["--prompt", "what is it", "--max-new-tokens", 12, "--dtype", "float64"]
HOT = [*CAPTION, "--temperature", 1, "--seed", 3]


# ------------------------------------------------------------------------------------- captions
def test_a_caption_is_that_of_the_pipeline_with_its_seed(vlm, pictures, tmp_path):
    out = tmp_path / "captions.jsonl"
    run("caption", pictures, "--model", vlm, "--out", out, *HOT)
    pipe = SpeculativeVLMPipeline.from_pretrained(vlm, dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    for record in records_of(out):
        result = pipe(
            image_request(pipe.processor, "what is it"),
            images=record["file"],
            generator=torch.Generator().manual_seed(record["seed"]),
            temperature=1.0,
            max_new_tokens=12,
            decoder="sequential",
        )
        assert record["text"] == result.texts[0].strip()
        assert record["num_tokens"] == len(result.tokens[0])


def test_captions_depend_on_seed_and_content_alone(vlm, pictures, tmp_path):
    command = ["caption", "--model", vlm, *HOT]
    outs = {size: tmp_path / f"{size}.jsonl" for size in (1, 4)}
    for size, out in outs.items():
        run(*command, pictures, "--out", out, "--batch-size", size)
    content = outs[1].read_bytes()
    assert outs[4].read_bytes() == content
    texts = [record["text"] for record in records_of(outs[1])]
    assert len(set(texts)) == 6
    lines = content.splitlines(keepends=True)
    killed = tmp_path / "killed.jsonl"
    killed.write_bytes(b"".join(lines[:2]) + lines[2][:50])
    summary = json.loads(run(*command, pictures, "--out", killed, "--json").stdout)
    assert (summary["skipped"], summary["pages"], summary["failed"]) == (2, 6, 0)
    assert killed.read_bytes() == content
    alone = run(*command, pictures / "p4.png").stdout
    assert alone == f"{pictures / 'p4.png'}: {texts[4]}\n"
    other = run("caption", "--model", vlm, *CAPTION, "--temperature", 1, pictures / "p4.png").stdout
    assert other != alone
    line = run(*command, pictures, "--out", killed, "--top-p", 0.5, code=2).stderr
    assert "line 1 was made with other settings: top_p None (asked for: 0.5)" in line
    run(*command, pictures, "--out", killed, "--top-p", 0.5, "--overwrite")
    assert killed.read_bytes() != content


def test_captions_are_drafted_from_those_before(vlm, pictures, tmp_path):
    for number in range(1, 6):
        shutil.copy(pictures / "p0.png", pictures / f"p{number}.png")
    command = ["caption", pictures, "--model", vlm, *CAPTION, "--batch-size", 1, "--json"]
    taus, texts = {}, {}
    for drafter in (None, "ngram", "none"):
        out = tmp_path / f"{drafter}.jsonl"
        named = [] if drafter is None else ["--drafter", drafter]
        taus[drafter] = json.loads(run(*command, "--out", out, *named).stdout)["tau"]
        texts[drafter] = [record | {"settings": None} for record in records_of(out)]
    assert texts[None] == texts["ngram"] == texts["none"]
    assert taus["none"] == 1
    assert taus[None] > 2 * taus["ngram"]
    out = tmp_path / "None.jsonl"
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    summary = json.loads(run(*command, "--out", out).stdout)
    assert summary["skipped"] == 5
    assert summary["tau"] > 2 * taus["ngram"]  # of one picture, whose caption the journal knows
    assert out.read_bytes() == whole


def test_bad_pictures_are_reported_and_the_others_captioned(vlm, pictures, tmp_path):
    (pictures / "p2_empty.png").touch()
    cut = (pictures / "p1.png").read_bytes()[:60]
    (pictures / "p3_cut.png").write_bytes(cut)
    out = tmp_path / "captions.jsonl"
    result = run("caption", pictures, "--model", vlm, "--out", out, *CAPTION, code=1)
    bad = [record for record in records_of(out) if record["error"] is not None]
    assert [record["error"].split("/")[-1].split(" ")[0] for record in bad] == [
        "p2_empty.png",
        "p3_cut.png,",
    ]
    for record in bad:
        assert f"mmspec: {record['error']}" in result.stderr.splitlines()
    assert re.search(r"pages\s+failed\s+skipped\s+tokens\s+tau", result.stdout)
    assert len(records_of(out)) == 8
    again = run("caption", pictures, "--model", vlm, "--out", out, *CAPTION, code=1)
    assert "p2_empty.png is empty (0 bytes) (before; --retry-errors tries again)" in again.stderr


def test_a_prompt_with_places_of_its_own_is_refused_by_picture(vlm, pictures, tmp_path):
    out = tmp_path / "captions.jsonl"
    command = ["caption", pictures, "--model", vlm, "--out", out, *CAPTION]
    run(*command, "--prompt", "<image> and", code=1)
    for record in records_of(out):
        assert record["error"].startswith(f"{record['file']}, page 1: prompt 0 has 2 places")


@pytest.mark.slow
def test_captions_of_two_workers_are_those_of_one(vlm, pictures, tmp_path):
    command = ["caption", pictures, "--model", vlm, "--batch-size", 2, *HOT]
    for workers in (1, 2):
        run(*command, "--out", tmp_path / f"{workers}.jsonl", "--workers", workers)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_a_full_disk_ends_the_job_and_keeps_what_was_finished(vlm, pictures, tmp_path):
    out, limit = tmp_path / "captions.jsonl", 1200
    command = ["caption", pictures, "--model", vlm, *CAPTION, "--batch-size", "1", "--out", out]
    process = subprocess.run(
        [sys.executable, "-m", "mmspec.cli", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert process.returncode == 1
    assert (
        f"cannot write to {out}: File too large; what was finished is kept"
        in process.stderr.splitlines()[-1]
    )
    assert "Traceback" not in process.stderr
    done = records_of(out)
    assert 0 < len(done) < 6
    run(*command)
    assert records_of(out)[: len(done)] == done
    assert len(records_of(out)) == 6


def test_a_terminal_is_shown_a_bar_of_pages(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with cli_documents._page_bar(6, 4) as bar:
        after_batch = cli_documents._follower(bar, None, None)
        after_batch([Answer(record={"error": None})] * 2 + [Answer(record={"error": "p4 is bad"})])
    shown = terminal.getvalue()
    assert "2/6" in shown
    assert "5/6" in shown
    assert "mmspec: p4 is bad\n" in shown


# ------------------------------------------------------------------------------------ documents
PARSE = ["--max-new-tokens", 12, "--dtype", "float64", "--dpi", 36, "--ocr", "none"]


@pytest.fixture
def documents(pictures):
    """Two born-digital pages, a scan of two pages in a folder of its own, and one picture."""
    for number in range(1, 6):
        (pictures / f"p{number}.png").unlink()
    write_pdf(pictures / "a.pdf", ["what is it", "it is a page\nof two lines"])
    (pictures / "sub").mkdir()
    noise = [Image.effect_noise((40, 30), sigma).convert("RGB") for sigma in (20, 60)]
    noise[0].save(pictures / "sub" / "scan.tif", save_all=True, append_images=noise[1:])
    return pictures


def without_figures(path):
    figures = dict.fromkeys(("tau", "seconds", "ocr_seconds", "wait_seconds"), 0)
    return [record | figures for record in records_of(path)]


def test_a_parsed_page_is_that_of_the_pipeline(vlm, documents, tmp_path):
    out = tmp_path / "parsed"
    result = run("parse", documents, "--recursive", "--model", vlm, "--out", out, *PARSE)
    assert "pages_per_minute" in result.stdout
    records = records_of(out / "pages.jsonl")
    assert [(Path(r["file"]).name, r["page"], r["drafts"]) for r in records] == [
        ("a.pdf", 1, "text layer"),
        ("a.pdf", 2, "text layer"),
        ("p0.png", 1, "none"),
        ("scan.tif", 1, "none"),
        ("scan.tif", 2, "none"),
    ]
    pipe = SpeculativeDocumentPipeline.from_pretrained(vlm, dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    for record in records:
        page = Reader(dpi=36).read(record["file"], record["page"]).image
        plain = pipe(page, ocr=None, decoder="sequential", max_new_tokens=12).pages[0]
        assert record["text"] == plain.text
        assert record["num_tokens"] == len(plain.tokens)
        assert record["error"] is None
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.md")) == [
        "a.pdf.md", "p0.png.md", "sub/scan.tif.md"
    ]  # fmt: skip
    shown = (out / "a.pdf.md").read_text()
    first, second = (record["text"].strip() for record in records[:2])
    file = documents / "a.pdf"
    assert shown == f"<!-- {file}, page 1 -->\n\n{first}\n\n<!-- {file}, page 2 -->\n\n{second}\n"


def test_where_the_result_goes(vlm, documents, tmp_path):
    command = ["parse", documents / "a.pdf", documents / "p0.png", "--model", vlm, *PARSE]
    run(*command, "--out", tmp_path / "all.md")
    text = (tmp_path / "all.md").read_text()
    assert text.count("<!-- ") == 3
    assert run(*command).stdout == text
    run(*command, "--out", tmp_path / "pages.jsonl")
    assert without_figures(tmp_path / "pages.jsonl") == without_figures(tmp_path / "all.jsonl")
    lines = run(
        "parse", documents / "a.pdf", *command[3:], "--to", "jsonl", "--pages", "2"
    ).stdout.splitlines()
    assert [json.loads(line)["page"] for line in lines] == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "all.jsonl", "all.md", "pages.jsonl", "pictures"
    ]  # fmt: skip


def test_the_budget_of_a_page_is_the_models_own(vlm, documents, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(vlm, model)
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"max_new_tokens": 3}))
    command = ["parse", documents / "a.pdf", "--model", model, "--to", "jsonl", "--ocr", "none"]
    for more, most in (([], 3), (["--max-new-tokens", 7], 7)):
        records = [json.loads(line) for line in run(*command, *more).stdout.splitlines()]
        assert max(record["num_tokens"] for record in records) == most


def test_ocr_reads_ahead_what_has_no_text_layer_and_no_record(
    vlm, documents, tmp_path, monkeypatch
):
    read = []

    def engine(image):
        read.append((threading.current_thread().name.split("_")[0], image.size))
        if image.size == (8, 8):
            raise RuntimeError("too small")
        time.sleep(0.02)
        return PageText("what is it")

    monkeypatch.setattr("mmspec.ocr_reading.open_engine", lambda name: engine)
    monkeypatch.setattr("mmspec.jobs.documents.open_engine", lambda name: engine)
    command = ["parse", documents, "--recursive", "--model", vlm, *PARSE, "--ocr", "tesserocr"]
    outs = {}
    for prefetch, size, workers in ((0, 1, 1), (1, 1, 1), (2, 2, 2)):
        read.clear()
        out = outs[prefetch] = tmp_path / f"{prefetch}.jsonl"
        ahead = ["--prefetch", prefetch, "--batch-size", size, "--ocr-workers", workers]
        ahead.append("--ocr-wait")
        summary = json.loads(run(*command, "--out", out, "--json", *ahead).stdout)
        assert sorted(size for _, size in read) == [(8, 8), (40, 30), (40, 30)]
        assert {name for name, _ in read} == {"mmspec-ocr"}
        assert summary["ocr_seconds"] >= 0.04
        assert summary["wait_seconds"] < summary["seconds"]
    whole = without_figures(outs[0])
    drafts = ["text layer", "text layer", "none", "tesserocr", "tesserocr"]
    assert [record["drafts"] for record in whole] == drafts
    assert whole[2]["note"] == "tesserocr failed: too small"
    assert without_figures(outs[1]) == without_figures(outs[2]) == whole
    lines = outs[1].read_bytes().splitlines(keepends=True)
    outs[1].write_bytes(b"".join(lines[:4]) + lines[4][:60])
    read.clear()
    run(*command, "--out", outs[1], "--ocr-wait")
    assert len(read) == 1
    assert without_figures(outs[1]) == whole


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_killed_parse_is_continued(vlm, documents, tmp_path, batch_size):
    command = ["parse", documents, "--recursive", "--model", vlm, *PARSE]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*command, "--out", whole)
    lines = (whole / "pages.jsonl").read_bytes().splitlines(keepends=True)
    killed.mkdir()
    (killed / "pages.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:60])
    again = [*command, "--out", killed, "--batch-size", batch_size, "--json"]
    summary = json.loads(run(*again).stdout)
    assert (summary["pages"], summary["skipped"], summary["failed"]) == (5, 2, 0)
    assert without_figures(killed / "pages.jsonl") == without_figures(whole / "pages.jsonl")
    for file in whole.rglob("*.md"):
        assert (killed / file.relative_to(whole)).read_bytes() == file.read_bytes()
    (killed / "a.pdf.md").unlink()
    summary = json.loads(run(*again).stdout)
    assert (summary["skipped"], summary["tokens"], summary["tau"]) == (5, 0, None)
    assert (killed / "a.pdf.md").read_bytes() == (whole / "a.pdf.md").read_bytes()
    line = run(*again, "--dpi", 72, code=2).stderr
    assert "line 1 was made with other settings: dpi 36 (asked for: 72)" in line


def test_a_continued_parse_drafts_from_the_pages_before(vlm, documents, tmp_path, monkeypatch):
    recalled = []
    own = SpeculativeDocumentPipeline.remember

    def remember(pipe, texts):
        recalled.append((pipe.store.num_tokens, list(texts)))
        own(pipe, texts)
        assert pipe.store.num_tokens > 0

    monkeypatch.setattr(SpeculativeDocumentPipeline, "remember", remember)
    out = tmp_path / "pages.jsonl"
    command = ["parse", documents, "--model", vlm, *PARSE, "--out", out]
    run(*command)
    assert not recalled  # the first run has no pages before it
    whole = without_figures(out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:60])
    run(*command)
    assert recalled == [(0, [record["text"] for record in whole[:2]])]
    assert without_figures(out) == whole
    run(*command)
    assert len(recalled) == 1  # nothing was missing, and no model was loaded


def test_only_the_latest_pages_are_recalled(tmp_path, monkeypatch):
    job = ParseJob(load=list, model="m", dtype="float32", reader=Reader(), options={})
    monkeypatch.setattr("mmspec.jobs.recall.MAX_RECALLED", 7)
    with Journal(tmp_path / "pages.jsonl", {}) as journal:
        assert job.after(journal) == job
        texts = ["aaaa", "bbb", None, "cccc"]
        records = [{"file": "f", "page": n, "text": text} for n, text in enumerate(texts)]
        journal.add(records)
        assert job.after(journal).load.texts == ("bbb", "cccc")


def test_bad_pages_have_their_reason_in_the_markdown(vlm, documents, tmp_path):
    write_pdf(documents / "b.pdf", ["a page", ""])
    write_pdf(documents / "locked.pdf", ["hidden"], password="sesame")
    (documents / "p1.png").touch()
    (documents / "p2.png").write_bytes((documents / "p0.png").read_bytes()[:60])
    (documents / "p3.pdf").write_bytes(b"no PDF")
    out = tmp_path / "out"
    command = ["parse", documents, "--model", vlm, "--out", out, *PARSE]
    result = run(*command, code=1)
    assert len(list(out.glob("*.md"))) == 7
    reasons = {
        "b.pdf": "b.pdf, page 2 is blank: there is no text to read",
        "locked.pdf": "locked.pdf is protected by a password, and none was given",
        "p1.png": "p1.png is empty (0 bytes)",
        "p2.png": "p2.png, page 1 cannot be read: ",
        "p3.pdf": "p3.pdf cannot be read as a PDF: ",
    }
    for name, reason in reasons.items():
        assert f"mmspec: {documents}/{reason}" in result.stderr
        assert f"<!-- missing: {documents}/{reason}" in (out / f"{name}.md").read_text()
    good = [record for record in records_of(out / "pages.jsonl") if record["error"] is None]
    assert [(Path(r["file"]).name, r["page"]) for r in good] == [
        ("a.pdf", 1), ("a.pdf", 2), ("b.pdf", 1), ("p0.png", 1)
    ]  # fmt: skip
    run(*command, "--password", "sesame", "--retry-errors", code=1)
    assert "missing" not in (out / "locked.pdf.md").read_text()


def test_comments_of_the_markdown_end_where_they_should():
    record = {"file": "a--b\n-->.pdf", "page": None, "error": "x --> y", "text": None}
    for line in markdown([record]).split("\n\n"):
        assert line.strip().startswith("<!-- ")
        assert line.count("-->") == 1
        assert "--" not in line.strip()[4:-3]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "workers"), [("SIGKILL", 1), ("SIGINT", 2)])
def test_a_stopped_process_is_continued(vlm, documents, tmp_path, how, workers):
    write_pdf(documents / "long.pdf", [f"page {number}" for number in range(40)])
    command = ["parse", documents, "--model", vlm, *PARSE, "--max-new-tokens", 40]
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(*command, "--out", whole)
    arguments = [*command, "--out", out, "--workers", workers]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmspec.cli", *map(str, arguments)],
        stderr=subprocess.PIPE,
        # A test run in the background of a shell has it ignored, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    journal = out / "pages.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        time.sleep(0.02)
    process.send_signal(signal.Signals[how])
    _, errors = process.communicate()
    num_done = journal.read_bytes().count(b"\n")
    assert 2 <= num_done < 43
    assert process.returncode == (-9 if how == "SIGKILL" else 130)
    if how == "SIGINT":
        assert f"stopped; what is done is in {journal}" in errors.decode()
        assert "Traceback" not in errors.decode()
    summary = json.loads(run(*command, "--out", out, "--json").stdout)
    assert summary["skipped"] == num_done
    assert without_figures(journal) == without_figures(whole / "pages.jsonl")
    assert (out / "long.pdf.md").read_bytes() == (whole / "long.pdf.md").read_bytes()


# --------------------------------------------------------------------------------------- errors
def test_what_cannot_be_meant_is_refused_before_a_model_is_loaded(pictures, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    out = tmp_path / "out.jsonl"
    for arguments, code, reason in (
        (["--out", blocked / "out.jsonl"], 1, f"cannot write to {blocked}"),
        (["--out", tmp_path], 1, f"cannot write to {tmp_path}: Is a directory"),
        (["--out", out, "--temperature", "inf"], 2, "temperature must be a number >= 0, got inf"),
        (["--out", out, "--top-p", 2], 2, "top_p must be None or in (0, 1], got 2"),
        (["--out", out, "--drafter", "magic"], 2, "unknown drafter 'magic'"),
        ([tmp_path / "none"], 2, "does not exist"),
        ([blocked], 2, "is of another kind; known: .png"),
        ([pictures], 2, "must be different files"),
    ):
        line = run("caption", pictures, "--model", "no/model", *arguments, code=code).stderr
        assert reason in line
        assert len(line.splitlines()) == 1
    assert not out.exists()
    out.write_text("kept")
    line = run("caption", pictures, "--model", "dogs", "--out", out, "--overwrite", code=2).stderr
    assert "unknown model 'dogs'; known: bundled:captioner" in line
    assert out.read_text() == "kept"


def test_a_parse_that_cannot_be_meant_is_refused_before_a_model_is_loaded(documents, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    out = tmp_path / "parsed"
    out.mkdir()
    (out / "a.pdf.md").write_text("of somebody else")
    other = tmp_path / "other" / "a.pdf"
    other.parent.mkdir()
    other.touch()
    for arguments, code, reason in (
        (["--out", blocked / "out"], 1, f"cannot write to {blocked}"),
        (["--out", out], 2, f"{out / 'a.pdf.md'} exists already; use --overwrite or another"),
        (["--to", "html"], 2, "unknown --to 'html'; known: markdown, jsonl"),
        (["--to", "jsonl", "--out", out], 2, "--out must be FILE.jsonl for --to jsonl"),
        (["--to", "markdown", "--out", "a.jsonl"], 2, "--out must be a folder or FILE.md"),
        (["--pages", "3-1"], 2, "pages must be like 1-3,7,10-"),
        (["--drafter", "magic"], 2, "unknown drafter 'magic'"),
        (["--ocr", "magic"], 2, "unknown OCR engine 'magic'; known: tesserocr"),
        ([other, "--out", tmp_path / "p"], 2, f"and {other} would both be written to"),
    ):
        line = run("parse", documents, "--model", "no/model", *arguments, code=code).stderr
        assert reason in line
        assert len(line.splitlines()) == 1
    assert (out / "a.pdf.md").read_text() == "of somebody else"


def test_an_engine_that_is_not_installed_is_named(documents, monkeypatch):
    monkeypatch.setitem(sys.modules, "tesserocr", None)
    line = run("parse", documents, "--model", "no/model", "--ocr", "tesserocr", code=2).stderr
    assert "tesserocr" in line
    assert "pip install" in line
