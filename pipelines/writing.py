"""What pipelines that write text share: a call's arguments, and the way from prompts to text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmspec.checks import is_integer, is_list, require, require_known
from mmspec.drafters import DrafterSpec
from mmspec.engine import Engine, StepCallback
from mmspec.law_config import LawConfig
from mmspec.noise import row_keys
from mmspec.pipelines.base import (
    SpeculativePipeline,
    StepEnd,
    check_callback,
    check_positive,
)
from mmspec.records import Outcome, Stats, StepRecord
from mmspec.rows import TokenRows
from mmspec.sampling import Law, build_law
from mmspec.speculation import Settings
from mmspec.stop_strings import StopStrings

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Tensor

#: Decoder -> rule. "sequential" is plain decoding through the same code, the yardstick.
DECODERS = {
    "exact": "exact",
    "sequential": "exact",
    "speculative": "speculative",
    "block": "block",
    "coupled": "coupled",
    "sjd": "sjd",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenOutput:
    """Text that a pipeline wrote.

    Attributes:
        texts: Generated text of each row, special tokens and stop string excluded.
        tokens: Generated tokens of each row, int64; the token that ended the row included.
        stats: Figures over the batch.
        row_stats: Figures per row.
        interrupted: True if the call was stopped before every row had ended.
    """

    texts: list[str]
    tokens: list[Tensor]
    stats: Stats
    row_stats: tuple[Stats, ...]
    interrupted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WritingOptions:
    """Arguments of a call, as `SpeculativeTextPipeline` describes them."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    bad_words: Sequence[str | Sequence[int]] = ()
    min_new_tokens: int = 0
    stop: str | Sequence[str] = ()
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    drafter: DrafterSpec = None
    decoder: str = "exact"
    width: int | None = None
    streamer: Any = None
    callback_on_step_end: StepEnd | None = None
    compile: bool = False
    prefill_chunk_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A call whose arguments are checked."""

    options: WritingOptions
    settings: Settings
    law: Law
    stops: StopStrings
    eos_token_ids: tuple[int, ...]
    keys_B: Tensor


class WritingPipeline(SpeculativePipeline):
    """A loaded model that writes text.

    Attributes:
        tokenizer: The model's tokenizer.
        drafter: Used where a call names none.
        schedule: As in `mmspec.speculation.Settings`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        drafter: DrafterSpec = None,
        schedule: str | None = None,
    ) -> None:
        """Keeps loaded objects.

        Raises:
            ValueError: If the drafter or the schedule is unknown.
        """
        super().__init__(model)
        self.tokenizer = tokenizer
        self.drafter: DrafterSpec = "ngram" if drafter is None else drafter
        self.schedule = schedule
        Settings(drafter=self.drafter, schedule=self.schedule)

    def check(self, num_rows: int, **options: Any) -> None:
        """Checks the arguments of a call for so many prompts; runs nothing and draws nothing.

        Raises:
            ValueError: As the call would.
        """
        unseeded = {**options, "generator": torch.Generator()}
        self._plan(WritingOptions(**unseeded), num_rows)

    def _plan(self, options: WritingOptions, num_rows: int) -> Plan:
        """Checks the arguments of a call; runs nothing."""
        settings = self._settings(options)
        check_positive("max_new_tokens", options.max_new_tokens)
        if options.prefill_chunk_size is not None:
            check_positive("prefill_chunk_size", options.prefill_chunk_size)
        check_callback(options.callback_on_step_end)
        _check_streamer(options.streamer, num_rows)
        ends = self._eos_token_ids()
        law = build_law(
            LawConfig(
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                min_p=options.min_p,
                repetition_penalty=options.repetition_penalty,
                presence_penalty=options.presence_penalty,
                bad_words=self._bad_words(options.bad_words),
                min_new_tokens=options.min_new_tokens,
                eos_token_ids=ends,
            )
        )
        return Plan(
            options=options,
            settings=settings,
            law=law,
            stops=StopStrings(self.tokenizer, options.stop),
            eos_token_ids=ends,
            keys_B=row_keys(options.generator, num_rows),
        )

    def _rows(self, plan: Plan, prompts: list[list[int]]) -> TokenRows:
        return TokenRows(
            prompts,
            max_new_tokens=[plan.options.max_new_tokens] * len(prompts),
            keys_B=plan.keys_B,
            eos_token_ids=plan.eos_token_ids,
            stop_check=plan.stops.check if plan.stops.texts else None,
            device=self.device,
        )

    def _write(self, plan: Plan, engine: Engine, rows: TokenRows) -> dict[str, Any]:
        """Runs the engine; returns the fields of a `WrittenOutput`."""
        streamer = plan.options.streamer
        bar, after_step = self._watch(
            plan.options.max_new_tokens * rows.num_rows,
            plan.options.callback_on_step_end,
            is_quiet=streamer is not None,
        )
        with bar:
            result = engine.run(_streaming(after_step, streamer, rows))
        if streamer is not None:
            streamer.end()
        new = [rows.new_tokens(row) for row in range(rows.num_rows)]
        return {
            "texts": [plan.stops.cut(self._decode(tokens)) for tokens in new],
            "tokens": [torch.tensor(tokens, dtype=torch.long) for tokens in new],
            "stats": result.stats,
            "row_stats": result.row_stats,
            "interrupted": result.interrupted,
        }

    def _settings(self, options: WritingOptions) -> Settings:
        require_known("decoder", options.decoder, DECODERS)
        settings = Settings(
            drafter=self.drafter if options.drafter is None else options.drafter,
            rule=DECODERS[options.decoder],
            width=options.width,
            schedule=self.schedule,
            compile=options.compile,
        )
        if options.decoder == "sequential":
            return Settings(drafter="none", width=1, compile=options.compile)
        return settings

    def _check_tokens(self, name: str, ids: Iterable[int]) -> None:
        vocab_size = self.model.get_input_embeddings().weight.shape[0]
        foreign = sorted({token for token in ids if not 0 <= token < vocab_size})
        if foreign:
            raise ValueError(f"{name} has token ids outside 0..{vocab_size - 1}: {foreign}")

    def _eos_token_ids(self) -> tuple[int, ...]:
        config = getattr(self.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        if ends is None:
            ends = self.tokenizer.eos_token_id
        if ends is None:
            return ()
        return (ends,) if isinstance(ends, int) else tuple(ends)

    def _bad_words(self, words: Any) -> tuple[tuple[int, ...], ...]:
        rule = "a list of words, as texts or lists of token ids"
        is_word = lambda word: isinstance(word, str) or is_list(word, is_integer)  # noqa: E731
        require(is_list(words, is_word), "bad_words", rule, words)
        sequences: list[tuple[int, ...]] = []
        for word in words:
            texts = (word, f" {word}") if isinstance(word, str) else ()
            sequences += [
                tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts
            ]
            if not isinstance(word, str):
                sequences.append(tuple(word))
        self._check_tokens("bad_words", (token for word in sequences for token in word))
        return tuple(dict.fromkeys(sequences))

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def as_requests(prompt: Any) -> list[Prompt]:
    """One prompt or many as a list of prompts.

    Raises:
        ValueError: If there is none, or one is neither a text, nor messages, nor token ids.
    """
    is_one = isinstance(prompt, str | Tensor | Mapping) or not isinstance(prompt, Iterable)
    prompts = [prompt] if is_one else list(prompt)
    if not is_one and prompts and all(isinstance(message, Mapping) for message in prompts):
        prompts = [prompts]
    if not prompts:
        raise ValueError("at least one prompt is needed, got an empty list")
    for index, one in enumerate(prompts):
        require(
            _is_request(one),
            f"prompt {index}",
            "a non-empty text, list of messages with a 'role', or 1-D tensor of token ids",
            one,
        )
    return prompts


def _is_request(prompt: Any) -> bool:
    if isinstance(prompt, Tensor):
        is_ids = prompt.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        return prompt.ndim == 1 and is_ids and len(prompt) > 0
    if isinstance(prompt, str):
        return prompt != ""
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in prompt)
    )


def _check_streamer(streamer: Any, num_rows: int) -> None:
    is_good = streamer is None or (hasattr(streamer, "put") and hasattr(streamer, "end"))
    require(is_good, "streamer", "None or an object with put and end", streamer)
    if streamer is not None and num_rows > 1:
        raise ValueError(f"a streamer shows one row, got {num_rows} prompts")


def _streaming(after_step: StepCallback, streamer: Any, rows: TokenRows) -> StepCallback:
    """The callback that feeds a streamer as `generate` does: the prompt, then token by token."""
    if streamer is None:
        return after_step
    streamer.put(torch.tensor(rows.host_tokens))

    def show(record: StepRecord, outcome: Outcome) -> bool | None:
        for token in outcome.new_units[0]:
            streamer.put(torch.tensor([token]))
        return after_step(record, outcome)

    return show
