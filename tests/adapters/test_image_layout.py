"""Where the code above is: what a window of guesses starts from."""

import pytest
import torch
from chameleon import tiny_chameleon
from emu3 import tiny_emu3
from glm import glm_model
from toys import run_toy

from mmspec.adapters.image_glm import GlmImageFamily, _strides
from mmspec.adapters.token_image import ImageLayout, image_family
from mmspec.drafters.jacobi import JacobiDrafter

V = 16
#: Small and large grid of GLM-Image: 256 x 384 pixels, 256 x 256, and two odd ones.
GRIDS = [[(13, 19), (8, 12)], [(16, 16), (8, 8)], [(3, 2), (4, 3)], [(1, 3), (2, 1)]]


def strides(layout: ImageLayout) -> torch.Tensor:
    """One stride for each new token."""
    if isinstance(layout.stride, int):
        return torch.full((layout.num_tokens,), layout.stride)
    return layout.stride


def check_above(stride_T, index, rows, columns):
    """Every code of a grid is one stride behind the code above it."""
    grid = index.view(rows, columns)
    assert torch.equal(grid[1:] - stride_T[grid[1:]], grid[:-1])


@pytest.mark.parametrize(
    ("make", "size"), [(tiny_emu3, (24, 32)), (tiny_emu3, (40, 8)), (tiny_chameleon, (None, None))]
)
def test_the_stride_leads_to_the_code_above(make, size):
    layout = image_family(make()).layout(*size)
    check_above(strides(layout), layout.code_index, layout.rows, layout.columns)


@pytest.mark.parametrize("grids", GRIDS)
def test_both_grids_of_glm_image_have_strides_of_their_own(grids):
    layout = GlmImageFamily(glm_model()).layout_of(grids)
    stride_T, first = strides(layout), 0
    assert len(stride_T) == layout.num_tokens
    for rows, columns in grids:
        index = torch.arange(first, first + rows * columns)
        check_above(stride_T, index, rows, columns)
        # Nothing is above a first line: the small grid is another picture.
        assert (stride_T[index[:columns]] == 0).all()
        first += rows * columns


def columns_that_drift(grids, step=0.5):
    """A law for every place that is much like the one above, a little by the token before."""
    made = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    lines = []
    for rows, columns in grids:
        line = 3 * noise(columns, V)
        for _ in range(rows):
            lines.append(line)
            line = line + step * noise(columns, V)
    laws = torch.cat(lines)
    return laws[:, None, None].expand(-1, V, V, -1) + 0.3 * noise(len(laws), 1, V, V)


@pytest.mark.parametrize("grids", GRIDS[:2])
def test_strides_of_their_own_save_forwards(grids):
    table = columns_that_drift(grids)
    tau = [
        run_toy(
            table,
            lambda rows, stride=stride: JacobiDrafter(rows, V, max_width=8, stride=stride),
            num_rows=16,
            width=8,
        ).tau
        for stride in (None, grids[-1][1], _strides(grids))
    ]
    assert tau[2] > 1.03 * max(tau[:2])
