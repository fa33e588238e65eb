"""Image jobs: each file is there as soon as its image is complete."""

import numpy as np
import pytest
from PIL import Image
from saved import save_janus

from mmspec.jobs.image import ImageRun, ImageSettings, run_image_files
from mmspec.jobs.requests import VisualRequest
from mmspec.pictures import overlay
from mmspec.pipelines import SpeculativeImagePipeline

PROMPTS = ["a pixel avatar", "blue", "a pixel avatar with red hair and glasses", "red", "the hair"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> SpeculativeImagePipeline:
    pipe = SpeculativeImagePipeline.from_pretrained(save_janus(tmp_path_factory.mktemp("janus")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, out, *, batch_size, report=lambda line: None, decoder="exact"):
    settings = ImageSettings(
        model="janus", decoder=decoder, window=8, guidance=3.0, temperature=1.0, scale=2,
        dtype="float32",
    )  # fmt: skip
    run = ImageRun(
        load=lambda: pipe, requests=[VisualRequest(prompt=prompt) for prompt in PROMPTS], out=out,
        num=1, settings=settings, batch_size=batch_size, steps_map=True, report=report,
    )  # fmt: skip
    return run_image_files(run)


def test_a_run_that_is_killed_keeps_every_image_that_was_complete(pipe, tmp_path):
    whole, killed, lines = tmp_path / "whole", tmp_path / "killed", []
    summary = run(pipe, whole, batch_size=5)
    assert summary.num_images == 5

    def kill(line):
        lines.append(line)
        if len(lines) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, killed, batch_size=2, report=kill)
    assert [line.split()[0] for line in lines] == ["1/5", "2/5", "3/5"]
    assert {path.name for path in killed.iterdir()} == {
        name
        for line in lines
        for name in (line.split()[1], line.split()[1].replace(".png", ".steps.png"))
    }
    again = run(pipe, killed, batch_size=1)
    assert (again.num_images, again.num_skipped, len(again.batches)) == (2, 3, 1)
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.glob("????-??.png"):
        assert (killed / path.name).read_bytes() == path.read_bytes()
        with Image.open(path) as image, Image.open(path.with_suffix(".steps.png")) as shown:
            assert shown.size == (2 * image.width, image.height)
            over = np.asarray(shown, dtype=int)[:, : image.width]
            under = np.asarray(overlay(image, shown.crop((image.width, 0, *shown.size))), dtype=int)
            assert (over == under).all()


def test_decoders_whose_rows_cannot_be_refilled_run_in_batches(pipe, tmp_path):
    summary = run(pipe, tmp_path, batch_size=2, decoder="coupled")
    assert [stats.num_units for stats in summary.batches] == [32, 32, 16]
    assert summary.num_images == 5
