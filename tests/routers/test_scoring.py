"""Thresholds, aggregation, and the early exit that decides as full scoring does."""

import math
from statistics import NormalDist

import pytest
import torch
from blocks import place, view

from mmspec.routers import build_router
from mmspec.routers.scoring import Scorer, ScoringRouter, Sight, spread_batches
from mmspec.routers.sharpness import NoiseScorer
from mmspec.routers.temporal import TemporalScorer
from mmspec.routers.thresholds import FixedThreshold, RunningQuantile, score_at_rate


class Reading(Scorer):
    """A picture's score is its first pixel. Counts the pictures that it scored."""

    name = "reading"

    def __init__(self, batch_size=1):
        self.batch_size = batch_size
        self.num_scored = 0

    def batches(self, block):
        for batch in spread_batches(block.frames(), self.batch_size):
            self.num_scored += len(batch)
            yield batch[:, 0, 0, 0]


def frames_of(scores):
    return torch.tensor(scores, dtype=torch.float64)[:, None, None, None].expand(-1, 3, 2, 2)


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("worst", -1.0), ("mean", 1.5), (0.5, 1.0), (0.0, -1.0), (1.0, 5.0)]
)
def test_aggregation(aggregate, expected):
    router = ScoringRouter(Reading(2), -2.0, aggregate=aggregate)
    assert router.judge(view(frames_of([1.0, 5.0, -1.0, 1.0]))).score == expected


@pytest.mark.parametrize("batch_size", [1, 3, 4, 12])
def test_early_exit_decides_as_full_scoring_for_worst_frame(batch_size):
    generator = torch.Generator().manual_seed(0)
    early, kept = 0, 0
    for _ in range(300):
        scores = torch.randn(12, generator=generator, dtype=torch.float64)
        if torch.rand((), generator=generator) < 0.1:
            scores[torch.randint(12, (), generator=generator)] = math.nan
        block = view(scores[:, None, None, None].expand(-1, 3, 2, 2))
        scorer = Reading(batch_size)
        judged = ScoringRouter(scorer, -1.5).judge(block)
        # Full scoring: what the median of one value, the worst picture, is not stopped for.
        full = ScoringRouter(Reading(batch_size), -1.5, aggregate=0.0).judge(block)
        assert judged.keep == full.keep == bool((scores >= -1.5).all())
        if judged.keep:
            assert scorer.num_scored == 12
            assert judged.score == full.score
        early += 12 - scorer.num_scored
        kept += judged.keep
    assert 0 < kept < 300
    assert (early > 0) == (batch_size < 12)


def test_the_first_bad_picture_ends_the_scoring():
    scorer = Reading(4)
    judged = ScoringRouter(scorer, 0.0).judge(view(frames_of([1.0] * 3 + [-1.0] + [1.0] * 8)))
    # Batches are spread: 0, 3, 6, 9 comes first.
    assert (judged.keep, judged.score, scorer.num_scored) == (False, -1.0, 4)


@pytest.mark.parametrize("aggregate", ["mean", 0.3])
def test_other_aggregations_score_everything(aggregate):
    scorer = Reading()
    ScoringRouter(scorer, 9.0, aggregate=aggregate).judge(view(frames_of([1.0, 2.0, 3.0])))
    assert scorer.num_scored == 3


def test_a_running_threshold_scores_everything_for_the_next_block():
    scorer = Reading()
    router = ScoringRouter(scorer, RunningQuantile(0.5, 5.0, 1.0))
    judged = router.judge(view(frames_of([-1.0, -2.0, -3.0])))
    assert (judged.keep, judged.score, scorer.num_scored) == (False, -3.0, 3)


@pytest.mark.parametrize("aggregate", ["worst", "mean", 0.5])
@pytest.mark.parametrize("scores", [[1.0, math.nan], [math.nan, 1.0], []])
def test_nan_or_nothing_never_keeps(aggregate, scores):
    router = ScoringRouter(Reading(), -math.inf, aggregate=aggregate)
    judged = router.judge(view(frames_of(scores)))
    assert math.isnan(judged.score)
    assert not judged.keep


def test_a_score_at_the_threshold_keeps():
    assert ScoringRouter(Reading(), 1.0).judge(view(frames_of([1.0, 2.0]))).keep


def test_the_running_threshold_starts_at_the_prior_and_follows_the_scores():
    threshold = RunningQuantile(0.6, 10.0, 2.0, weight=5)
    law = NormalDist(10.0, 2.0)
    # Of five pseudo scores at 10, 30, 50, 70 and 90%, three reach the one at 50%.
    assert threshold.at(()) == pytest.approx(law.inv_cdf(0.5))
    far = place(scores=[0.0, None, math.nan] * 200).history
    assert threshold.at(far) == 0.0
    assert threshold.at(place(scores=[None, math.nan, math.inf]).history) == threshold.at(())


def test_the_running_threshold_keeps_the_wanted_share():
    generator = torch.Generator().manual_seed(0)
    threshold = RunningQuantile(0.72, 0.0, 3.0)
    kept = 0
    for _ in range(200):
        scores = torch.randn(9, generator=generator).tolist()
        kept += sum(
            score >= threshold.at(place(scores=scores[:k]).history)
            for k, score in enumerate(scores)
        )
    # The prior is three times as wide as the scores, and nine of them do not wash it out.
    assert 0.72 < kept / 1800 < 0.9
    threshold = RunningQuantile(0.72, 0.0, 1.0)
    kept = sum(
        score >= threshold.at(()) for score in torch.randn(4000, generator=generator).tolist()
    )
    assert abs(kept / 4000 - 0.7) < 0.05


def test_score_at_rate_counts_ties_and_what_could_not_be_judged():
    assert score_at_rate([3.0, 1.0, 2.0, 2.0], 0.5) == 2.0
    assert score_at_rate([float(k) for k in range(10)], 0.7) == 3.0
    assert score_at_rate([1.0, math.nan], 0.5) == 1.0
    with pytest.raises(ValueError, match="scores must be numbers in 2 or more of 2 cases"):
        score_at_rate([1.0, math.nan], 1.0)


def test_a_router_is_named_as_it_would_be_typed():
    router = ScoringRouter(TemporalScorer("seam"), -0.03, aggregate=0.1)
    typed = build_router(router.name)
    assert router.name == typed.name == "temporal:-0.03,aggregate=0.1,see=seam"
    assert router.score_name == typed.score_name == "temporal,aggregate=0.1,see=seam"
    running = ScoringRouter(Reading(), RunningQuantile(0.5, -1.0, 2.0))
    assert running.name == "reading:accept=0.5,mean=-1.0,std=2.0,weight=5"


def test_a_threshold_must_be_a_number():
    with pytest.raises(ValueError, match="the threshold must be a number, got nan"):
        FixedThreshold(math.nan)
    with pytest.raises(ValueError, match="threshold must be a number or a Threshold, got 'low'"):
        ScoringRouter(Reading(), "low")


# --------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize(
    ("most", "shown"),
    [(1, [5]), (2, [0, 11]), (3, [0, 6, 11]), (4, [0, 4, 7, 11]), (12, range(12)), (20, range(12))],
)
def test_a_few_pictures_are_spread_over_the_block(most, shown):
    scorer = Reading(2)
    frames = frames_of([float(k) for k in range(12)])
    judged = ScoringRouter(scorer, -1.0, sight=Sight(pictures=most)).judge(view(frames))
    assert (judged.score, scorer.num_scored) == (min(shown), len(shown))
    picked = Sight(pictures=most).of(view(frames)).frames()
    assert picked[:, 0, 0, 0].tolist() == list(shown)


def test_what_is_shown_is_part_of_the_name_of_a_score():
    typed = build_router("noise:-0.5,pictures=2,on=preview")
    built = ScoringRouter(NoiseScorer(), -0.5, sight=Sight(on="preview", pictures=2))
    assert typed.score_name == built.score_name == "noise,on=preview,pictures=2"
    assert built.name == "noise:-0.5,on=preview,pictures=2"
    assert build_router("noise:-0.5,on=decoded").score_name == "noise"
    assert (typed.needs_preview, build_router("noise:0").needs_preview) == (True, False)
    assert build_router("first-block+noise:0,on=preview").needs_preview
    with pytest.raises(ValueError, match="view of a block must be with previews, got None"):
        typed.judge(view(frames_of([1.0])))


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ("noise:0,on=latents", "on must be 'decoded' or 'preview', got 'latents'"),
        ("noise:0,pictures=0", "pictures must be an integer >= 1, got 0"),
        ("noise:0,pictures=few", "pictures must be an integer >= 1, got 'few'"),
        ("temporal:0,pictures=2", "unknown setting of router 'temporal' 'pictures'"),
    ],
)
def test_what_cannot_be_shown_is_refused(router, message):
    with pytest.raises(ValueError, match=message):
        build_router(router)


def test_motion_is_not_seen_in_a_few_pictures():
    with pytest.raises(ValueError, match="pictures must be left out for 'temporal'"):
        ScoringRouter(TemporalScorer(), 0.0, sight=Sight(pictures=2))
