import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mmspec.jobs import cut_half_line
from mmspec.jobs.journal import Journal

SETTINGS = {"model": "m", "seed": 0}


def record(file, page=1, *, digest="d", error=None, **more):
    return {"file": file, "page": page, "digest": digest, "error": error, **more}


def keys(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["file"], line["page"]) for line in lines]


@pytest.mark.parametrize("with_file", [True, False])
def test_records_are_read_back_and_the_last_one_counts(tmp_path, with_file):
    with Journal(tmp_path / "deep" / "a.jsonl" if with_file else None, SETTINGS) as journal:
        journal.add([record("a", text="é" * 40_000), record("b", error="bad")])
        journal.add([record("b", text="now good")])
        assert journal.get(("a", 1))["text"] == "é" * 40_000
        assert journal.get(("b", 1)) == record("b", text="now good") | {"settings": SETTINGS}
        assert journal.get(("c", 1)) is None
        assert not journal.entries["b", 1].has_failed
    if with_file:
        with Journal(journal.path, SETTINGS) as again:
            assert again.entries == journal.entries
            assert again.get(("a", 1))["text"] == "é" * 40_000


def test_a_half_written_line_is_cut_off_and_other_settings_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.add([record("a"), record("b")])
    whole = path.read_bytes()
    path.write_bytes(whole + '{"file": "é'.encode()[:-1])
    with pytest.raises(ValueError, match=r"line 1 was made with.* seed 0 \(asked for: 1\)"):
        Journal(path, SETTINGS | {"seed": 1})
    assert path.read_bytes() != whole
    with Journal(path, SETTINGS) as journal:
        assert path.read_bytes() == whole
        journal.add([record("c")])
    assert keys(path) == [("a", 1), ("b", 1), ("c", 1)]
    for content in ("no record\n", "no record"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"line 1(: not| must be) JSON"):
            Journal(path, SETTINGS)
        assert path.read_text() == content
    with Journal(path, SETTINGS, overwrite=True) as journal:
        assert journal.entries == {}
        assert path.read_text() == "no record"
        journal.add([record("new")])
    assert keys(path) == [("new", 1)]


@pytest.mark.parametrize("length", [0, 5, (1 << 16) - 1, 1 << 16, 3 << 16])
@pytest.mark.parametrize("head", [b"", b"whole\n"])
def test_half_lines_of_any_length_are_cut_off(tmp_path, length, head):
    path = tmp_path / "a.jsonl"
    path.write_bytes(head + b"x" * length)
    cut_half_line(path)
    assert path.read_bytes() == head


def test_the_end_is_in_the_order_of_the_input(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.add([record("c"), record("a", error="bad"), record("older"), record("b", None)])
        journal.add([record("a", text="good"), record("b", 2), record("b", 1)])
        wanted = [("a", 1), ("b", 1), ("b", 2), ("c", 1)]
        journal.sort(wanted, lambda key, _: key == ("b", None))
        assert keys(path) == [("older", 1), *wanted]
        assert journal.get(("a", 1))["text"] == "good"
        journal.add([record("d")])
        inode = path.stat().st_ino
        journal.sort([*wanted, ("d", 1)], lambda *_: False)
        assert path.stat().st_ino == inode, "was in order already"
    assert keys(path) == [("older", 1), *wanted, ("d", 1)]
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_names_that_are_no_utf_8_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.add([record("b\udcff.png")])
    with Journal(path, SETTINGS) as journal:
        assert list(journal.entries) == [("b\udcff.png", 1)]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"cannot write to {tmp_path / 'file'}"):
        Journal(tmp_path / "file" / "a.jsonl", SETTINGS)
    with pytest.raises(OSError, match=f"cannot write to {tmp_path}: Is a directory"):
        Journal(tmp_path, SETTINGS, overwrite=True)


FULL = """
import sys
from pathlib import Path
from mmspec.jobs.journal import Journal
with Journal(Path(sys.argv[1]), {}) as journal:
    for n in range(100):
        journal.add([{"file": f"{n}-{k}", "page": 1, "text": "x" * 100} for k in range(3)])
"""


def test_a_full_disk_leaves_whole_records(tmp_path):
    path = tmp_path / "a.jsonl"
    limit = 5000
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert f"cannot write to {path}: File too large; what was finished is kept" in done.stderr
    content = path.read_bytes()
    assert content.endswith(b"\n")
    found = keys(path)
    assert len(found) % 3 == 0
    assert 4000 < len(content) <= limit
    with Journal(Path(path), {}) as journal:
        assert len(journal.entries) == len(found)
        journal.add([record("more")])
