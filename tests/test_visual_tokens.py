"""The option that says which visual tokens a drafter reads, and the choice on literal rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_rows, tiny_model

import mmspec
from mmspec.visual_tokens import (
    VisualTokens,
    around_peak,
    cells,
    evenly,
    index_table,
    most_attended,
    without,
)

GOOD = {
    "all": ("all", 1.0, 1, False),
    "none": ("none", 1.0, 1, False),
    "reuse": ("all", 1.0, 1, True),
    "uniform:0.1": ("uniform", 0.1, 1, False),
    "uniform:1": ("uniform", 1.0, 1, False),
    "attention:.25": ("attention", 0.25, 1, False),
    "pool:2": ("pool", 1.0, 2, False),
    "self": ("self", 0.1, 1, False),
    "self:0.5": ("self", 0.5, 1, False),
    "reuse+uniform:0.1": ("uniform", 0.1, 1, True),
    "reuse+attention:0.1": ("attention", 0.1, 1, True),
    "reuse+pool:3": ("pool", 1.0, 3, True),
}
BAD = [
    None,
    0.1,
    "",
    "half",
    "ALL",
    "all ",
    "all:0.5",
    "none:1",
    "uniform",
    "uniform:",
    "uniform:0",
    "uniform:0.0",
    "uniform:1.1",
    "uniform:-0.1",
    "uniform:nan",
    "uniform:1e-1",
    "uniform:0.1.2",
    "uniform:.",
    "uniform: 0.1",
    "uniform:٠",
    "attention:2",
    "pool",
    "pool:1",
    "pool:2.0",
    "pool:²",
    "self:0",
    "reuse+",
    "reuse:0.1",
    "reuse+all",
    "reuse+none",
    "reuse+self",
    "reuse+reuse",
]


@pytest.mark.parametrize("option", GOOD)
def test_what_is_understood(option):
    sight = VisualTokens.parse(option)
    assert (sight.choice, sight.share, sight.side, sight.reuse) == GOOD[option]
    assert str(sight) == option


@pytest.mark.parametrize("option", BAD)
def test_everything_else_is_refused_before_a_model_is_asked(option):
    with pytest.raises(ValueError, match=r"visual_tokens must be 'all', 'none', .* got"):
        mmspec.speculate({"name": "model", "visual_tokens": option})


@given(st.text("alnoeusifrmtp:+.0123456789 -", max_size=20) | st.text(max_size=5))
def test_any_text_is_understood_or_refused(option):
    try:
        sight = VisualTokens.parse(option)
    except ValueError:
        return
    assert 0 < sight.share <= 1
    assert (sight.side >= 2) == (sight.choice == "pool")


@pytest.mark.parametrize(
    "members", ["all", ["all"], ["all", "self"], ["all", 3], None, [], {"all": 1}]
)
def test_members_that_cannot_be_mixed_are_refused(members):
    with pytest.raises(ValueError, match="members must be two or more visual_tokens"):
        mmspec.speculate({"name": "mixed", "members": members})


def test_the_target_needs_no_model_beside_it():
    with pytest.raises(ValueError, match=r"'self' drafts with the target itself; leave 'model'"):
        mmspec.speculate({"name": "model", "model": tiny_model(), "visual_tokens": "self"})


def test_a_share_is_a_decimal_fraction_and_never_nothing():
    counts = [0, 1, 9, 10, 19, 30, 25000]
    tenth = VisualTokens.parse("uniform:0.1")
    assert [tenth.num_kept(count) for count in counts] == [0, 1, 1, 1, 1, 3, 2500]
    assert VisualTokens.parse("uniform:0.7").num_kept(10) == 7


@pytest.mark.parametrize(("count", "kept"), [(0, 0), (1, 1), (10, 1), (10, 3), (7, 7), (25000, 9)])
def test_even_spacing(count, kept):
    indices = evenly(count, kept).tolist()
    assert len(set(indices)) == kept
    gaps = torch.tensor([-1, *indices]).diff()
    assert not kept or (0 <= min(indices) <= max(indices) < count)
    assert not kept or int(gaps[1:].max() if kept > 1 else 1) <= -(-count // kept)


def test_the_most_attended_come_first_and_the_rest_is_even():
    scores = torch.tensor([1.0, 1, 30, 1, 1, 20, 1, 1, 1, 1])
    # 30 of 58 are more than 40 %: one token, and three spread over the other nine.
    assert most_attended(scores, 4).tolist() == [1, 2, 5, 8]
    # 40 % of 100 need two of these; room is for one.
    assert most_attended(torch.tensor([30.0, 20, 25, 25]), 1).tolist() == [0]
    assert most_attended(torch.zeros(4), 2).tolist() == [0, 2]


def test_squares_are_numbered_by_their_first_tokens():
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    grid = torch.stack([rows * 0, rows * 0, rows, columns], dim=-1).flatten(0, 1)
    assert cells(grid, 2).view(3, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]]
    two_images = torch.cat([grid, grid + torch.tensor([1, 0, 0, 0])])
    assert cells(two_images, 4).tolist() == [0] * 12 + [1] * 12


def test_a_shortened_row_goes_on_where_the_whole_one_does():
    rows = make_rows([[5, 6, 7, 8], [5, 6]], [3, 3], slack=2)
    kept = without(rows, [{1, 2, 3}, set()])
    assert kept == [[0, 3], [0, 1]]
    assert index_table(rows, kept).tolist() == [
        [0, 3, 4, 5, 6, 7, 8, 8, 8],
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
    ]


def test_half_is_attended_and_half_follows_the_peak():
    scores = torch.tensor(
        [[0.0, 0.0, 5.0, 1.0, 0.0, 3.0], [0.0, 2.0, 1.0, 9.0, 9.0, 9.0], [9.0] * 6]
    )
    counts, kept = torch.tensor([6, 3, 0]), torch.tensor([4, 2, 0])
    chosen = around_peak(scores, counts, kept, 4)
    assert chosen.shape == (3, 4)
    assert chosen[0].tolist() == [2, 5, 3, 4]
    # Padding is never chosen, whatever stands there; behind the last comes the first.
    assert chosen[1, :2].tolist() == [1, 2]
    late = around_peak(torch.tensor([[0.0, 1.0, 4.0]]), counts[1:2], torch.tensor([3]), 3)
    assert sorted(late[0].tolist()) == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_a_row_is_chosen_for_as_if_it_were_alone(count, other, seed):
    scores = torch.rand(2, 12, generator=torch.Generator().manual_seed(seed))
    counts = torch.tensor([count, other])
    kept = (counts + 1) // 2
    both = around_peak(scores, counts, kept, int(kept.max()))
    for row, (num, most) in enumerate(zip(counts.tolist(), kept.tolist(), strict=True)):
        alone = around_peak(scores[row : row + 1, :num], counts[[row]], kept[[row]], most)
        assert both[row, :most].tolist() == alone[0].tolist()
        assert len(set(alone[0].tolist())) == most
        assert max(alone[0].tolist()) < num
