"""Stale guesses that are replaced by what was seen beside the same neighbours before."""

import pytest
import torch
from tiny import make_rows
from toys import random_table, run_toy

from mmspec.drafters.jacobi import JacobiDrafter
from mmspec.drafters.mending import KEPT, Mender, line_starts
from mmspec.sampling import Allowed, AllowedTokens

V, COLUMNS = 4, 4


def mended(
    tokens: list[int],
    guesses: list[int],
    fed: list[int],
    stride=COLUMNS,
    earlier=(),
    allowed=None,
):
    """What becomes of guesses behind an image so far.

    ``fed`` begins with what is on their left; ``earlier`` are such lists of the steps before, each
    with what was chosen behind them.
    """
    rows = make_rows([[0]], [len(tokens) + len(guesses)])
    first = 1
    rows.tokens_BT[0, first : first + len(tokens)] = torch.tensor(tokens)
    rows.host_tokens[0] += tokens
    rows.lengths_B = rows.lengths_B + len(tokens)
    mender = Mender(rows, V, stride=stride, allowed=allowed)
    end = first + len(tokens)
    committed = rows.tokens_BT[:, : end - 1]
    mender.note(committed, torch.arange(end - 1)[None], torch.zeros_like(committed))
    for old, chosen in [*earlier, (fed, [0] * len(fed))] if fed else earlier:
        position = torch.arange(end - 1, end - 1 + len(old))[None]
        mender.note(torch.tensor([old]), position, torch.tensor([chosen]))
    position = torch.arange(end, end + len(guesses))[None]
    return mender.mended(torch.tensor([guesses]), position)[0][0].tolist()


#: Two lines of one pair each: 1 stood on the left with 2 above twice, and 3 followed.
PAIRS = [0, 2, 0, 2, 1, 3, 1, 3, 0, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("tokens", "fed", "wanted"),
    [
        (PAIRS, [0, 0], [3]),
        # The guess was made for what is on the left.
        (PAIRS, [1, 0], [0]),
        # It was made for nothing: what is on its left was never fed.
        (PAIRS, [], [3]),
        # Seen once only, in an earlier line.
        ([0, 2, 0, 2, 1, 3, 0, 0, 0, 2, 2, 2, 1], [0, 0], [0]),
        # Seen once only, but in this line.
        ([0, 2, 2, 2, 1, 3, 1], [0, 0], [3]),
        # Seen twice, but with another code the last time.
        ([0, 2, 0, 2, 1, 3, 1, 0, 0, 2, 2, 2, 1], [0, 0], [0]),
    ],
)
def test_a_stale_guess_becomes_what_followed_before(tokens, fed, wanted):
    assert mended(tokens, [0], fed) == wanted


@pytest.mark.parametrize(
    ("earlier", "wanted"),
    [
        # Fed 1 on the left, the target chose 2 here. That counts for more than the image, which
        # says 3.
        ([([1, 0], [2, 0])], [2]),
        # The latest time counts.
        ([([1, 0], [0, 0]), ([1, 0], [2, 0])], [2]),
        # It was chosen for another code on the left.
        ([([2, 0], [2, 0])], [3]),
        # Too long ago.
        ([([1, 0], [2, 0])] + [([0, 0], [0, 0])] * KEPT, [3]),
    ],
)
def test_a_place_remembers_what_was_chosen_there(earlier, wanted):
    assert mended(PAIRS, [0], [0, 0], earlier=earlier) == wanted


def test_a_row_that_begins_anew_remembers_nothing():
    rows = make_rows([[0]], [30])
    mender = Mender(rows, V, stride=COLUMNS)
    for token in (1, 2):
        mender.note(torch.tensor([[token]]), torch.tensor([[1]]), torch.tensor([[3 - token]]))
    rows.tokens_BT[0, 1], rows.lengths_B[0] = 1, 2
    rows.host_tokens[0].append(1)
    asked = torch.tensor([[0]]), torch.tensor([[2]])
    assert mender.mended(*asked)[0].tolist() == [[2]]
    mender.follow([0])
    # The first line goes on with its last code, for the guess was made for another.
    assert mender.mended(*asked)[0].tolist() == [[1]]


@pytest.mark.parametrize(
    ("tokens", "fed", "wanted"),
    [
        # Up to the end of the line, as nothing is known above it.
        ([0, 2], [0, 1, 1, 1], [2, 2, 1]),
        # Nothing has changed.
        ([0, 2], [2, 1, 1, 1], [1, 1, 1]),
        # The second line has other neighbours.
        ([0, 2, 0, 2, 2], [0, 1, 1, 1], [1, 1, 1]),
    ],
)
def test_a_first_line_goes_on_with_its_last_code(tokens, fed, wanted):
    assert mended(tokens, [1, 1, 1], fed) == wanted


def test_forced_tokens_stay_as_they_are():
    masks = torch.ones(2, V, dtype=torch.bool)
    masks[1, :3] = False
    classes = torch.tensor([0, 0, 0, 1])  # 3 ends a line
    table = AllowedTokens(class_of_position_T=classes, masks_CV=masks, since_prompt=True)
    assert mended([0, 2], [1, 3, 1], [0, 1, 3, 1]) == [2, 2, 1]
    assert mended([0, 2], [1, 3, 1], [0, 1, 3, 1], allowed=Allowed(table)) == [2, 3, 1]


@pytest.mark.parametrize("stride", [4, torch.tensor([0] * 3 + [3] * 6 + [0] * 4 + [4] * 8)])
def test_lines_begin_where_their_grid_says(stride):
    rows = make_rows([[0, 0, 0]], [21])
    starts = [0] * 4 + [4] * 4 + [8] * 4 + [12] * 4 + [16] * 4 + [20]
    if isinstance(stride, torch.Tensor):
        starts = [0] * 3 + [3] * 3 + [6] * 3 + [9] * 4 + [13] * 4 + [17] * 4
    assert line_starts(rows, stride)[0, 3:24].tolist() == [3 + start for start in starts]


def test_a_change_travels_to_the_right():
    """Stripes of which every guess is of the wrong phase, because the first code was."""
    stripes = [1, 2, 1, 2] * 3 + [1]
    assert mended(stripes, [1, 2, 1, 2], [2, 1, 2, 1, 2]) == [2, 1, 1, 2]


def test_strides_of_their_own_and_places_without_an_above():
    tokens = [0, 2, 0, 2, 1, 3, 1, 3, 0, 2, 2, 2, 1]
    stride = torch.full((20,), COLUMNS)
    assert mended(tokens, [0], [0, 0], stride=stride) == [3]
    # A first line, as that of a second grid, goes on with its last code.
    stride[len(tokens)] = 0
    assert mended(tokens, [0], [0, 0], stride=stride) == [1]


def stripes_with_chance(num_rows: int, columns: int) -> torch.Tensor:
    """Each row of the grid begins by chance with 0 or 1, and goes on in turn."""
    table = torch.full((num_rows * columns, V, V, V), -20.0, dtype=torch.float64)
    table[:, :, 0, 1] = table[:, :, 1, 0] = 20.0
    table[:, :, 2:, 0] = 20.0
    table[::columns, :, :, :2] = 1.0
    return table


def test_it_saves_forwards_where_codes_follow_from_those_before():
    table = stripes_with_chance(8, 12)
    run = {
        mend: run_toy(
            table,
            lambda rows, mend=mend: JacobiDrafter(rows, V, max_width=8, stride=12, mend=mend),
            num_rows=200,
            width=8,
        )
        for mend in (False, True)
    }
    assert torch.equal(run[False].outputs, run[True].outputs)
    assert run[True].tau > 1.2 * run[False].tau


@pytest.mark.parametrize("width", [2, 5, 9])
@pytest.mark.parametrize("stride", [1, 3, torch.tensor([0, 0, 0, 2, 2, 2, 2, 0, 3, 3, 3])])
def test_the_output_is_that_of_plain_decoding(width, stride):
    table = random_table(3, 11, 3)

    def make(rows):
        return JacobiDrafter(rows, 3, max_width=width, stride=stride, mend=True)

    plain, fast = (run_toy(table, make, num_rows=500, width=size) for size in (1, width))
    assert torch.equal(plain.outputs, fast.outputs)
    assert fast.num_accepted > 0


def test_it_is_refused_without_a_grid():
    with pytest.raises(ValueError, match="mend needs a stride"):
        JacobiDrafter(make_rows([[0]], [8]), V, max_width=4, mend=True)
