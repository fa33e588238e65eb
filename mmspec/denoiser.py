"""Noise on embeddings, for models that were fine-tuned to read noisy ones.

A noisy embedding is a clean one, normalised per channel, of which a share ``a`` is left in
Gaussian noise: ``a z + s n`` with ``a^2 + s^2 = 1``. Its level is ``sigma = s / a``, and a learned
encoding of the level is added, so that the model knows how much to believe. A clean embedding is
fed as it is: nothing is added to it.

The weights lie in one file beside the model's own (`FILE_NAME`), with the schedule in its header;
transformers does not look at it, so the folder stays a plain one. Sources: next-clean-token
prediction (SJD2, arXiv 2510.08994); the levels are those of Karras et al. 2022, equation 5.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmspec.checks import is_integer, is_number, require

FILE_NAME = "denoiser.safetensors"
#: Key of the schedule in the header of the file.
HEADER = "schedule"
NUM_FREQUENCIES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSchedule:
    """How a new position of a window goes from noise to a token; moves no token of the output.

    Attributes:
        num_steps: Forwards in which a new position is fed with noise; 0 is a plain Jacobi window.
        num_clean: Positions behind the root that are never fed with noise.
        sigma_max: Level of the first of the forwards: noise by signal.
        sigma_min: Level of the last of them.
        rho: Bend of the levels between the two; 1 is a straight line.

    Raises:
        ValueError: If one is out of its range.
    """

    num_steps: int = 1
    num_clean: int = 0
    sigma_max: float = 80.0
    sigma_min: float = 1.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_clean"):
            value = getattr(self, name)
            require(is_integer(value) and value >= 0, name, "an integer >= 0", value)
        for name in ("sigma_max", "sigma_min", "rho"):
            value = getattr(self, name)
            require(is_number(value) and value > 0, name, "a number > 0", value)
        if self.sigma_min > self.sigma_max:
            raise ValueError(
                f"sigma_min must be at most sigma_max={self.sigma_max}, got {self.sigma_min}"
            )

    def sigmas(self) -> Tensor:
        """Levels by the number of forwards left, ``[num_steps]``, float32, the least first."""
        ends = torch.tensor([self.sigma_min, self.sigma_max]) ** (1 / self.rho)
        # A single forward gets the level of new positions.
        share = torch.ones(1) if self.num_steps == 1 else torch.linspace(0, 1, self.num_steps)
        return (ends[0] + share * (ends[1] - ends[0])) ** self.rho


class Denoiser(nn.Module):
    """Channel statistics and level encoding of noisy embeddings.

    Attributes:
        mean_H: Mean of every channel over the codes' embeddings.
        std_H: Their standard deviation.
        schedule: How windows use it; may be replaced.
    """

    mean_H: Tensor
    std_H: Tensor

    def __init__(self, hidden_size: int, schedule: NoiseSchedule | None = None) -> None:
        """Makes an encoding that adds nothing yet, for channels of mean 0 and deviation 1.

        Args:
            hidden_size: H.
            schedule: The defaults if None.
        """
        super().__init__()
        self.schedule = schedule or NoiseSchedule()
        self.register_buffer("mean_H", torch.zeros(hidden_size))
        self.register_buffer("std_H", torch.ones(hidden_size))
        last = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = nn.Linear(2 * NUM_FREQUENCIES, hidden_size)
        self.encoder = nn.Sequential(first, nn.SiLU(), last)

    @torch.no_grad()
    def measure(self, embeds_VH: Tensor) -> None:
        """Takes mean and deviation from the embeddings of all codes."""
        self.mean_H.copy_(embeds_VH.mean(0))
        self.std_H.copy_(embeds_VH.std(0))

    def forward(self, embeds: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Noisy embeddings, as the model is fed them.

        Args:
            embeds: Clean ones, ``[..., H]``.
            noise: Standard normal, ``[..., H]``.
            sigma: Level of each, above 0, ``[...]``.
        """
        signal = (1 + sigma.square()).rsqrt()[..., None]
        clean = (embeds - self.mean_H) / self.std_H
        state = signal * (clean + sigma[..., None] * noise)
        return self.mean_H + self.std_H * state + self.encoder(level_features(sigma))

    def save(self, folder: str | Path) -> None:
        """Writes the file into a model's folder."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        header = {"format": "pt", HEADER: json.dumps(asdict(self.schedule))}
        save_file(tensors, Path(folder) / FILE_NAME, header)

    @classmethod
    def load(cls, id_or_path: str | Path) -> "Denoiser | None":
        """Reads the file of a model's folder or hub repository; None if it has none.

        Raises:
            ValueError: If the file is there and is not one of these.
        """
        found = _found(id_or_path)
        if found is None:
            return None
        try:
            with safe_open(found, "pt") as file:
                header: Mapping[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            schedule = NoiseSchedule(**json.loads(header[HEADER]))
            denoiser = cls(tensors["mean_H"].shape[0], schedule)
            denoiser.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{found} holds no denoiser of mmspec: {error}") from error
        return denoiser.eval()


def _found(id_or_path: str | Path) -> Path | None:
    if Path(id_or_path).is_dir():
        path = Path(id_or_path) / FILE_NAME
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(id_or_path), FILE_NAME))
    except EntryNotFoundError:  # also without a network, where the repository is cached
        return None


def level_features(sigma: Tensor) -> Tensor:
    """Sines and cosines of the logarithm of a level, ``[..., 2 * NUM_FREQUENCIES]``."""
    frequency = torch.logspace(-1, 1, NUM_FREQUENCIES, dtype=sigma.dtype, device=sigma.device)
    angle = sigma.log()[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
