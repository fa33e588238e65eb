"""How far pictures are from the nearest of a training set, in pixels and in codes."""

from typing import Any

import numpy as np


def nearest_rmse(pictures: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each picture the least pixel RMSE (0 to 1) to any of `among`, and its index."""
    left = pictures.reshape(len(pictures), -1).astype(np.float32) / 255
    right = among.reshape(len(among), -1).astype(np.float32) / 255
    squares = (left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T
    rmse = np.sqrt(np.clip(squares / left.shape[1], 0, None))
    return rmse.min(1), rmse.argmin(1)


def least_hamming(codes: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Returns the least share of codes that differ from any of `among`."""
    return np.array([(among != one).mean(1).min() for one in codes])


def nearness(pictures: np.ndarray, codes: np.ndarray, known: dict[str, np.ndarray]) -> Any:
    """Quartiles of the distances to the nearest training icon, in pixels and in codes."""
    rmse = nearest_rmse(pictures, known["pictures"])[0]
    hamming = least_hamming(codes, known["codes"])
    return {
        "pixel_rmse_quartiles": np.percentile(rmse, [25, 50, 75]).round(4).tolist(),
        "code_hamming_quartiles": np.percentile(hamming, [25, 50, 75]).round(4).tolist(),
        "share_below_rmse_0.05": round(float((rmse < 0.05).mean()), 4),
    }
