"""From recorded scores to a threshold, kept as JSON."""

import json
import math

import pytest

from mmspec.block_records import BlockRecord
from mmspec.routers import build_router, recording_router
from mmspec.routers.calibration import Calibration, calibrate, recorded_scores


def record(index, score):
    return BlockRecord(
        index=index, source="drafter", score=score, draft_time_s=0.0, judge_time_s=0.0,
        target_time_s=0.0,
    )  # fmt: skip


def test_scores_of_drafted_blocks():
    videos = [[record(0, None), record(1, 0.5)], [record(0, None), record(1, -1.0)]]
    assert recorded_scores(videos) == [0.5, -1.0]


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.5, 0.72, 1.0])
def test_the_threshold_keeps_the_wanted_share_of_the_sample(rate):
    scores = [math.sin(k) for k in range(100)]
    found = calibrate("temporal", scores, accept_rate=rate)
    assert found.accept_rate == pytest.approx(rate, abs=1e-9)


def test_the_budget_takes_the_lowest_threshold_within_it():
    scores, losses = [4.0, 3.0, 2.0, 1.0, math.nan], [-0.1, 0.1, 0.5, 4.0, 9.0]
    found = calibrate("temporal", scores, losses=losses, budget=0.1)
    assert (found.threshold, found.accept_rate) == (2.0, 0.6)
    assert found.mean_loss == pytest.approx(0.1)
    assert calibrate("temporal", scores, losses=losses, budget=0.9).threshold == 1.0
    with pytest.raises(ValueError, match=r"no threshold keeps a block within the budget -0\.5"):
        calibrate("temporal", scores, losses=losses, budget=-0.5)


def test_saved_and_loaded_with_provenance(tmp_path):
    path = tmp_path / "temporal.json"
    found = calibrate(
        "temporal", [-0.3, math.nan, -0.1, -0.2], accept_rate=0.5, provenance={"drafter": "tiny"}
    )
    found.save(path)
    assert Calibration.load(path) == found
    assert found.scores == (-0.3, None, -0.1, -0.2)
    content = json.loads(path.read_text())
    assert (content["accept_rate"], content["provenance"]) == (0.5, {"drafter": "tiny"})

    router = build_router(f"temporal:calibration={path}")
    assert router._threshold.value == -0.2
    running = build_router(f"first-block+temporal:accept=0.7,calibration={path}")
    assert running.reads_history
    for spec in ("noise", "temporal:see=seam"):
        name, _, more = spec.partition(":")
        with pytest.raises(ValueError, match="the calibration's score must be "):
            build_router(f"{name}:calibration={path},{more}".rstrip(","))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read the calibration"),
        ("[1]", "calibration's format must be 'mmspec router calibration 1', got None"),
        ('{"format": "x"}', "calibration's format must be"),
        (
            '{"format": "mmspec router calibration 1", "score_name": "temporal", "threshold": "3"}',
            "'threshold' of the calibration must be a finite number, got '3'",
        ),
    ],
)
def test_another_file_is_refused(content, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        build_router(f"temporal:calibration={path}")
    with pytest.raises(ValueError, match="cannot read the calibration"):
        Calibration.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "the aim must be accept_rate, or losses and budget"),
        ({"accept_rate": 0.5, "budget": 1.0}, "the aim must be"),
        ({"losses": [1.0, 2.0]}, "the aim must be"),
        ({"losses": [1.0], "budget": 1.0}, "losses must be finite numbers, one per score, 2"),
        ({"accept_rate": 0}, r"accept_rate must be a number in \(0, 1\]"),
    ],
)
def test_bad_aims_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate("temporal", [0.0, 1.0], **arguments)


def test_a_router_to_calibrate_scores_everything_and_keeps_it():
    router, score_name = recording_router("first-block+temporal:see=seam,aggregate=mean")
    assert router.name == "first-block+temporal:-inf,see=seam,aggregate=mean"
    assert score_name == "temporal,aggregate=mean,see=seam"
    assert recording_router("noise")[1] == "noise"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("first-block", "must be one scorer, alone or with routers that look at the place only"),
        ("temporal+noise", "must be one scorer"),
        ("temporal:-0.03", "must be without a threshold"),
        ("temporal:accept=0.5,mean=0,std=1", "must be without a threshold"),
        ("temporal:see=nothing", "unknown penalty"),
        ("magic", "unknown router 'magic'"),
    ],
)
def test_what_cannot_be_calibrated(spec, reason):
    with pytest.raises(ValueError, match=reason):
        recording_router(spec)
