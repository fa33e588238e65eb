import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pagejobs import ColourJob
from pdfs import write_pdf
from PIL import Image

from mmspec.documents import DOCUMENTS, Reader, find_files, page_ranges
from mmspec.jobs.journal import Journal
from mmspec.jobs.page_run import missing_tasks, run_pages
from mmspec.jobs.pages import list_tasks

TESTS = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path):
    """Nine good pages, a file of each bad kind between them."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / f"p{number}.png")
    write_pdf(folder / "a.pdf", ["one", "two", "three"])
    write_pdf(folder / "locked.pdf", ["hidden"], password="sesame")
    (folder / "p1_empty.jpg").touch()
    (folder / "p2_broken.pdf").write_bytes(b"%PDF-1.4 and no more")
    Image.effect_noise((90, 90), 60).save(folder / "p3_cut.png")
    (folder / "p3_cut.png").write_bytes((folder / "p3_cut.png").read_bytes()[:3000])
    Image.new("RGB", (9, 9)).save(folder / "ugly.png")
    return folder


BAD = {
    ("locked.pdf", None): "is protected by a password",
    ("p1_empty.jpg", None): "is empty (0 bytes)",
    ("p2_broken.pdf", None): "cannot be read as a PDF",
    ("p3_cut.png", 1): "page 1 cannot be read",
    ("ugly.png", 1): "page 1: 2 places for images and 1 images",
}


def run(
    folder,
    out,
    *,
    job=None,
    batch_size=1,
    num_workers=1,
    retry_errors=False,
    ranges=None,
    password=None,
    **ahead,
):
    """Runs a job; returns the summary, the records, and what it said."""
    tasks = list_tasks(list(find_files([folder], DOCUMENTS)), Reader(password=password), ranges)
    said, seen = [], []
    with Journal(out, ColourJob.settings) as journal:
        summary = run_pages(
            job or ColourJob(password=password),
            tasks,
            missing_tasks(tasks, journal, retry_errors=retry_errors),
            journal,
            batch_size=batch_size,
            num_workers=num_workers,
            report=said.append,
            after_batch=seen.extend,
            **ahead,
        )
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(seen) == summary.num_pages - summary.num_skipped
    return summary, records, said


def reasons(records):
    return {
        (Path(r["file"]).name, r["page"]): r["error"] for r in records if r["error"] is not None
    }


def is_bad_as_expected(records):
    found = reasons(records)
    assert set(found) == set(BAD)
    for (name, page), reason in BAD.items():
        assert reason in found[name, page]
        assert name in found[name, page]
    return True


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bad_pages_get_their_reason_and_the_others_their_text(folder, tmp_path, batch_size):
    out = tmp_path / "out.jsonl"
    summary, records, _ = run(folder, out, batch_size=batch_size)
    assert is_bad_as_expected(records)
    assert (summary.num_pages, summary.num_failed, summary.num_skipped) == (14, 5, 0)
    keys = [(Path(r["file"]).name, r["page"]) for r in records]
    assert keys[:4] == [("a.pdf", 1), ("a.pdf", 2), ("a.pdf", 3), ("locked.pdf", None)]
    names = [name for name, _ in keys]
    assert names[4:] == ["p0.png", "p1.png", "p1_empty.jpg", "p2.png", "p2_broken.pdf",
                         "p3.png", "p3_cut.png", "p4.png", "p5.png", "ugly.png"]  # fmt: skip
    texts = [r["text"] for r in records if r["error"] is None]
    assert texts[3:] == [f"(9, 9) ({n}, 0, 0)" for n in range(6)]
    assert summary.num_tokens == sum(map(len, texts))
    assert summary.tau == pytest.approx(summary.num_tokens / (4 * 9))


def test_reading_ahead_changes_nothing(folder, tmp_path):
    run(folder, tmp_path / "now.jsonl", prefetch=0)
    for batch_size, prefetch in ((1, 3), (2, 1), (20, 2)):
        out = tmp_path / f"{batch_size}.jsonl"
        _, records, _ = run(folder, out, batch_size=batch_size, prefetch=prefetch)
        assert is_bad_as_expected(records)
        assert out.read_bytes() == (tmp_path / "now.jsonl").read_bytes()


def test_a_batch_that_fails_is_done_page_by_page(folder, tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()
    job = ColourJob(folder=calls, lone=("p2.png",))
    _, records, _ = run(folder, tmp_path / "out.jsonl", job=job, batch_size=4)
    assert is_bad_as_expected(records)
    sizes = sorted(int(path.name.rsplit("-", 1)[1]) for path in calls.iterdir())
    # 11 pages open: [a1 a2 a3 p0] [p1 p2 p3 cut] [p4 p5 ugly]; the last two fall apart.
    assert sizes == [1, 1, 1, 1, 1, 4]


@pytest.mark.parametrize("ahead", [{"prefetch": 0}, {"prefetch": 1}])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_no_kind_of_error_of_a_page_ends_the_run(folder, tmp_path, batch_size, ahead):
    unwritable = {
        "p0.png": IndexError("list index out of range"),
        "p1.png": ZeroDivisionError("division by zero"),
        "p2.png": KeyError("image"),
        "p3.png": MemoryError(),
    }
    unreadable = {"p4.png": MemoryError(), "p5.png": TypeError("no size")}
    job = ColourJob(unwritable=unwritable, unreadable=unreadable)
    out = tmp_path / "out.jsonl"
    summary, records, _ = run(folder, out, job=job, batch_size=batch_size, **ahead)
    found = reasons(records)
    said = {name: found.pop((name, 1)) for name in unwritable | unreadable}
    assert set(found) == set(BAD)
    assert said == {
        name: f"{folder / name}, page 1: {reason}"
        for name, reason in {
            "p0.png": "IndexError: list index out of range",
            "p1.png": "ZeroDivisionError: division by zero",
            "p2.png": "KeyError: 'image'",
            "p3.png": "MemoryError",
            "p4.png": "MemoryError",
            "p5.png": "TypeError: no size",
        }.items()
    }
    assert [Path(r["file"]).name for r in records if r["error"] is None] == ["a.pdf"] * 3
    assert summary.num_failed == 11


@pytest.mark.parametrize("where", ["unreadable", "unwritable"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_meant_to_end_the_run_does(folder, tmp_path, where, error):
    job = ColourJob(**{where: {"p3.png": error()}})
    out = tmp_path / "out.jsonl"
    with pytest.raises(error):
        run(folder, out, job=job)
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert texts[-1] == "(9, 9) (2, 0, 0)"  # of the page before it


@pytest.mark.parametrize("content", [None, b"", b"%PDF-1.4 and no more"])
def test_a_file_that_changes_after_it_was_listed_ends_nothing(folder, tmp_path, content):
    tasks = list_tasks(list(find_files([folder], DOCUMENTS)), Reader())
    for name in ("a.pdf", "p0.png"):
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
    out = tmp_path / "out.jsonl"
    with Journal(out, ColourJob.settings) as journal:
        run_pages(
            ColourJob(), tasks, tasks, journal, batch_size=2, num_workers=1, report=print,
            after_batch=list,
        )  # fmt: skip
    records = [json.loads(line) for line in out.read_text().splitlines()]
    found = reasons(records)
    changed = {key: found.pop(key) for key in [("p0.png", 1), *(("a.pdf", n) for n in (1, 2, 3))]}
    assert set(found) == set(BAD)
    for (name, page), reason in changed.items():
        assert reason.startswith(str(folder / name))
        assert "cannot be read" in reason
        if content is None:
            assert reason.startswith(f"{folder / name}, page {page} cannot be read: ")
            assert "No such file" in reason or "FileNotFoundError" in reason
    assert len(records) - len(reasons(records)) == 5


def test_a_run_is_continued_where_it_was_cut(folder, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run(folder, whole, batch_size=2)
    content = whole.read_bytes()
    for end in range(0, len(content), 397):
        cut.write_bytes(content[:end])
        summary, _, _ = run(folder, cut, batch_size=3)
        assert cut.read_bytes() == content
        assert summary.num_skipped == content[:end].count(b"\n")
    summary, _, _ = run(folder, cut)
    assert (summary.num_skipped, summary.num_failed, summary.tau) == (14, 5, None)


def test_failed_pages_are_tried_again_when_asked(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    run(folder, out)
    (folder / "p3_cut.png").write_bytes((folder / "p0.png").read_bytes())  # another content
    summary, _, _ = run(folder, out, password="sesame")
    assert (summary.num_skipped, summary.num_failed) == (12, 3)  # it also opens by now
    summary, records, _ = run(folder, out, password="sesame", retry_errors=True)
    assert (summary.num_skipped, summary.num_failed) == (11, 3)
    keys = [(Path(r["file"]).name, r["page"]) for r in records]
    assert keys[3] == ("locked.pdf", 1)
    assert ("locked.pdf", None) not in keys
    assert len(keys) == 14


def test_pages_can_be_chosen_and_added(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    _, records, _ = run(folder, out, ranges=page_ranges("2-"))
    found = {(Path(r["file"]).name, r["page"]): r["error"] for r in records}
    assert {("a.pdf", 2), ("a.pdf", 3), ("p0.png", None)} <= set(found)
    assert ("a.pdf", 1) not in found
    assert "has 1 page(s), and none of those asked for" in found["p0.png", None]
    summary, records, _ = run(folder, out)
    assert is_bad_as_expected(records)
    assert [r["page"] for r in records][:3] == [1, 2, 3]
    assert len(records) == 14
    assert summary.num_skipped == 2 + 3  # pages 2 and 3, and what cannot be opened


def test_a_changed_file_is_done_again(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    run(folder, out)
    write_pdf(folder / "a.pdf", ["new"])
    summary, records, _ = run(folder, out)
    assert summary.num_pages - summary.num_skipped == 1
    assert [r["page"] for r in records if r["file"].endswith("a.pdf")] == [1]


# -------------------------------------------------------------------------------------- workers
@pytest.mark.slow
def test_workers_give_the_same_file(folder, tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()
    run(folder, tmp_path / "one.jsonl")
    job = ColourJob(folder=calls, wait_s=0.1)
    summary, _, said = run(folder, tmp_path / "two.jsonl", job=job, num_workers=2)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert summary.num_failed == 5
    assert said == []
    assert len({path.name.split("-")[0] for path in calls.iterdir()}) == 2


@pytest.mark.slow
def test_a_worker_that_dies_takes_nothing_with_it(folder, tmp_path):
    job = ColourJob(deadly=("p2.png",))
    _, records, said = run(folder, tmp_path / "out.jsonl", job=job, num_workers=2, batch_size=3)
    assert len(said) == 1
    assert said[0].startswith("a worker died (exit code -9); tried once more: ")
    assert "p2.png, page 1" in said[0]
    assert len(records) == 14
    found = reasons(records)
    reason = found.pop(("p2.png", 1))
    assert "p2.png, page 1: the worker died at it twice (exit code -9)" in reason
    assert set(found) == set(BAD)


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_run(folder, tmp_path):
    job = ColourJob(load_error=ValueError("unknown model 'x'"))
    for num_workers in (1, 2):
        with pytest.raises(ValueError, match="unknown model 'x'"):
            run(folder, tmp_path / "out.jsonl", job=job, num_workers=num_workers)


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from pagejobs import ColourJob
from mmspec.documents import DOCUMENTS, Reader, find_files
from mmspec.jobs.journal import Journal
from mmspec.jobs.page_run import missing_tasks, run_pages
from mmspec.jobs.pages import list_tasks

if __name__ == "__main__":
    folder, out, num_workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    tasks = list_tasks(list(find_files([folder], DOCUMENTS)), Reader())
    with Journal(out, ColourJob.settings) as journal:
        run_pages(
            ColourJob(wait_s=0.3), tasks, tasks, journal, batch_size=1, num_workers=num_workers,
            report=print, after_batch=lambda answers: print(len(answers)),
        )
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_kill_9_and_resume_give_the_same_file(folder, tmp_path, num_workers):
    script, out, whole = (tmp_path / name for name in ("run.py", "out.jsonl", "whole.jsonl"))
    script.write_text(KILLED.format(tests=str(TESTS)))
    run(folder, whole)
    command = [sys.executable, "-u", str(script), str(folder), str(out), str(num_workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(4):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    num_done = out.read_bytes().count(b"\n")
    assert 3 < num_done < 14
    summary, _, _ = run(folder, out)
    assert summary.num_skipped == num_done
    assert out.read_bytes() == whole.read_bytes()
