"""`mmspec caption` and `mmspec parse` with tiny random models."""

import json
import re

import pytest
import torch
from PIL import Image
from saved import save_vlm
from typer.testing import CliRunner

from mmspec.cli import app
from mmspec.jobs.captions import image_request
from mmspec.pipelines import SpeculativeVLMPipeline


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
