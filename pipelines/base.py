"""What all pipelines share: devices, progress bars, interruption, checks of arguments."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from mmspec.forward import text_device
from mmspec.records import Outcome, StepRecord

StepEnd = Callable[[Any, int, dict[str, Any]], bool | None]


class SpeculativePipeline:
    """A loaded model and the settings that outlive a call, in the manner of diffusers.

    Attributes:
        model: The target.
    """

    def __init__(self, model: Any) -> None:
        """Keeps the model; in evaluation mode from here on."""
        self.model: Any = model.eval()
        self._progress_bar_config: dict[str, Any] = {}
        self._interrupt = False

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return text_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The model's floating-point type."""
        return self.model.dtype

    def to(self, *args: object, **kwargs: object) -> "SpeculativePipeline":
        """Moves or casts the model, as `torch.nn.Module.to`; returns the pipeline."""
        self.model.to(*args, **kwargs)
        return self

    def set_progress_bar_config(self, **kwargs: object) -> None:
        """Options for tqdm, such as ``disable=True``."""
        self._progress_bar_config = kwargs

    def interrupt(self) -> None:
        """Stops the running call after its current step; it returns what it has."""
        self._interrupt = True

    def _watch(
        self, total: int, on_step_end: StepEnd | None, *, is_quiet: bool = False
    ) -> tuple[tqdm, Callable[[StepRecord, Outcome], bool]]:
        """A progress bar in units, and the engine callback that moves it."""
        self._interrupt = False
        config = {"unit": "tok", "leave": False} | self._progress_bar_config
        bar = tqdm(total=total, **(config | {"disable": True} if is_quiet else config))

        def after_step(record: StepRecord, outcome: Outcome) -> bool:
            bar.update(sum(record.num_emitted))
            stop = False
            if on_step_end is not None:
                details = {"record": record, "outcome": outcome}
                stop = bool(on_step_end(self, record.index, details))
            return stop or self._interrupt

        return bar, after_step


def check_callback(on_step_end: StepEnd | None) -> None:
    """Refuses a callback that cannot be called with (pipeline, step index, details).

    Raises:
        ValueError: If it takes other arguments.
    """
    if on_step_end is None:
        return
    try:
        inspect.signature(on_step_end).bind(None, 0, {})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"callback_on_step_end must take (pipeline, step_index, details): {error}"
        ) from error


def as_list(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or many as a list.

    Raises:
        ValueError: If there is none, or one is empty or not a string.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("at least one prompt is needed, got an empty list")
    for index, text in enumerate(prompts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"prompt {index} must be a non-empty string, got {text!r}")
    return prompts


def check_positive(name: str, value: int) -> None:
    """Refuses counts below 1.

    Raises:
        ValueError: With the name and the value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
