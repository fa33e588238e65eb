"""The benchmark of videos on a tiny random pair: it ends, resumes, counts, and tells the truth."""

import json

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from video import BLOCKS, NUM_FRAMES, SIDE, far_pipe, seeded, with_text

from mmspec.adapters.dense_attention import DenseAttention
from mmspec.bench import video, video_runs
from mmspec.bench.measure import Budget, check_final_line
from mmspec.bench.report import Output
from mmspec.bench.video_pool import Pool, PooledVideoPipeline
from mmspec.bench.video_setups import Pair, Setup, default_setups, load_pair
from mmspec.bench.video_statistics import Paired, best_until, interpolated
from mmspec.latent_preview import LinearPreview
from mmspec.pipelines import SpeculativeVideoPipeline

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

OPTIONS = {"num_frames": NUM_FRAMES, "height": SIDE, "width": SIDE, "num_inference_steps": 2}
OPTIONS |= {"max_sequence_length": 8, "block_sizes": list(BLOCKS)}
PROMPTS = ["a cat runs", "a dog runs", "the cat sleeps", "a dog on the lawn", "the lawn", "a cat"]
SETUPS = "never,always,first-block,random:0.5,every:2,first-block+temporal@0.5,never/stitch:1"
SETUPS += ",first-block+sharpness@0.9+noise@0.5,first-block+noise:on=preview&pictures=2@0.5"
SETUPS += ",first-block+temporal:on=preview@0.5"


def brightness(frames, prompts):
    assert frames.shape[1:] == (NUM_FRAMES, 3, SIDE, SIDE)
    assert len(prompts) == len(frames)
    return [{"quality": one.item(), "half": one.item() / 2} for one in frames.mean((1, 2, 3, 4))]


@pytest.fixture(scope="module")
def pair():
    target, drafter = with_text(far_pipe(1)), far_pipe(2)
    for one in (target, drafter):
        DenseAttention(one.transformer).install()
    return Pair(
        name="tiny", target=target, drafter=drafter, options=OPTIONS, prompts=PROMPTS,
        num_judged=4, quality=brightness, preview=random_preview(),
    )  # fmt: skip


def random_preview():
    torch.manual_seed(9)
    tensors = {}
    for kind, size in {"first": 3 * 64, "later": 4 * 3 * 64}.items():
        tensors[f"{kind}.weight"] = 0.02 * torch.randn(size, 16)
        tensors[f"{kind}.bias"] = torch.full((size,), 0.5)
    return LinearPreview(tensors)


def measure(pair, out, *, setups=SETUPS, minutes=None, **sizes):
    return video.compare(
        pair,
        chosen=[Setup.parse(name) for name in setups.split(",")],
        scorers=(),
        rates=(),
        sizes={"prompts": 2, "calibration": 2, "timed": 1, "repeats": 1} | sizes,
        costs="measured",
        variant="dense",
        bundles=[],
        budget=Budget(minutes),
        seed=3,
        out=out,
        label="",
        output=Output(json_only=False),
    )


def test_a_run_ends_with_its_line_resumes_and_draws(pair, tmp_path, capsys):
    line = measure(pair, tmp_path)
    check_final_line(line)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    assert (line["failures"], line["left_out"]) == ([], [])
    rows = {row["setup"]: row for row in line["rows"] if row["type"] == "setup"}
    assert {row["same_blocks"] for row in rows.values()} == {1}
    assert len([row for row in line["rows"] if row["type"] == "exit"]) == 5
    assert list(rows) == SETUPS.split(",")
    assert rows["never"]["counts"] == {
        "target_forwards": 6, "target_reads": 2, "drafter_forwards": 0, "drafter_reads": 0,
        "decodes": 3, "pictures": 0, "previews": 0,
    }  # fmt: skip
    assert rows["first-block"]["counts"]["target_reads"] == 0
    assert rows["first-block"]["share_kept"] == pytest.approx(2 / 3, abs=1e-4)
    assert rows["never"]["over_target"] == [0, 0, 0]
    assert rows["never"]["retained"] == [1, 1, 1]
    judged = rows["first-block+temporal@0.5"]
    # Pictures of kept drafts are taken over: only refused ones are decoded in vain.
    assert judged["decodes_beyond"] == pytest.approx(2 - 3 * judged["share_kept"], abs=1e-3)
    assert judged["counts"]["pictures"] == 12
    # Refused drafts are decoded for the router alone.
    assert judged["judging_decoding_share"] > judged["judging_share"] > 0
    assert rows["first-block"]["judging_decoding_share"] == 0
    assert all(0 < row["first_s"] <= row["wall_s"] for row in rows.values())
    check_glances(line, rows)
    # Chance behind a first block has its two ends here: all drafts kept, and none.
    assert len(judged["over_chance"]) == 3
    assert rows["first-block"]["over_chance"] is None
    assert len(judged["thresholds"]) == 1
    assert len(rows["first-block+sharpness@0.9+noise@0.5"]["thresholds"]) == 2
    assert set(judged["over"]) == {"random", "first-block+random", "every"}
    [picture] = tmp_path.glob("video_*.png")
    with Image.open(picture) as drawn:
        assert drawn.size == (1080, 600)

    # The same command has nothing left to do; another prompt is added to what is there.
    samples = (tmp_path / "video.jsonl").read_text()
    again = measure(pair, tmp_path, minutes=0)
    assert (tmp_path / "video.jsonl").read_text() == samples
    assert again["rows"] == line["rows"]
    more = measure(pair, tmp_path, prompts=3)
    assert {row["num_prompts"] for row in more["rows"] if row["type"] == "setup"} == {3}
    added = (tmp_path / "video.jsonl").read_text().removeprefix(samples).splitlines()
    assert {json.loads(one)["prompt"] for one in added} == {2}
    [report] = tmp_path.glob("video_*.md")
    assert "| never/stitch:1" in report.read_text()


def check_glances(line, rows):
    # A preview of a judged draft, and of the block before where motion is seen.
    glance, motion = (rows[name] for name in SETUPS.split(",")[-2:])
    assert (glance["counts"]["previews"], motion["counts"]["previews"]) == (2, 4)
    assert (glance["counts"]["pictures"], motion["counts"]["pictures"]) == (4, 12)
    for row in (glance, motion):
        assert row["decodes_beyond"] == 0
        assert row["judging_decoding_share"] == row["judging_share"] > 0
        assert row["judging_wall_share"] > 0
    agreed = [row for row in line["rows"] if row["type"] == "agreement"]
    assert [(row["scorer"], row["drafts"]) for row in agreed] == [
        ("noise:on=preview&pictures=2", 4), ("temporal:on=preview", 4),
    ]  # fmt: skip
    assert all(0 <= row["own_threshold"] <= 1 and row["by_chance"] == 0.5 for row in agreed)


def test_what_the_time_did_not_allow_is_said(pair, tmp_path):
    line = measure(pair, tmp_path, setups="never,always", minutes=0)
    assert line["rows"] == []
    assert line["left_out"] == [
        "times: 1 of 1 inputs not measured", "quality: 2 of 2 prompts not complete",
    ]  # fmt: skip


def test_a_target_that_is_not_diffusers_fails_the_run(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(video_runs.torch, "equal", lambda ours, theirs: False)
    with pytest.raises(typer.Exit) as stopped:
        measure(pair, tmp_path, setups="never", prompts=1)
    assert stopped.value.exit_code == 1


@pytest.mark.parametrize(
    ("router", "is_alone"),
    [("every:2", False), ("every:2", True), ("first-block+temporal:-0.05", False)],
)
def test_videos_made_together_are_those_made_alone(pair, router, is_alone):
    drafter = None if is_alone else pair.drafter
    pool, alone = Pool(), SpeculativeVideoPipeline.from_model(pair.target, drafter=drafter)
    alone.set_progress_bar_config(disable=True)

    def call(pipe, seed, router=router):
        options = OPTIONS | {"output_type": "pt", "generator": seeded(seed), "drafter_steps": 1}
        return pipe(PROMPTS[seed], router=router, **options)

    def job(seed, router):
        pipe = PooledVideoPipeline(pair.target, drafter, pool)
        pipe.set_progress_bar_config(disable=True)
        return lambda: call(pipe, seed, router)

    cases = [(seed, name) for seed in range(3) for name in (router, "always", "never")]
    together = dict(zip(cases, pool.run([job(*case) for case in cases]), strict=True))
    counts = ("num_target_forwards", "num_target_prefills", "num_drafter_prefills", "num_kept")
    for seed in range(3):
        own, other = call(alone, seed), together[seed, router]
        torch.testing.assert_close(own.frames, other.frames, atol=1e-5, rtol=0)
        assert [r.source for r in own.blocks[0]] == [r.source for r in other.blocks[0]]
        for name in counts:
            assert getattr(own.stats, name) == getattr(other.stats, name)


def test_what_one_video_raises_ends_all(pair):
    pool = Pool()
    pipe = PooledVideoPipeline(pair.target, pair.drafter, pool)

    def fails():
        raise ArithmeticError("no")

    options = OPTIONS | {"generator": seeded()}
    with pytest.raises(ArithmeticError, match="no"):
        pool.run([lambda: pipe(PROMPTS[0], **options), fails])


# --------------------------------------------------------------------------- statistics


def test_quality_between_two_points_of_a_baseline():
    seconds, quality = np.array([4.0, 1.0, 2.0]), np.array([0.9, 0.3, 0.5])
    assert interpolated(seconds, quality, 1.5) == pytest.approx(0.4)
    assert interpolated(seconds, quality, 3.0) == pytest.approx(0.7)
    assert interpolated(seconds, quality, 9.0) == 0.9


def test_the_best_of_a_baseline_in_no_more_time():
    # It gets worse behind 2 seconds: whoever takes longer has to beat what those 2 seconds give.
    seconds, quality = np.array([4.0, 1.0, 2.0]), np.array([0.1, 0.3, 0.5])
    assert best_until(seconds, quality, 1.5) == pytest.approx(0.4)
    for slower in (2.0, 3.0, 4.0, 9.0):
        assert best_until(seconds, quality, slower) == 0.5


def test_a_slow_router_is_not_compared_with_what_is_slower_and_worse():
    # A quick rule has 0.7; every block given to the slow target makes it worse, down to 0.3.
    names = ["quick", "half", "target", "router", "slowest"]
    quality = [np.full(8, one) for one in (0.7, 0.5, 0.3, 0.6, 0.4)]
    seconds = [np.full(8, one) for one in (1.0, 2.0, 3.0, 2.0, 5.0)]
    kept = [np.full(8, one) for one in (1.0, 0.5, 0.0, 0.75, 0.25)]
    paired = Paired(names, quality, seconds, kept)
    curve = names[:3]
    assert paired.at_equal_time("router", curve).value == pytest.approx(0.6 - 0.7)
    assert paired.at_equal_time("slowest", curve).value == pytest.approx(0.4 - 0.7)
    # Between 1 and a half of the drafts chance has 0.6, between a half and none 0.4.
    assert paired.at_equal_share("router", curve).value == pytest.approx(0.0)
    assert paired.at_equal_share("slowest", curve).value == pytest.approx(0.0)
    assert paired.at_equal_share("target", ["half", "router"]) is None
    assert paired.at_equal_time("quick", ["half", "target"]) is None


def test_a_setup_is_compared_with_chance_in_the_same_places():
    chance = {
        "temporal@0.5": "random", "first-block+temporal@0.5": "first-block+random",
        "first-block": None, "every:2+temporal@0.5": None, "temporal@0.5/stitch:1": None,
    }  # fmt: skip
    assert {name: Setup.parse(name).chance for name in chance} == chance


def test_a_paired_difference_does_not_see_what_prompts_share():
    level = np.linspace(0, 1, 50)
    noise = np.where(np.arange(50) % 2, 0.01, -0.01)
    quality = [level, level + 0.1 + noise, level + 0.2]
    seconds = [np.full(50, 1.0), np.full(50, 2.5), np.full(50, 3.0)]
    paired = Paired(["fast", "router", "slow"], quality, seconds, seconds)
    mean = paired.quality("fast")
    assert mean.value == pytest.approx(0.5)
    # 1.96 standard errors of a mean of 50.
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * level.std() / 50**0.5, rel=0.1)
    gain = paired.difference("router", "fast")
    assert gain.value == pytest.approx(0.1)
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * 0.01 / 50**0.5, rel=0.1)
    assert gain.is_positive
    # At 2.5 seconds the line from (1, 0) to (3, 0.2) is at 0.15.
    equal = paired.at_equal_time("router", ["fast", "slow"])
    assert equal.value == pytest.approx(-0.05)
    assert equal.is_negative
    assert paired.at_equal_time("fast", ["router", "slow"]) is None
    assert paired.retained("slow", "fast").value == pytest.approx(1.4)
    assert paired.seconds("router") == pytest.approx(2.5)


def test_a_bootstrap_repeats_with_its_seed():
    values = np.random.default_rng(1).random((2, 20))
    first, again, other = (
        Paired(["a", "b"], *[values] * 3, seed=seed).difference("a", "b") for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert first.value == other.value == pytest.approx((values[0] - values[1]).mean())


def test_pictures_until_a_draft_is_refused_by_order():
    video_ = [
        [0.9, 0.8, 0.1, 0.7],  # refused at the third from the front, the second from behind
        [0.9, 0.9, 0.3, 0.9],  # the worst of the block before is in the same place
        [0.9, 0.9, 0.9, 0.9],  # kept
        [None, 0.9],  # one picture that cannot be judged
    ]
    counted = video_runs.count_exits([video_], 0.5)
    assert counted["refused"] == 3
    assert counted["first"] == pytest.approx((3 / 4 + 3 / 4 + 1 / 2) / 3)
    assert counted["last"] == pytest.approx((2 / 4 + 2 / 4 + 2 / 2) / 3)
    assert counted["worst_before"] == pytest.approx((3 / 4 + 1 / 4 + 1 / 2) / 3)
    assert video_runs.count_exits([video_], -1.0)["refused"] == 1
    assert video_runs.count_exits([[[0.9]]], 0.5)["first"] is None


# --------------------------------------------------------------------------- what is asked


def test_the_default_setups_can_be_made(pair):
    names = default_setups(["temporal", "sharpness"], [0.25, 0.5, 0.75], pair)
    assert len(set(names)) == len(names) > 15
    assert "never/stitch:1" in names
    assert "every:3" not in names
    shown = [name for name in names if ":on=" in name or ":pictures=" in name]
    assert len(shown) == 6
    assert "first-block+sharpness:on=preview&pictures=2@0.5" in shown
    for name in names:
        assert Setup.parse(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("never/stitch:x", "the stitch of a setup must be a number of steps"),
        ("worst", "unknown router 'worst'"),
        ("first-block+temporal@2", r"the accept rate of 'temporal' must be a number in \(0, 1\)"),
        ("random", "the argument of router 'random'"),
        ("temporal", "the argument of router 'temporal' must be a threshold"),
        ("temporal:see=seam@0.5", "what 'temporal' is shown must be on=preview, pictures=N, or"),
        ("noise:pictures=0@0.5", "pictures must be an integer >= 1"),
    ],
)
def test_a_setup_that_is_none_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Setup.parse(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "videos"}, "unknown pair of video models 'videos'"),
        ({"rates": "0.5,1"}, r"rates must be numbers in \(0, 1\), got '1'"),
        ({"drafter": "none"}, "unknown drafter 'none'; known: pair, self"),
        ({"attention": "fast"}, "unknown attention 'fast'; known: dense, flex"),
        ({"costs": "free"}, "unknown costs 'free'"),
        ({"scorers": "taste"}, "unknown entry 'taste'"),
        ({"label": "a b"}, "a label has letters"),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        video.run(**options, out=tmp_path)


def test_a_bundled_target_may_draft_for_itself():
    pair = load_pair("clips", "dense", "cpu", "self", num_inference_steps=4, drafter_steps=None)
    assert pair.drafter is None
    assert (pair.options["num_inference_steps"], pair.drafter_steps) == (4, 3)
    assert (len(pair.prompts), pair.num_judged, pair.num_blocks) == (320, 256, 9)


def test_bad_sizes_are_refused(pair, tmp_path):
    with pytest.raises(ValueError, match="prompts must be at most 4, the held-out prompts of tiny"):
        measure(pair, tmp_path, prompts=5)
    with pytest.raises(ValueError, match="timed must be at most prompts, got 3"):
        measure(pair, tmp_path, timed=3)
    with pytest.raises(ValueError, match="what stands before @ must be a router that scores"):
        measure(pair, tmp_path, setups="never,random@0.5")
