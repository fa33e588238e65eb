"""The cost model of videos: the published tables, and numbers done by hand."""

import pytest

from mmspec.bench.video_costs import (
    PUBLISHED,
    PUBLISHED_ALONE,
    PUBLISHED_ROWS,
    Costs,
    Counts,
    Decisions,
    affordable,
    published_alone,
    published_costs,
    published_decisions,
    published_rows,
    published_sight_rows,
)


@pytest.mark.parametrize("name", PUBLISHED_ALONE)
def test_one_model_alone_takes_the_published_seconds(name):
    seconds = PUBLISHED.seconds(published_alone(name))
    assert seconds == pytest.approx(PUBLISHED_ALONE[name], abs=0.5)


@pytest.mark.parametrize("threshold", PUBLISHED_ROWS)
def test_the_router_takes_the_published_seconds(threshold):
    share, stated = PUBLISHED_ROWS[threshold]
    seconds = PUBLISHED.seconds(published_decisions(share).as_published())
    assert seconds == pytest.approx(stated, abs=1.1)


def test_what_our_loop_would_take_for_the_first_published_row():
    row = published_rows(refused_share=1.0)[0]
    # 6.579 kept, 1.421 refused: 40 drafter steps, 8 + 1.421 readings, 10.421 decodes.
    steps = 5 * 2.421 * 1.66 + 40 * 0.06
    readings = 1.421 * 0.8 * 1.66 + 8 * 0.8 * 0.06
    assert row["deferred_s"] == pytest.approx(steps + readings + 10.421 * 1.3 + 96 * 0.14)
    assert row["ours_s"] == pytest.approx(row["deferred_s"] - 0.75 * 96 * 0.14)
    assert row["speedup_ours"] == pytest.approx(97.0 / 41.7, abs=0.03)
    # An early exit scores fewer pictures of what is refused, and changes nothing else.
    early = published_rows(refused_share=0.5)[0]
    assert row["ours_s"] - early["ours_s"] == pytest.approx(1.421 * 6 * 0.25 * 0.14)
    assert early["judging_ours"] < row["judging_ours"] < row["judging_model"]
    vain_s = row["ours_s"] * (row["judging_ours_decoding"] - row["judging_ours"])
    assert vain_s == pytest.approx(1.421 * 1.3)


def test_counts_of_both_loops_by_hand():
    decisions = Decisions(num_blocks=4, num_kept=1, num_steps=2, pictures_per_block=3)
    # Block 0 by the target, one draft kept, two refused.
    assert decisions.as_published() == Counts(
        target_forwards=6,
        target_reads=3,
        drafter_forwards=8,
        drafter_reads=3,
        decodes=6,
        pictures=9,
    )
    assert decisions.as_ours(0.5) == Counts(
        target_forwards=6,
        target_reads=2,
        drafter_forwards=6,
        drafter_reads=3,
        decodes=6,
        pictures=6,
    )


def test_previews_save_the_decodes_of_refused_drafts_and_cost_their_own():
    decisions = Decisions(num_blocks=4, num_kept=1, num_steps=2, pictures_per_block=12)
    counts = decisions.as_ours(on="preview", pictures=2)
    # Three drafts are judged, each by two pictures; only the four blocks are decoded.
    assert (counts.decodes, counts.pictures, counts.previews) == (4, 6, 3)
    costs = published_costs(0.01, 0.25)
    assert costs.phases(counts)["judge"] == pytest.approx(6 * 0.25 * 0.14 + 3 * 0.013)
    limit = affordable(costs, counts)
    exact = Costs(**vars_of(costs) | {"picture": limit})
    assert exact.judging_share(counts) == pytest.approx(0.05)


def test_the_first_published_row_by_what_a_scorer_is_shown():
    rows = {(r["on"], r["pictures"], r["price"]): r for r in published_sight_rows(0.01)}
    # As in the test of the row above: 1.421 refused of 8 judged.
    others = 5 * 2.421 * 1.66 + 40 * 0.06 + 1.421 * 0.8 * 1.66 + 8 * 0.8 * 0.06 + 9 * 1.3
    for price in (1.0, 0.25):
        for number in (12, 2):
            scoring = 8 * number * price * 0.14
            preview, decoded = (rows[on, number, price] for on in ("preview", "decoded"))
            judging = scoring + 8 * 0.013
            assert preview["judging"]["-0.7"] == pytest.approx(judging / (others + judging))
            judging = scoring + 1.421 * 1.3
            assert decoded["judging"]["-0.7"] == pytest.approx(judging / (others + judging))
            assert preview["seconds"]["-0.7"] < decoded["seconds"]["-0.7"]


def test_seconds_shares_and_what_a_picture_may_cost():
    costs = Costs(
        target_forward=2, target_read=3, drafter_forward=5, drafter_read=7, decode=11, picture=13,
        rest=17,
    )  # fmt: skip
    counts = Counts(
        target_forwards=1,
        target_reads=1,
        drafter_forwards=1,
        drafter_reads=1,
        decodes=1,
        pictures=2,
    )
    phases = {"target": 5, "draft": 12, "decode": 11, "judge": 26, "rest": 17}
    assert costs.phases(counts) == phases
    assert costs.seconds(counts) == 71
    assert costs.judging_share(counts) == 26 / 71
    # Two decodes more were of refused drafts.
    assert costs.judging_share(counts, num_vain=2) == (26 + 22) / 71
    # 45 seconds of other work, a tenth of 50 for two pictures.
    assert affordable(costs, counts, goal=0.1) == pytest.approx(2.5)
    assert affordable(costs, Counts.mean([vars_of(counts) | {"pictures": 0}])) is None
    halves = Counts.mean([vars_of(counts), vars_of(counts) | {"pictures": 1}])
    assert halves.pictures == 1.5


def vars_of(counts):
    return {name: getattr(counts, name) for name in counts.__slots__}


def test_a_negative_price_is_refused():
    with pytest.raises(ValueError, match="decode must be seconds >= 0, got -1"):
        Costs(target_forward=1, target_read=1, drafter_forward=1, drafter_read=1, decode=-1)
