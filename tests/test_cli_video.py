import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from video import Scripted, save_pair, seeded

from mmspec.cli import app
from mmspec.jobs.calibration import expected_seconds, histogram
from mmspec.jobs.requests import VisualRequest
from mmspec.jobs.video import VideoRun, VideoSettings, run_videos
from mmspec.pipelines import SpeculativeVideoPipeline
from mmspec.routers.calibration import Calibration, calibrate
from mmspec.video_files import read_video_metadata

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
PROMPTS = ["a cat", "a dog runs", "the lawn"]
SECONDS = {
    f"{name}_time_s" for name in ("draft", "judge", "target", "decode", "first_block", "wall")
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def command(pair):
    return ["video", "--model", pair[0], "--drafter", pair[1], "--json", "--format", "webp"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def reason(*arguments, code=2):
    """The one line that a failure prints."""
    result = run(*arguments, code=code)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(value):
    """The same without what a clock says."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k not in SECONDS}
    return list(map(without_seconds, value)) if isinstance(value, list) else value


# --------------------------------------------------------------------------------------- files
def test_frames_of_never_are_those_of_diffusers(command, pair, tmp_path):
    out = tmp_path / "out"
    summary = json.loads(
        run(*command, "a cat", "--router", "never", "--format", "frames", "--out", out, "--seed",
            4, "--scale", 2).stdout
    )  # fmt: skip
    assert (summary["num_videos"], summary["stats"][0]["guarantee"]) == (1, "exact")
    pipe = SpeculativeVideoPipeline.from_pretrained(pair[0])
    pipe.set_progress_bar_config(disable=True)
    names = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale")
    plain = pipe.target(
        "a cat", **{name: pipe.defaults[name] for name in names}, generator=seeded(4),
        max_sequence_length=8, chunk_partition=[1, 1], output_type="pil",
    )  # fmt: skip
    files = sorted((out / "0000-00").iterdir())
    assert len(files) == 5
    for file, image in zip(files, plain.frames[0], strict=True):
        with Image.open(file) as saved:
            assert saved.size == (32, 32)
            assert np.array_equal(np.asarray(saved)[::2, ::2], np.asarray(image))


def test_a_video_says_how_it_was_made_and_its_timeline_who_made_it(command, tmp_path):
    out = tmp_path / "out"
    result = run(*command[:-3], *command[-2:], *PROMPTS[:2], "--out", out, "--timeline")
    assert "2 made; 4 blocks, 2 drafted, 2 kept" in result.stdout
    assert "first-block, lossy" in result.stdout
    assert "1/2 0000-00.webp: 1 of 2 blocks by the drafter" in result.stderr
    names = ["0000-00.timeline.png", "0000-00.webp", "0001-00.timeline.png", "0001-00.webp"]
    assert sorted(path.name for path in out.iterdir()) == [*names, "videos.jsonl"]
    shown = json.loads(run("video", "--show", out / "0001-00.webp", "--json").stdout)
    assert shown == read_video_metadata(out / "0001-00.webp")
    assert (shown["prompt"], shown["seed"], shown["router"]) == ("a dog runs", 0, "first-block")
    assert "prompt: a cat" in run("video", "--show", out / "0000-00.webp").stdout.splitlines()
    Image.new("RGB", (2, 2)).save(tmp_path / "other.webp")
    assert "is no video that says how" in reason("video", "--show", tmp_path / "other.webp")
    line = lines_of(out / "videos.jsonl")[0]
    assert [block["source"] for block in line["blocks"]] == ["target", "drafter"]
    assert [block["is_drafted"] for block in line["blocks"]] == [False, True]
    with Image.open(out / "0000-00.webp") as film:
        assert film.n_frames == 5
        film.load()
        assert film.info["duration"] == 125  # fps 8 of the folder's defaults


# ----------------------------------------------------------------------------- kills
def test_a_killed_run_is_continued(command, prompts, tmp_path):
    out = tmp_path / "out"
    command = [*command, "--file", prompts, "--out", out, "--router", "first-block+temporal:-0.05"]
    assert json.loads(run(*command).stdout)["num_videos"] == 3
    journal = out / "videos.jsonl"
    files = sorted(out.glob("*.webp"))
    content, lines = [file.read_bytes() for file in files], lines_of(journal)
    # Killed while the second line was written, with a part of the third video.
    whole = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(whole[0] + whole[1][:60])
    files[2].rename(out / ".0002-00.webp.99999.part")
    first = files[0].stat().st_mtime_ns
    again = json.loads(run(*command).stdout)
    assert (again["num_videos"], again["num_skipped"]) == (2, 1)
    assert [file.read_bytes() for file in sorted(out.glob("*.webp"))] == content
    assert files[0].stat().st_mtime_ns == first
    assert without_seconds(lines_of(journal)) == without_seconds(lines)
    assert len(list(out.iterdir())) == 4
    kept = json.loads(run(*command).stdout)
    assert (kept["num_videos"], kept["num_skipped"], kept["stats"]) == (0, 3, [])
    # A timeline that is missing is made, with its video; one that was half drawn is removed.
    (out / ".0000-00.timeline.png.99999.part").touch()
    assert json.loads(run(*command, "--timeline").stdout)["num_videos"] == 3
    assert [file.read_bytes() for file in files] == content
    assert len(list(out.glob("*.timeline.png"))) == 3
    assert len(list(out.iterdir())) == 7


class Stopped(BaseException):
    """As Ctrl-C."""


def test_a_run_that_is_stopped_in_a_video_leaves_nothing_half_done(pair, tmp_path):
    pipe = SpeculativeVideoPipeline.from_pretrained(pair[0])
    pipe.set_progress_bar_config(disable=True)
    settings = VideoSettings(
        model="m", drafter=None, dtype="float32", options={}, format="frames", fps=None, scale=1
    )

    def stop(name):
        raise Stopped

    class Stopping:
        """Stops behind the first block of the second video."""

        defaults, check_request, count = pipe.defaults, pipe.check_request, 0

        def stream(self, prompt, **options):
            self.count += 1
            if self.count == 2:
                options["callback_on_step_end"] = lambda pipe, index, details: stop(index)
            return pipe.stream(prompt, **options)

    def made(used, out):
        requests = [VisualRequest(prompt=prompt) for prompt in PROMPTS]
        return run_videos(
            VideoRun(load=lambda: used, requests=requests, out=out, num=1, settings=settings,
                     timeline=False, report=lambda line: None)
        )  # fmt: skip

    with pytest.raises(Stopped):
        made(Stopping(), tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["0000-00", "videos.jsonl"]
    assert made(pipe, tmp_path / "a").num_skipped == 1
    made(pipe, tmp_path / "b")
    files = [
        {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*.png"))}
        for out in (tmp_path / "a", tmp_path / "b")
    ]
    assert len(files[0]) == 15
    assert files[0] == files[1]
    # A folder whose line is lost is known by its pictures, and made again.
    (tmp_path / "a" / "videos.jsonl").unlink()
    assert made(pipe, tmp_path / "a").num_videos == 3


def test_a_folder_is_not_continued_with_other_settings_or_prompts(command, tmp_path):
    out = tmp_path / "out"
    run(*command, "a cat", "--out", out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    line = reason(*command, "a cat", "--out", out, "--steps", 3)
    assert "made with other settings: num_inference_steps None (asked for: 3)" in line
    line = reason(*command, "a cat", "--out", out, "--attention", "dense")
    assert "other settings: attention None (asked for: 'dense')" in line
    line = reason(*command, "a dog", "--out", out, "--seed", 1)
    assert "made with prompt 'a cat' (asked for: 'a dog'), seed 0 (asked for: 1)" in line
    (out / "videos.jsonl").unlink()
    assert "prompt 'a cat' (asked for: 'a dog')" in reason(*command, "a dog", "--out", out)
    shutil.copy(out / "0000-00.webp", out / "0001-00.webp")
    Image.new("RGB", (4, 4)).save(out / "0001-00.webp")
    assert "made with prompt 'none'" in reason(*command, "a cat", "a dog", "--out", out)
    assert (out / "0000-00.webp").read_bytes() == before[out / "0000-00.webp"]


# --------------------------------------------------------------------------------------- refused
def test_what_cannot_be_written_is_found_before_a_model_is_loaded(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    missing = ["video", "a cat", "--model", tmp_path / "no" / "model", "--format", "gif"]
    assert f"cannot write to {blocked}" in reason(*missing, "--out", blocked / "out", code=1)
    out = ["--out", tmp_path / "out"]
    assert "unknown format 'avi'; known: mp4, gif" in reason(*missing, *out, "--format", "avi")
    assert "fps must be above 0 and at most 50 for gif" in reason(*missing, *out, "--fps", 60)
    assert "--out must be a folder" in reason(*missing, "--out", tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    line = reason(*missing, *out, "--format", "mp4", code=1)
    assert "pip install 'mmspec[video]'" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_bad_requests_are_refused_before_any_video(command, tmp_path):
    out = tmp_path / "out"
    assert "prompt 1 must be a non-empty string" in reason(*command, "a cat", " ", "--out", out)
    line = reason(*command, "a cat", "--out", out, "--frames", 9)
    assert "for num_frames=9 makes 3 latent frames" in line
    assert "--block-sizes must be counts" in reason(*command, "a", "--block-sizes", "1,x")
    assert "stitch must be k" in reason(*command, "a", "--stitch", "9", "--out", out)
    assert "attention must be None or 'flex'" in reason(
        *command, "a", "--attention", "x", "--out", out
    )
    assert "unknown router 'magic'" in reason(*command, "a", "--router", "magic", "--out", out)
    assert "unknown model 'clip'; known: self, bundled:clips" in reason(
        *command, "a", "--drafter", "clip", "--out", out
    )
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a cat"}\n{"prompt": "a dog", "height": 20}')
    line = reason(*command, "--file", lines, "--out", out)
    assert f"{lines}, line 2: height must be a multiple of 16" in line
    assert [path.name for path in out.iterdir()] == ["videos.jsonl"]
    assert (out / "videos.jsonl").read_bytes() == b""
    for arguments in (["video"], ["video", "a", "--file", lines], ["calibrate"]):
        run(*arguments, code=2)


# ------------------------------------------------------------------------------------- calibrate
@pytest.fixture
def calibrating(pair, prompts, tmp_path):
    return [
        "calibrate", "--model", pair[0], "--drafter", pair[1], "--prompts", prompts, "--num", 2,
        "--router", "first-block+temporal:see=all", "--out", tmp_path / "temporal.json",
    ]  # fmt: skip


def test_a_calibration_finds_the_threshold_and_is_continued(calibrating, command, tmp_path):
    out, journal = tmp_path / "temporal.json", tmp_path / "temporal.scores.jsonl"
    shown = run(*calibrating, "--accept-rate", 0.5).stdout
    found = Calibration.load(out)
    recorded = lines_of(journal)
    assert [line["file"] for line in recorded] == [
        "0000-00", "0000-01", "0001-00", "0001-01", "0002-00", "0002-01", "target"
    ]  # fmt: skip
    scores = [line["blocks"][1]["score"] for line in recorded[:-1]]
    assert found == calibrate(
        "temporal,see=all", scores, accept_rate=0.5, provenance=found.provenance
    )
    assert [block["source"] for block in recorded[0]["blocks"]] == ["target", "drafter"]
    assert [block["source"] for block in recorded[-1]["blocks"]] == ["target", "target"]
    assert f"threshold {found.threshold:.6g} of temporal,see=all keeps 50% of 6" in shown
    assert "s a video; the target alone" in shown
    router = f"first-block+temporal:see=all,calibration={out}"
    assert f"use it: --router {router}" in shown
    # Killed in the fourth line; the rest is made, and the answer is the same.
    content, whole = out.read_bytes(), journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(whole[:3]) + whole[3][:30])
    out.unlink()
    again = json.loads(run(*calibrating, "--accept-rate", 0.5, "--json").stdout)
    assert (again["num_videos"], again["num_skipped"]) == (6, 3)
    assert out.read_bytes() == content
    # Another aim needs no video.
    other = json.loads(run(*calibrating, "--accept-rate", 1, "--json").stdout)
    assert (other["num_skipped"], other["accept_rate"]) == (6, 1.0)
    assert other["threshold"] == min(scores)
    # The file is a router's, and keeps what it was calibrated to keep.
    run(*calibrating, "--accept-rate", 0.5)
    videos = ["--num", 2, "--file", tmp_path / "prompts.txt", "--out", tmp_path / "videos"]
    summary = json.loads(run(*command, *videos, "--router", router).stdout)
    assert sum(stats["num_kept"] for stats in summary["stats"]) == 3


def test_a_budget_takes_losses_of_the_recorded_blocks(calibrating, tmp_path):
    losses = tmp_path / "losses.jsonl"
    given = ["--budget", 0.5, "--losses", losses]
    names = [f"{row:04d}-{k:02d}" for row in range(3) for k in range(2)]

    def write(names):
        lines = [{"file": name, "block": 1, "loss": float(name[-1])} for name in names]
        losses.write_text("\n".join(map(json.dumps, lines)))

    write(names)
    found = json.loads(run(*calibrating, *given, "--json").stdout)
    recorded = lines_of(tmp_path / "temporal.scores.jsonl")[:-1]
    scores = [line["blocks"][1]["score"] for line in recorded]
    wanted = calibrate("t", scores, losses=[float(name[-1]) for name in names], budget=0.5)
    assert (found["threshold"], found["mean_loss"]) == (wanted.threshold, wanted.mean_loss)
    write(names[1:])
    line = reason(*calibrating, *given)
    assert "the losses must be one for each drafted block of" in line
    assert "('0000-00', 1)" in line
    write([*names, names[0]])
    assert "line 7 must be a block that did not come before" in reason(*calibrating, *given)


def test_a_budget_measures_losses_against_the_target_behind_the_same_drafts(pair, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "all.json"
    prompts.write_text("\n".join(PROMPTS[:2]))
    command = [
        "calibrate", "--model", pair[0], "--drafter", pair[1], "--prompts", prompts, "--frames", 9,
        "--block-sizes", "1,1,1", "--router", "temporal:see=all", "--height", 32,
        "--width", 32, "--out", out, "--budget", 10,
    ]  # fmt: skip
    found = json.loads(run(*command, "--json").stdout)
    lines = lines_of(tmp_path / "all.losses.jsonl")
    assert [line["file"] for line in lines] == ["0000-00", "0001-00"]
    losses = {line["file"]: dict(line["losses"]) for line in lines}
    # By hand: the target's block against the draft's, behind drafts. Block 0 has no step to judge,
    # so that it is the target's.
    pipe = SpeculativeVideoPipeline.from_pretrained(pair[0], drafter=pair[1])
    pipe.set_progress_bar_config(disable=True)

    def frames(prompt, drafted):
        wants = [0 < index < drafted for index in range(3)]
        stream = pipe.stream(
            prompt, num_frames=9, height=32, width=32, block_sizes=[1, 1, 1], output_type="pt",
            generator=seeded(0), router=Scripted([True] * 3, wants=wants),
        )  # fmt: skip
        return [block.frames.double() for block in stream]

    for name, prompt in zip(losses, PROMPTS, strict=False):
        drafts = frames(prompt, 3)
        assert list(losses[name]) == [1, 2]
        for index in (1, 2):
            wanted = (drafts[index] - frames(prompt, index)[index]).square().mean().sqrt().item()
            assert losses[name][index] == pytest.approx(wanted, rel=1e-4), (name, index)
            assert wanted > 1e-3
    every = [loss for blocks in losses.values() for loss in blocks.values()]
    assert found["mean_loss"] == pytest.approx(sum(every) / 6)
    # Killed behind the first video; the rest is measured, and the answer is the same.
    path = tmp_path / "all.losses.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.splitlines(keepends=True)[0] + b'{"fi')
    assert json.loads(run(*command, "--json").stdout)["mean_loss"] == found["mean_loss"]
    assert path.read_bytes() == whole
    line = reason(*command[:-1], 0.0)
    assert "no threshold keeps a block within the budget 0.0: the least mean loss is " in line


def test_bad_calibrations_are_refused_before_any_video(calibrating, tmp_path):
    for arguments, why in (
        ([], "the aim must be an accept rate, or a budget with or without losses"),
        (["--budget", "nan"], "the aim must be"),
        (["--accept-rate", 0.5, "--budget", 1], "the aim must be"),
        (["--accept-rate", 1.5], "the accept rate must be in (0, 1]"),
        (["--accept-rate", 0.5, "--router", "temporal:-0.1"], "must be without a threshold"),
        (["--accept-rate", 0.5, "--router", "always"], "must be one scorer"),
        (["--accept-rate", 0.5, "--frames", 9], "for num_frames=9 makes 3 latent frames"),
    ):
        assert why in reason(*calibrating, *arguments)
    assert not (tmp_path / "temporal.json").exists()
    blocked = tmp_path / "prompts.txt"
    line = reason(*calibrating, "--accept-rate", 0.5, "--out", blocked / "a.json", code=1)
    assert f"cannot write to {blocked}" in line


def block(index, score, *, drafted=True):
    return {"index": index, "score": score, "is_drafted": drafted, "draft_time_s": 1.0 * drafted,
            "judge_time_s": 0.5 * drafted, "target_time_s": 8.0}  # fmt: skip


def test_expected_seconds_are_those_of_the_sample():
    # A video of the target: 24 seconds, a third of them for the second block of 8 seconds' work.
    target = {"seconds": 24.0, "blocks": [block(0, None, drafted=False)] * 2}
    target["blocks"] = [target["blocks"][0], target["blocks"][0] | {"index": 1, "target_time_s": 4}]
    videos = [
        {"blocks": [block(0, None, drafted=False), block(1, -0.5)]},
        {"blocks": [block(0, None, drafted=False), block(1, -0.1)]},
    ]
    # The first block is the target's, 16 seconds; the second is drafted for 1.5 and redone for 8.
    assert expected_seconds(videos, target, -0.2) == (16 + 1.5 + 8 / 2, 24)
    assert expected_seconds(videos, target, -1)[0] == 17.5
    videos[1]["blocks"][1]["score"] = None
    assert expected_seconds(videos, target, -1)[0] == 17.5 + 4


def test_a_histogram_counts_every_score():
    scores = (-1.0, -0.5, -0.5, 0.0, None)
    lines = histogram(Calibration(score_name="t", threshold=-0.5, scores=scores))
    assert len(lines) == 11
    assert sum(int(line.split()[-1]) for line in lines[:-1]) == 4
    assert lines[-1] == "1 could not be judged"
    assert (lines[0].count("."), lines[0].count("#")) == (20, 0)
    assert lines[5].split() == ["-0.5", "#" * 40, "2"]
    alone = histogram(Calibration(score_name="t", threshold=0.0, scores=(0.25, 0.25)))
    assert alone[0].split() == ["0.25", "#" * 40, "2"]
