"""Commands that are killed in the middle and started again leave the files of a run without a kill.

`mmspec parse` is in test_cli_documents.py.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from saved import save_janus, save_vlm
from typer.testing import CliRunner
from video import save_pair

from mmspec.cli import app

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]
PROMPTS = ["a cat", "a dog runs", "the lawn"]
#: Long enough that a kill comes before the end.
NUM_PICTURES = 40
#: Longest wait for a run to be in its middle.
PATIENCE_S = 120


def video(folder):
    target, drafter = save_pair(folder)
    return ["video", *PROMPTS, "--model", target, "--drafter", drafter, "--steps", 8]


def films(folder):
    return [*video(folder), "--format", "webp"]


def frames(folder):
    return [*video(folder), "--format", "frames", "--router", "first-block+temporal:-0.05"]


def images(folder):
    command = ["image", "a red hair", "--model", save_janus(folder), "--num", NUM_PICTURES]
    return [*command, "--batch-size", 1, "--scale", 1]


def captions(folder):
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(NUM_PICTURES):
        Image.new("RGB", (8, 8), (number, 0, 99)).save(pictures / f"p{number:02d}.png")
    command = ["caption", pictures, "--model", save_vlm(folder / "vlm"), "--max-new-tokens", 40]
    return [*command, "--temperature", 1, "--prompt", "what is it"]


def has_begun_a_film(out):
    return any(out.glob(".0001-00.webp.*.part"))


def has_begun_frames(out):
    return any(out.glob(".0001-00.*.part/*.png"))


def has_two_images(out):
    return (out / "0000-01.png").exists()


def has_two_captions(out):
    return out.exists() and out.read_bytes().count(b"\n") >= 2


def without_seconds(value):
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if not k.endswith("_time_s")}
    return list(map(without_seconds, value)) if isinstance(value, list) else value


def content(out):
    """All bytes below a path; lines of JSON without what a clock says."""
    files = [out] if out.is_file() else [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(out)): [
            without_seconds(json.loads(line)) for line in path.read_text().splitlines()
        ]
        if path.suffix == ".jsonl"
        else path.read_bytes()
        for path in files
    }


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("make_command", "name", "is_in_the_middle", "skipped"),
    [
        (films, "out", has_begun_a_film, "num_skipped"),
        (frames, "out", has_begun_frames, "num_skipped"),
        (images, "out", has_two_images, "num_skipped"),
        (captions, "out.jsonl", has_two_captions, "skipped"),
    ],
)
def test_a_run_that_is_killed_leaves_what_an_unbroken_run_leaves(
    tmp_path, make_command, name, is_in_the_middle, skipped
):
    command = [*map(str, make_command(tmp_path)), "--json"]
    whole, out = tmp_path / "whole" / name, tmp_path / "killed" / name
    run(*command, "--out", whole)
    process = subprocess.Popen(
        [sys.executable, "-m", "mmspec.cli", *command, "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + PATIENCE_S
        while not is_in_the_middle(out):
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert content(out) != content(whole)
    again = run(*command, "--out", out)
    assert again[skipped] >= 1
    assert content(out) == content(whole)
