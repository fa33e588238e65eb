"""Stale guesses that are replaced by what followed the same neighbours before."""

import pytest
import torch
from tiny import make_rows
from toys import random_table, run_toy

from mmspec.drafters.jacobi import JacobiDrafter
from mmspec.drafters.mending import Mender

V, COLUMNS = 4, 4


def mended(tokens: list[int], guesses: list[int], fed: list[int], known=(), stride=COLUMNS):
    """What becomes of guesses behind an image so far; ``fed`` begins with what is on their left."""
    rows = make_rows([[0]], [len(tokens) + len(guesses)])
    first = 1
    rows.tokens_BT[0, first : first + len(tokens)] = torch.tensor(tokens)
    rows.host_tokens[0] += tokens
    rows.lengths_B = rows.lengths_B + len(tokens)
    mender = Mender(rows, V, stride=stride)
    end = first + len(tokens)
    mender.note(torch.tensor([fed]), torch.arange(end - 1, end - 1 + len(fed))[None])
    is_known = torch.tensor([known or [True] * len(guesses)])
    position = torch.arange(end, end + len(guesses))[None]
    return mender.mended(torch.tensor([guesses]), position, is_known)[0][0].tolist()


@pytest.mark.parametrize(
    ("tokens", "fed", "known", "wanted"),
    [
        # Two rows of one pair each: 1 stood on the left with 2 above twice, and 3 followed.
        ([0, 2, 0, 2, 1, 3, 1, 3, 0, 2, 2, 2, 1], [0, 0], (), [3]),
        # The guess was made for what is on the left.
        ([0, 2, 0, 2, 1, 3, 1, 3, 0, 2, 2, 2, 1], [1, 0], (), [0]),
        # It was made for nothing: its position is new.
        ([0, 2, 0, 2, 1, 3, 1, 3, 0, 2, 2, 2, 1], [1, 0], (False,), [3]),
        # Seen once only.
        ([0, 2, 0, 2, 1, 3, 0, 0, 0, 2, 2, 2, 1], [0, 0], (), [0]),
        # Seen twice, but with another code the last time.
        ([0, 2, 0, 2, 1, 3, 1, 0, 0, 2, 2, 2, 1], [0, 0], (), [0]),
        # Nothing is above the first row.
        ([0, 2, 0], [1, 0], (), [0]),
    ],
)
def test_a_stale_guess_becomes_what_followed_the_last_two_times(tokens, fed, known, wanted):
    assert mended(tokens, [0], fed, known) == wanted


def test_a_change_travels_to_the_right():
    """Stripes of which every guess is of the wrong phase, because the first code was."""
    stripes = [1, 2, 1, 2] * 3 + [1]
    assert mended(stripes, [1, 2, 1], [2, 1, 2, 1]) == [2, 1, 1]


def test_strides_of_their_own_and_places_without_an_above():
    tokens = [0, 2, 0, 2, 1, 3, 1, 3, 0, 2, 2, 2, 1]
    stride = torch.full((20,), COLUMNS)
    assert mended(tokens, [0], [0, 0], stride=stride) == [3]
    stride[len(tokens)] = 0
    assert mended(tokens, [0], [0, 0], stride=stride) == [0]


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
