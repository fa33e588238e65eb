"""Routers by place, and several routers at once."""

import math

import pytest
from blocks import noise_frames, place, view

from mmspec.block_records import Judgement
from mmspec.records import Guarantee
from mmspec.routers import ROUTERS, AllRouter, build_router


def drafted(router, *, seed=0, num_blocks=9):
    return [router.wants_draft(place(index, seed=seed)) for index in range(num_blocks)]


def test_every_spaces_the_target_evenly():
    assert drafted(build_router("every:3")) == [False, True, True] * 3
    assert drafted(build_router("every:99")) == drafted(build_router("first-block"))


def test_random_is_a_function_of_seed_and_place():
    router = build_router("random:0.5")
    assert drafted(router) == drafted(build_router("random:0.5"))
    assert len({tuple(drafted(router, seed=seed)) for seed in range(20)}) > 15


def test_random_has_its_rate():
    router, count = build_router("random:0.7"), 3000
    share = sum(sum(drafted(router, seed=seed, num_blocks=3)) for seed in range(count // 3)) / count
    # Four standard deviations of a binomial law.
    assert abs(share - 0.7) < 4 * math.sqrt(0.7 * 0.3 / count)
    assert not any(drafted(build_router("random:0")))
    assert all(drafted(build_router("random:1")))


def test_only_never_is_exact():
    names = ("always", "first-block", "every:2", "random:0.5", "temporal:-0.1", "noise:-inf")
    assert {build_router(name).guarantee for name in names} == {Guarantee.LOSSY}
    assert build_router("never").guarantee == Guarantee.EXACT
    assert build_router("never+temporal:-0.1").guarantee == Guarantee.EXACT


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("best", "unknown router 'best'; known: always, brisque"),
        ("first-block+best", "unknown router 'best'"),
        ("first-block:2", "argument of router 'first-block' must be left out, got '2'"),
        ("every", "argument of router 'every' must be an integer >= 2, as every:3, got None"),
        ("every:1", "interval of router 'every' must be an integer >= 2, got 1"),
        ("random:1.5", r"must be a number in \[0, 1\], as random:0.7, got '1.5'"),
        ("random:nan", "must be a number in"),
        ("temporal", "argument of router 'temporal' must be a threshold as"),
        ("temporal:x", "threshold must be a number, got 'x'"),
        ("temporal:nan", "threshold must be a number, got nan"),
        ("temporal:-1,see=colour", "unknown penalty of router 'temporal' 'colour'; known: all"),
        ("temporal:-1,-2", "'threshold' of router 'temporal' must be given once"),
        ("temporal:-1,speed=2", "unknown setting of router 'temporal' 'speed'; known: threshold"),
        ("temporal:-1,aggregate=2", "aggregate must be 'worst', 'mean' or a quantile"),
        ("temporal:-1,accept=0.5", "argument of router 'temporal' must be a threshold as"),
        ("temporal:accept=0.5", "the prior of accept must be"),
        ("temporal:accept=0,mean=0,std=1", r"accept_rate must be a number in \(0, 1\], got 0.0"),
        ("temporal:accept=0.5,mean=0,std=1,weight=0.5", "weight of the prior must be an integer"),
        ("temporal:-1,mean=0", "mean, std and weight must be left out without accept"),
    ],
)
def test_bad_names_and_arguments_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        build_router(spec)


@pytest.mark.parametrize("name", ["image-reward", "clip-score", "pick-score", "hps", "brisque"])
def test_a_router_without_its_weights_is_refused_when_it_is_built(name, tmp_path):
    with pytest.raises(ValueError, match=f"router '{name}' "):
        build_router(f"{name}:0.5,weights={tmp_path}")


def test_every_name_is_that_of_its_class():
    arguments = {"every": ":2", "random": ":0.5"}
    scored = {"temporal", "noise", "sharpness"}
    heavy = {"image-reward", "clip-score", "pick-score", "hps", "brisque"}
    for name in set(ROUTERS) - heavy:
        spec = name + arguments.get(name, ":0" if name in scored else "")
        assert build_router(spec).name == spec


class Saying:
    """Answers with fixed words and counts the questions."""

    guarantee, needs_prompt, name = Guarantee.LOSSY, False, "saying"

    def __init__(self, score, *, keep=True, reads_history=False):
        self.judgement = Judgement(score=score, keep=keep)
        self.reads_history = reads_history
        self.num_asked = 0

    def wants_draft(self, place):
        return place.index != 2

    def judge(self, block):
        self.num_asked += 1
        return self.judgement


@pytest.mark.parametrize(
    ("first", "second", "expected", "num_asked"),
    [
        (Saying(1.0), Saying(2.0), (2.0, True), 1),
        (Saying(1.0, keep=False), Saying(2.0), (1.0, False), 0),
        (Saying(math.nan), Saying(2.0), (math.nan, True), 0),
        (Saying(1.0), Saying(2.0, keep=False), (2.0, False), 1),
    ],
)
def test_all_asks_in_order_and_stops_at_the_first_that_refuses(first, second, expected, num_asked):
    router = AllRouter([first, second, build_router("first-block")])
    judged = router.judge(view(noise_frames()))
    assert (judged.score, judged.keep) == pytest.approx(expected, nan_ok=True)
    assert second.num_asked == num_asked


def test_all_drafts_where_all_want_it():
    router = AllRouter([build_router("first-block"), Saying(0.0)])
    assert drafted(router)[:4] == [False, True, False, True]
    places = build_router("first-block+random:0.9")
    assert places.name == "first-block+random:0.9"
    assert places.judge(view(noise_frames())).keep
    assert not drafted(places)[0]


def test_a_running_threshold_shares_its_history_with_no_other_judge():
    running = "temporal:accept=0.5,mean=-0.1,std=0.1"
    assert build_router(f"first-block+{running}").reads_history
    with pytest.raises(ValueError, match="must be alone among those that look at a block"):
        build_router(f"noise:-1+{running}")
    with pytest.raises(ValueError, match="must be alone among those that look at a block"):
        AllRouter([build_router(f"first-block+{running}"), Saying(0.0)])
