"""BRISQUE in torch: how unnatural the statistics of a picture are, without a reference.

Source: Mittal, Moorthy and Bovik 2012, "No-Reference Image Quality Assessment in the Spatial
Domain". The regression weights are not bundled: they come from the package `brisque` (Apache-2.0),
of which only the files are read, or from a folder.

Shape suffixes as in `mmspec.block_records`; S is support vectors.
"""

import pickle
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from mmspec.block_records import BlockView
from mmspec.checks import require
from mmspec.routers.scoring import Scorer, checked_batch_size, spread_batches

NUM_FEATURES = 36
#: Of the window of the local mean.
WINDOW, SIGMA = 7, 7 / 6
#: Keeps a flat region from dividing by zero; a grey level.
FLOOR = 1 / 255
#: Where the shape of a generalised normal law is looked for, and how often the range is halved.
SHAPES, HALVINGS = (0.05, 20.0), 60
#: Luma of ITU-R BT.709 as the published weights were fitted with.
GREY = (0.2125, 0.7154, 0.0721)


class BrisqueScorer(Scorer):
    """Minus the BRISQUE score of each picture: 0 is perfect, -100 is bad. No prompt, no motion."""

    name: ClassVar[str] = "brisque"
    settings: ClassVar[tuple[str, ...]] = ("weights", "batch_size")

    def __init__(self, weights: str | Path | None = None, batch_size: str | int = 4) -> None:
        """Reads the regression.

        Args:
            weights: A folder with `svm.txt` (LIBSVM) and `normalize.pickle` (ranges of the
                features); without it, that of the package `brisque`.
            batch_size: Pictures that are scored at once.

        Raises:
            ValueError: If they are missing or are something else.
        """
        self._batch_size = checked_batch_size(batch_size)
        self._regression = _read_regression(_folder(weights))

    def batches(self, block: BlockView) -> Iterator[Tensor]:
        """Scores a few pictures at a time."""
        for batch in spread_batches(block.frames(), self._batch_size):
            yield -self._regression.predict(brisque_features(batch))


class SupportVectorRegression:
    """An epsilon-SVR with a Gaussian kernel, and the ranges that features are scaled from."""

    def __init__(
        self, vectors_SN: Tensor, weights_S: Tensor, *, gamma: float, rho: float, ranges_2N: Tensor
    ) -> None:
        """Keeps them, in fp64."""
        self._vectors_SN = vectors_SN.double()
        self._weights_S = weights_S.double()
        self._gamma = gamma
        self._rho = rho
        self._ranges_2N = ranges_2N.double()

    def predict(self, features_FN: Tensor) -> Tensor:
        """The regression of features, on the CPU: they are few numbers."""
        low_N, high_N = self._ranges_2N
        scaled_FN = 2 * (features_FN.double().cpu() - low_N) / (high_N - low_N) - 1
        distance_FS = torch.cdist(scaled_FN, self._vectors_SN).square()
        return (-self._gamma * distance_FS).exp() @ self._weights_S - self._rho


def brisque_features(frames_F3HW: Tensor) -> Tensor:
    """The 36 features of each picture: 18 at its own size and 18 at half of it.

    Args:
        frames_F3HW: Pictures in [0, 1].

    Returns:
        ``[F, 36]``, fp64. NaN where a picture is flat and has no statistics.
    """
    weights = torch.tensor(GREY, dtype=torch.float64, device=frames_F3HW.device)
    grey_F1HW = torch.einsum("fchw,c->fhw", frames_F3HW.double(), weights)[:, None]
    half = functional.interpolate(grey_F1HW, scale_factor=0.5, mode="bicubic")
    fields = [*_fields(grey_F1HW), *_fields(half)]
    # Laws are fitted together: an operation costs more than its few numbers.
    fitted = _asymmetric_fit(torch.stack([_moments(field) for field in fields], dim=1))
    laws = torch.stack(fitted, dim=1)
    features = [_features(of_size) for of_size in laws.chunk(2)]
    return torch.cat(features).T


def _fields(grey_F1HW: Tensor) -> list[Tensor]:
    """The normalised luma, and its products with the neighbours in four directions."""
    mscn = _normalized_contrast(grey_F1HW)[:, 0]
    return [
        mscn,
        mscn[:, :, :-1] * mscn[:, :, 1:],
        mscn[:, :-1] * mscn[:, 1:],
        mscn[:, :-1, :-1] * mscn[:, 1:, 1:],
        mscn[:, 1:, :-1] * mscn[:, :-1, 1:],
    ]


def _features(laws: Tensor) -> Tensor:
    """Shape and scale of the luma, which is even, and all four numbers of each product."""
    shape, _, left, right = laws[0]
    return torch.cat([torch.stack([shape, (left + right) / 2]), laws[1:].flatten(0, 1)])


def _normalized_contrast(grey_F1HW: Tensor) -> Tensor:
    """Mean-subtracted, contrast-normalised luma (equations 1 to 3)."""
    offset = torch.arange(WINDOW, dtype=grey_F1HW.dtype, device=grey_F1HW.device) - WINDOW // 2
    line = (-offset.square() / (2 * SIGMA**2)).exp()
    line = line / line.sum()
    kernel = (line[:, None] * line)[None, None]
    mean = functional.conv2d(grey_F1HW, kernel, padding=WINDOW // 2)
    square = functional.conv2d(grey_F1HW.square(), kernel, padding=WINDOW // 2)
    return (grey_F1HW - mean) / ((square - mean.square()).abs().sqrt() + FLOOR)


def _moments(values_FHW: Tensor) -> Tensor:
    """The mean squares left and right of zero, and squared mean over mean square: ``[3, F]``."""
    values = values_FHW.flatten(1)
    is_left = values < 0
    squares = values.square()
    left = (squares * is_left).sum(1) / is_left.sum(1)
    right = (squares * ~is_left).sum(1) / (~is_left).sum(1)
    return torch.stack([left, right, values.abs().mean(1).square() / squares.mean(1)])


def _asymmetric_fit(moments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fits an asymmetric generalised normal law by its moments (equations 8 to 11).

    Args:
        moments: Those of `_moments` in front, of as many fields as there are.

    Returns:
        Shape, mean, and the squared scales left and right, of each field.
    """
    left, right, moment = moments
    ratio = (left / right).sqrt()
    moment = moment * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1).square()
    shape = _shape_of(moment)
    log_gamma = [torch.lgamma(k / shape) for k in (1, 2, 3)]
    constant = (log_gamma[0] - log_gamma[2]).div(2).exp()
    mean = (right.sqrt() - left.sqrt()) * constant * (log_gamma[1] - log_gamma[0]).exp()
    return shape, mean, left, right


def _shape_of(moment: Tensor) -> Tensor:
    """Solves Γ(2/a)² / (Γ(1/a) Γ(3/a)) = moment for a: the left side grows with a."""
    low, high = (torch.full_like(moment, end) for end in SHAPES)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        logs = [torch.lgamma(k / middle) for k in (1, 2, 3)]
        is_below = (2 * logs[1] - logs[0] - logs[2]).exp() < moment
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    # Comparisons with NaN are False, which would look like a shape.
    return torch.where(moment.isnan(), moment, (low + high) / 2)


def _folder(weights: str | Path | None) -> Path:
    """Where the weights lie; finds the package without importing it, for it imports OpenCV.

    Raises:
        ValueError: If there is neither a folder nor the package.
    """
    if weights is not None:
        return Path(weights)
    package = find_spec("brisque")
    if package is None or package.origin is None:
        raise ValueError(
            "router 'brisque' has no weights: install the package brisque, or give a folder with "
            "svm.txt and normalize.pickle, as brisque:-40,weights=FOLDER"
        )
    return Path(package.origin).parent / "models"


def _read_regression(folder: Path) -> SupportVectorRegression:
    """Reads the two files.

    Raises:
        ValueError: If one is missing or is something else.
    """
    try:
        with (folder / "normalize.pickle").open("rb") as file:
            ranges = _PlainUnpickler(file).load()
        ranges_2N = torch.tensor([ranges["min_"], ranges["max_"]], dtype=torch.float64)
        head, _, body = (folder / "svm.txt").read_text().partition("\nSV\n")
        fields = dict(line.split(" ", 1) for line in head.splitlines())
        rows = [line.split() for line in body.splitlines()]
        weights_S = torch.tensor([float(row[0]) for row in rows], dtype=torch.float64)
        vectors_SN = torch.zeros(len(rows), NUM_FEATURES, dtype=torch.float64)
        for number, row in enumerate(rows):
            for entry in row[1:]:
                index, _, value = entry.partition(":")
                vectors_SN[number, int(index) - 1] = float(value)
        gamma, rho = float(fields["gamma"]), float(fields["rho"])
    except (OSError, ValueError, LookupError, TypeError, pickle.UnpicklingError) as error:
        message = f"router 'brisque' cannot read its weights in {str(folder)!r}: {error}"
        raise ValueError(message) from error
    shape = tuple(ranges_2N.shape)
    require(shape == (2, NUM_FEATURES), "ranges of brisque", f"of {NUM_FEATURES} features", shape)
    kind = (fields.get("svm_type"), fields.get("kernel_type"))
    rule = "an epsilon_svr with the kernel rbf"
    require(kind == ("epsilon_svr", "rbf"), "svm.txt of brisque", rule, kind)
    return SupportVectorRegression(vectors_SN, weights_S, gamma=gamma, rho=rho, ranges_2N=ranges_2N)


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries and numbers; a pickle that wants to call anything is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"the file wants {module}.{name}")
