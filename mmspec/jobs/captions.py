"""Captions of pictures: one JSON line each, the same for the same seed, whatever the batch."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmspec.documents import Reader, Sheet
from mmspec.jobs import generators
from mmspec.jobs.journal import Journal
from mmspec.jobs.pages import Answer, PageTask, check_drafter
from mmspec.jobs.recall import recalling
from mmspec.law_config import LawConfig

#: What models were trained to be asked for a caption.
PROMPTS = {"bundled:captioner": "describe"}
#: What all others are asked.
PROMPT = "Describe the image."


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionJob:
    """How pictures are captioned.

    Attributes:
        load: Gives a `SpeculativeVLMPipeline`; can be pickled.
        model: Its name, for the records.
        dtype: Name of the weights' type, likewise.
        prompt: What is asked of each picture, may be empty; None is what the model was trained on,
            or `PROMPT`.
        seed: With the picture's content it gives the seed of its caption.
        options: ``max_new_tokens``, ``temperature``, ``top_p`` and ``drafter`` of the call. With
            None as drafter, n-grams draft from the captions before; one that is named is used
            alone.
    """

    load: Callable[[], Any]
    model: str
    dtype: str
    prompt: str | None
    seed: int
    options: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What every record is made with."""
        own = {"model": self.model, "dtype": self.dtype, "seed": self.seed}
        return own | {"prompt": self.question} | dict(self.options)

    @property
    def question(self) -> str:
        """What is asked."""
        return PROMPTS.get(self.model, PROMPT) if self.prompt is None else self.prompt

    def after(self, journal: Journal) -> "CaptionJob":
        """The job of a run that goes on: drafts from the captions before."""
        return replace(self, load=recalling(self.load, journal))

    def check(self) -> None:
        """Refuses options that no picture could be captioned with, before a model is loaded.

        Raises:
            ValueError: With the rule and the value.
        """
        LawConfig(temperature=self.options["temperature"], top_p=self.options["top_p"])
        check_drafter(self.options["drafter"])

    def read(self, task: PageTask) -> Sheet:
        """Reads a picture, or a page of a scan.

        Raises:
            ValueError: If it cannot be read.
        """
        return Reader().read(task.file, task.page or 1)

    def look(self, pipe: Any, sheet: Sheet) -> Sheet:
        """Nothing is known of a picture beforehand."""
        return sheet

    def close(self, pipe: Any) -> None:
        """`look` begins nothing."""

    def write(self, pipe: Any, tasks: Sequence[PageTask], sheets: Sequence[Sheet]) -> list[Answer]:
        """Captions pictures together.

        Raises:
            ValueError: If the prompt and the pictures do not fit.
        """
        seeds = [seed_of(self.seed, task) for task in tasks]
        request = image_request(pipe.processor, self.question)
        drafter = self.options["drafter"] or {"name": "ngram", "memory": pipe.store}
        result = pipe(
            [request] * len(tasks),
            images=[[sheet.image] for sheet in sheets],
            generator=generators(seeds),
            **{**self.options, "drafter": drafter},
        )
        answers = []
        for row, task in enumerate(tasks):
            num_tokens = len(result.tokens[row])
            # Nothing that depends on speed or on the batch: a record is the same in every run.
            record = {
                "file": task.file,
                "page": task.page,
                "digest": task.digest,
                "text": result.texts[row].strip(),
                "num_tokens": num_tokens,
                "seed": seeds[row],
                "error": None,
            }
            num_steps = sum(result.row_stats[row].accepted_histogram)
            answers.append(Answer(record=record, num_tokens=num_tokens, num_row_steps=num_steps))
        return answers


def image_request(processor: Any, prompt: str) -> Any:
    """A prompt about one image: a chat where the model has a template, else a text.

    Args:
        processor: The model's processor.
        prompt: What to ask; may be empty.
    """
    if getattr(processor, "chat_template", None) is None:
        return processor.image_token + prompt
    words = [{"type": "text", "text": prompt}] if prompt else []
    return [{"role": "user", "content": [{"type": "image"}, *words]}]


def seed_of(seed: int, task: PageTask) -> int:
    """The seed of a picture: of the run's seed, its content and its page, and of nothing else.

    So neither the batch, nor the other files of the folder, nor a kill changes its caption.
    """
    text = f"{seed} {task.digest} {task.page}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
