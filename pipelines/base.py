"""What all pipelines share: devices, progress bars, interruption, checks of arguments."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Event
from typing import Any

import torch
from tqdm.auto import tqdm

from mmspec.checks import is_integer, is_number, require
from mmspec.forward import text_device
from mmspec.records import Outcome, StepRecord
from mmspec.tree import BUCKETS

logger = logging.getLogger("mmspec")

StepEnd = Callable[[Any, int, dict[str, Any]], bool | None]
Mover = Callable[[tqdm], Callable[[StepRecord], None]]


class SpeculativePipeline:
    """A loaded model and the settings that outlive a call, in the manner of diffusers.

    Attributes:
        model: The target.
    """

    def __init__(self, model: Any) -> None:
        """Keeps the model; in evaluation mode from here on."""
        self.model: Any = model.eval()
        self._progress_bar_config: dict[str, Any] = {}
        self._calls: list[Event] = []
        self._unknown_words: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return text_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The model's floating-point type."""
        return self.model.dtype

    def to(self, *args: Any, **kwargs: Any) -> "SpeculativePipeline":
        """Moves or casts the model and that of the default drafter; returns the pipeline."""
        drafter = getattr(self, "drafter", None)
        small = drafter.get("model") if isinstance(drafter, Mapping) else drafter
        for model in (self.model, small):
            if isinstance(model, torch.nn.Module):
                model.to(*args, **kwargs)
        return self

    def set_progress_bar_config(self, **kwargs: object) -> None:
        """Options for tqdm, such as ``disable=True``."""
        self._progress_bar_config = kwargs

    def interrupt(self) -> None:
        """Stops the running call after its current step; it returns what it has.

        Where calls run within one another, as from a callback, or beside one another, that is the
        one that began last; the others go on. A stream runs until it has ended or is cancelled.
        Does nothing where no call runs.
        """
        for interrupted in self._calls[-1:]:
            interrupted.set()

    @contextmanager
    def _running(self) -> Iterator[Event]:
        """A call; gives what is set when it is to stop."""
        interrupted = Event()
        self._calls.append(interrupted)
        try:
            yield interrupted
        finally:
            self._calls.remove(interrupted)

    def _warn_of_unknown_words(self, processor: Any, texts: Iterable[str]) -> None:
        """Names words that the model cannot tell apart, each once for a pipeline.

        Args:
            processor: Of the model, or its tokenizer.
            texts: Prompts.
        """
        tokenizer = getattr(processor, "tokenizer", processor)
        found = {word: None for text in texts for word in unknown_words(tokenizer, text)}
        new = [word for word in found if word not in self._unknown_words]
        if new:
            self._unknown_words.update(new)
            logger.warning(
                "the model does not know %s, and reads each as %s; what it knows: the vocabulary "
                "of its tokenizer, %s",
                ", ".join(map(repr, new)),
                tokenizer.unk_token,
                tokenizer.name_or_path or "get_vocab()",
            )

    @contextmanager
    def _watch(
        self,
        total: int,
        on_step_end: StepEnd | None,
        *,
        is_quiet: bool = False,
        more: Mapping[str, Any] | None = None,
        unit: str = "tok",
        mover: Mover | None = None,
    ) -> Iterator[Callable[[StepRecord, Outcome], bool]]:
        """A running call with a progress bar in units; gives the engine callback that moves it.

        Args:
            total: Units of a whole run.
            on_step_end: The user's callback.
            is_quiet: No bar.
            more: What the callback is told besides the step.
            unit: Name of a unit on the bar.
            mover: Makes of the bar what moves it; None is `token_mover`.
        """
        config = {"unit": unit, "leave": False} | self._progress_bar_config
        config |= {"disable": True} if is_quiet else {}
        with self._running() as interrupted, tqdm(total=total, **config) as bar:
            move = (mover or token_mover)(bar)

            def after_step(record: StepRecord, outcome: Outcome) -> bool:
                move(record)
                stop = False
                if on_step_end is not None:
                    details = {"record": record, "outcome": outcome, **(more or {})}
                    stop = bool(on_step_end(self, record.index, details))
                return stop or interrupted.is_set()

            yield after_step


def token_mover(bar: tqdm) -> Callable[[StepRecord], None]:
    """What moves a bar of units, a step at a time, and writes tau and the forwards beside it."""
    num_row_steps = 0

    def move(record: StepRecord) -> None:
        nonlocal num_row_steps
        num_row_steps += sum(record.was_active)
        bar.update(sum(record.num_emitted))
        tau = bar.n / max(1, num_row_steps)
        bar.set_postfix_str(f"tau {tau:.2f}, {record.index + 1} forwards", refresh=False)

    return move


def check_callback(
    callback: Callable[[Any, int, Any], Any] | None,
    name: str = "callback_on_step_end",
    arguments: str = "pipeline, step_index, details",
) -> None:
    """Refuses a callback that cannot be called with three arguments.

    Raises:
        ValueError: If it takes other arguments.
    """
    if callback is None:
        return
    try:
        inspect.signature(callback).bind(None, 0, {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must take ({arguments}): {error}") from error


def as_list(prompt: str | Iterable[str]) -> list[str]:
    """One prompt or many as a list.

    Raises:
        ValueError: If there is none, or one is empty or not a string.
    """
    is_one = isinstance(prompt, str) or not isinstance(prompt, Iterable)
    prompts: list[Any] = [prompt] if is_one else list(prompt)
    if not prompts:
        raise ValueError("at least one prompt is needed, got an empty list")
    for index, text in enumerate(prompts):
        is_good = isinstance(text, str) and text.strip() != ""
        require(is_good, f"prompt {index}", "a non-empty string", text)
    return prompts


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """The parts of a text for which a tokenizer has nothing but its token for unknown words.

    Args:
        tokenizer: Of transformers.
        text: A prompt.

    Returns:
        The parts in their order, with repeats and without blanks; the whole text where the
        tokenizer does not say which part a token stands for.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast or None
    )
    places = encoded.get("offset_mapping", [(0, len(text))] * len(encoded["input_ids"]))
    pairs = zip(encoded["input_ids"], places, strict=True)
    words = [text[start:end].strip() for token, (start, end) in pairs if token == unknown]
    return [word for word in words if word not in ("", tokenizer.unk_token)]


def check_positive(name: str, value: object) -> None:
    """Refuses what is no count of at least 1.

    Raises:
        ValueError: With the name and the value.
    """
    require(is_integer(value) and value >= 1, name, "an integer >= 1", value)


def check_window(window: object) -> None:
    """Refuses what is neither None nor a width that a step can have.

    Raises:
        ValueError: With the value.
    """
    is_good = window is None or (is_integer(window) and 1 <= window <= BUCKETS[-1])
    require(is_good, "window", f"None or between 1 and {BUCKETS[-1]}", window)


def check_guidance(guidance_scale: object) -> None:
    """Refuses what is no scale of classifier-free guidance.

    Raises:
        ValueError: With the value.
    """
    is_good = is_number(guidance_scale) and guidance_scale >= 0
    require(is_good, "guidance_scale", "a finite number >= 0", guidance_scale)
