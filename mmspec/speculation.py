"""Speculative decoding inside `transformers.generate`, and the wiring of a text engine.

    model.generate(**inputs, custom_generate=mmspec.speculate(drafter="ngram"))

`generate` prepares everything as always (processors, criteria, padding, limits) and calls us where
it would start its own loop. What cannot be honoured raises a `ValueError` before any forward.

Shape suffixes as in `mmspec.records`, and
    P  columns of the padded prompts     C  columns of prompts and output
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from mmspec.adapters import encoder_decoder, image_glm, vision_language
from mmspec.adapters.causal_lm import CausalTarget
from mmspec.adapters.guidance import Guidance
from mmspec.adapters.guided_lm import GuidedTarget, guidance_of, split_guidance
from mmspec.adapters.kv_exchange import import_prefix, refilled
from mmspec.adapters.lockstep import Lockstep, sort_criteria, token_mask
from mmspec.adapters.processors import Layout, checked_stateless, law_from_processors
from mmspec.cache import SlotCache
from mmspec.checks import is_integer, require, require_generator, require_known
from mmspec.drafters import TABLE, DrafterSpec, build_drafter, parse_spec
from mmspec.engine import Engine
from mmspec.forward import PromptExtras, check_supported, text_device
from mmspec.noise import row_keys
from mmspec.records import Stats
from mmspec.retrieval_schedule import RetrievalSchedule
from mmspec.rows import TokenRows
from mmspec.sampling import Law
from mmspec.schedule import AdaptiveSchedule, FixedSchedule
from mmspec.tree import BUCKETS
from mmspec.verify import RULES, build_rule

SCHEDULES = ("adaptive", "fixed")
DEFAULT_WIDTH = 16
#: A retrieved draft costs nothing more to be long, and copies are long.
DEFAULT_WIDTHS = {"ngram": 32, "reference": 64}

#: Seconds of the latest steps, by model, then by rows and compilation, then by width.
_STEP_COSTS: WeakKeyDictionary[Any, dict[tuple[int, bool], Mapping[int, Sequence[float]]]] = (
    WeakKeyDictionary()
)

#: Rules that ask something of the drafts; rules not named here take any drafter.
RULE_DRAFTERS = {
    # Lawful in a Jacobi window too, but positions behind the block are redrawn uncoupled there.
    "block": tuple(sorted(set(TABLE) - {"denoise", "jacobi"})),
    # Redraw the whole window in every step.
    "coupled": ("jacobi",),
    "sjd": ("jacobi",),
}

#: What `generate` passes on for a plain decoder; anything else would be dropped without a word.
_KNOWN_INPUTS = frozenset(
    {
        "attention_mask",
        "cache_position",
        "labels",
        "logits_to_keep",
        "past_key_values",
        "position_ids",
        "use_cache",
    }
)

#: Model type -> module that knows what `generate` passes on for it besides.
_FAMILIES: dict[str, Any] = {
    "glm_image": image_glm,
    **dict.fromkeys(encoder_decoder.FAMILIES, encoder_decoder),
    **dict.fromkeys(vision_language.FAMILIES, vision_language),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to draft and how to verify, checked when made.

    Attributes:
        drafter: As in `mmspec.drafters.parse_spec`.
        rule: A name of `mmspec.verify.RULES`.
        width: Most nodes per row and forward, the root included; None is 16 (32 for
            "ngram").
        schedule: "adaptive", "fixed", or None: adaptive under the exact rule, fixed under rules
            that keep the law only. Adaptive widths follow the clock; under those rules a seed
            would then not give the same tokens twice.
        compile: Compile the step's forward.
    """

    drafter: DrafterSpec = "ngram"
    rule: str = "exact"
    width: int | None = None
    schedule: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        """Refuses unknown names, and rules that do not fit the drafter."""
        name, options = parse_spec(self.drafter)
        require_known("rule", self.rule, sorted(RULES))
        fitting = RULE_DRAFTERS.get(self.rule, (name,))
        if name not in fitting:
            raise ValueError(
                f"rule {self.rule!r} works with the drafters {', '.join(fitting)}; got {name!r}"
            )
        if self.rule == "block" and options.get("branching", 1) != 1:
            raise ValueError(f"rule 'block' needs chains; got branching={options['branching']}")
        if self.schedule is not None:
            require_known("schedule", self.schedule, SCHEDULES)
        is_width = is_integer(self.width) and 1 <= self.width <= BUCKETS[-1]
        rule = f"None or between 1 and {BUCKETS[-1]}"
        require(self.width is None or is_width, "width", rule, self.width)
        require(isinstance(self.compile, bool), "compile", "True or False", self.compile)

    @property
    def max_width(self) -> int:
        """Nodes of the widest step."""
        if self.width is not None:
            return self.width
        return DEFAULT_WIDTHS.get(parse_spec(self.drafter)[0], DEFAULT_WIDTH)

    @property
    def fitting_drafter(self) -> DrafterSpec:
        """The drafter, held to chains where the rule needs them."""
        name, options = parse_spec(self.drafter)
        if self.rule == "block" and name in ("ngram", "reference"):
            return {"name": name, **options, "branching": 1}
        return self.drafter


def build_engine(
    model: Any,
    rows: TokenRows,
    law: Law,
    settings: Settings,
    *,
    cache: SlotCache | None = None,
    num_cached: Sequence[int] | None = None,
    extras: PromptExtras | None = None,
    guidance: Guidance | None = None,
    prefill_chunk_size: int | None = None,
) -> Engine:
    """Wires target, drafter, rule and schedule for token rows; runs nothing.

    Args:
        model: A transformers ``...ForCausalLM``.
        rows: The rows, on the model's input device (`mmspec.forward.text_device`).
        law: The law that tokens are drawn from.
        settings: How to draft and verify.
        cache: As in `CausalTarget`.
        num_cached: As in `CausalTarget`.
        extras: As in `CausalTarget`.
        guidance: Classifier-free guidance of these rows; not together with ``cache``, ``extras``
            or ``prefill_chunk_size``.
        prefill_chunk_size: As in `CausalTarget`.

    Raises:
        ValueError: If the model is not supported, a row does not fit its context, its prompt
            cannot be cut, or the drafter does not take its options or does not work with guidance.
    """
    target: Any
    if isinstance(extras, encoder_decoder.EncodedPrompts) and guidance is None:
        model, cache = encoder_decoder.decoder_of(model), extras.new_cache(rows)
        name, options = parse_spec(settings.drafter)
        drafter_spec = {"name": name} | extras.drafter_options(name, options, rows)
        settings = dataclasses.replace(settings, drafter=drafter_spec)
    if guidance is not None:
        _check_guided(settings, cache, extras, prefill_chunk_size)
        target = GuidedTarget(model, guidance, compile=settings.compile)
    else:
        target = CausalTarget(
            model,
            rows,
            compile=settings.compile,
            cache=cache,
            num_cached=num_cached,
            extras=extras,
            prefill_chunk_size=prefill_chunk_size,
        )
    drafter = build_drafter(
        settings.fitting_drafter,
        target=target,
        rows=rows,
        law=law,
        max_width=settings.max_width,
        shared_noise=settings.rule == "exact",
    )
    for text in getattr(extras, "texts", ()):
        if hasattr(drafter, "observe"):
            drafter.observe(text)
    rule: Any = build_rule(settings.rule, law, rows)
    num_forward_rows = rows.num_rows if guidance is None else guidance.num_rows
    schedule = _schedule(model, settings, drafter, rows, num_forward_rows)
    return Engine(target, drafter, rule, schedule)


def _check_guided(
    settings: Settings,
    cache: SlotCache | None,
    extras: PromptExtras | None,
    prefill_chunk_size: int | None,
) -> None:
    """Refuses what has no second half."""
    if parse_spec(settings.drafter)[0] == "early_exit":
        raise ValueError(
            "drafter 'early_exit' shares the target's cache, which holds two rows per sequence "
            "under guidance_scale; use another drafter"
        )
    if cache is not None:
        raise ValueError(
            "past_key_values of an earlier call cannot be combined with guidance_scale: they hold "
            "nothing of the negative prompts"
        )
    if extras is not None:
        raise ValueError(
            "guidance_scale is not supported for models that read images or have an encoder"
        )
    if prefill_chunk_size is not None:
        raise ValueError(
            f"prefill_chunk_size={prefill_chunk_size} cannot be combined with guidance_scale, "
            "which reads two prompts per row"
        )


def _schedule(
    model: Any, settings: Settings, drafter: Any, rows: TokenRows, num_forward_rows: int
) -> Any:
    width = 1 if drafter.name == "none" else settings.max_width

    def remaining() -> int:
        return rows.max_remaining

    is_fixed = settings.schedule == "fixed" or (
        settings.schedule is None and settings.rule != "exact"
    )
    if is_fixed or width == 1:
        return FixedSchedule(width, remaining)
    if not getattr(drafter, "is_free", False):
        return AdaptiveSchedule(width, remaining)
    # What a step of a width costs then depends on the model alone: later calls start from it.
    known, key = _STEP_COSTS.setdefault(model, {}), (num_forward_rows, settings.compile)
    schedule = RetrievalSchedule(width, remaining, costs=known.get(key))
    known[key] = schedule.costs
    if hasattr(drafter, "on_arrival"):
        drafter.on_arrival = schedule.wake
    return schedule


def speculate(
    drafter: DrafterSpec = "ngram",
    *,
    rule: str = "exact",
    width: int | None = None,
    schedule: str | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    compile: bool = False,
    stateless_processors: Sequence[Any] = (),
) -> "Speculation":
    """Makes the callable for ``model.generate(..., custom_generate=...)``.

    With the default rule greedy output equals `generate`'s token for token (up to float noise in
    the logits), and sampled output has `generate`'s law; its tokens are those of this library's
    own plain decoding with the same seed, not those of `torch.multinomial`. With `guidance_scale`
    both prompts of a row share one forward.

    Args:
        drafter: A name ("ngram", "jacobi", "early_exit", ...), a mapping with ``name`` and
            options, or a loaded smaller model.
        rule: "exact", or a rule that keeps the law only: "speculative", "block", "coupled", "sjd".
        width: Most nodes per row and forward, the root included; None is 16 (32 for
            "ngram").
        schedule: "adaptive" drafts as much as pays, "fixed" always ``width``; None is adaptive
            under the exact rule and fixed under the others, where the width moves the tokens.
        generator: One for all rows, one per row (after ``num_return_sequences``), or None for
            torch's global generator.
        compile: Compile the step's forward.
        stateless_processors: Classes of your own logits processors, or the objects, that depend
            on ``(input_ids, scores)`` of a row alone and keep nothing between calls.

    Returns:
        The callable; its ``stats`` hold the figures of its last call.

    Raises:
        ValueError: On unknown names or numbers out of range. When called: naming what cannot be
            honoured (beam search, assisted generation, a stateful logits processor or cache,
            ``output_scores``, ...).

    Example:
        >>> import mmspec
        >>> fast = mmspec.speculate(drafter="ngram")
        >>> out = model.generate(**inputs, custom_generate=fast)  # doctest: +SKIP
        >>> fast.stats.tau  # doctest: +SKIP
        2.9

    Note:
        transformers 5.23 does not hand ``tokenizer=`` on to callables, so ``stop_strings=`` raises
        in `generate` itself. Pass ``stopping_criteria=[StopStringCriteria(tokenizer, [...])]``.
    """
    settings = Settings(drafter=drafter, rule=rule, width=width, schedule=schedule, compile=compile)
    require_generator(generator)
    return Speculation(settings, generator, checked_stateless(stateless_processors))


class Speculation:
    """What `speculate` returns.

    Attributes:
        settings: How it drafts and verifies.
        stats: Figures of the last call, None before.
        row_stats: The same per row.
    """

    def __init__(
        self,
        settings: Settings,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        stateless_processors: tuple[Any, ...],
    ) -> None:
        """Use `speculate`."""
        self.settings = settings
        self.stats: Stats | None = None
        self.row_stats: tuple[Stats, ...] = ()
        self._generator = generator
        self._stateless = stateless_processors

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop of `generate`; called by it with what it has prepared.

        Returns:
            Sequences ``[B, C]`` int64, or a `GenerateDecoderOnlyOutput` with ``sequences`` and
            ``past_key_values``.

        Raises:
            ValueError: As in `speculate`.
        """
        dropped = _dropped_by_generate()
        streamer = streamer if streamer is not None else dropped.get("streamer")
        _check_mode(model, generation_config, {"synced_gpus": synced_gpus, **dropped}, model_kwargs)
        is_encoded = model.config.model_type in encoder_decoder.FAMILIES
        prompt = encoder_decoder.decoder_inputs(model_kwargs) if is_encoded else model_kwargs
        is_token_BP = token_mask(input_ids, prompt)
        layout = Layout(
            prompt_ids_BP=input_ids,
            is_token_BP=is_token_BP,
            vocab_size=model.get_output_embeddings().weight.shape[0],
        )
        processors, guide = split_guidance(logits_processor)
        law = law_from_processors(
            processors,
            layout,
            is_greedy=not generation_config.do_sample,
            stateless=self._stateless,
        )
        ends = sort_criteria(stopping_criteria)
        pad = generation_config._pad_token_tensor
        lockstep = Lockstep(input_ids, ends, None if pad is None else int(pad), streamer)
        rows = TokenRows(
            [ids[mask].tolist() for ids, mask in zip(input_ids, is_token_BP, strict=True)],
            max_new_tokens=[lockstep.budget] * len(input_ids),
            keys_B=row_keys(self._generator, len(input_ids)),
            eos_token_ids=ends.eos_token_ids,
            stop_check=lockstep.stop_check,
            device=text_device(model),
        )
        past = prompt.get("past_key_values")
        cache, num_cached = import_prefix(past, is_token_BP, rows)
        engine = build_engine(
            model,
            rows,
            law,
            self.settings,
            cache=cache,
            num_cached=num_cached,
            extras=_extras(model, rows, model_kwargs, is_token_BP, dropped),
            guidance=None if guide is None else guidance_of(guide, model, rows),
            prefill_chunk_size=generation_config.prefill_chunk_size,
        )
        result = engine.run(lambda record, outcome: lockstep.advance(rows))
        self.stats, self.row_stats = result.stats, result.row_stats
        sequences = lockstep.finish()
        wants_dict = generation_config.return_dict_in_generate
        if past is not None and (wants_dict or getattr(past, "_is_user_defined", False)):
            target: Any = engine.target
            past = refilled(past, target, lockstep.is_token_BC(is_token_BP)[:, :-1])
        if wants_dict:
            output = GenerateEncoderDecoderOutput if is_encoded else GenerateDecoderOnlyOutput
            return output(sequences=sequences, past_key_values=past)
        return sequences


# --------------------------------------------------------------------------- what is refused


def _dropped_by_generate() -> Mapping[str, Any]:
    """Arguments of `generate` that it does not pass on to a callable, from its own frame.

    transformers 5.23 rebuilds the extra arguments for a callable from unnamed ones only, so
    `streamer=` (which has been shown the prompt by then and would wait for ever) and
    `assistant_model=` get lost without a word. Of images it passes on what the target's tower
    makes of them.
    """
    caller = sys._getframe(2)
    if caller.f_code.co_name != "generate":
        return {}
    names = ("streamer", "assistant_model", "synced_gpus", "inputs", "kwargs")
    return {name: caller.f_locals.get(name) for name in names}


def _check_mode(
    model: Any, config: Any, dropped: Mapping[str, Any], model_kwargs: Mapping[str, Any]
) -> None:
    """Refuses what is not plain greedy decoding or sampling of a supported decoder."""
    is_encoded = getattr(model.config, "is_encoder_decoder", False)
    check_supported(encoder_decoder.decoder_of(model) if is_encoded else model)
    mode = config.get_generation_mode(dropped.get("assistant_model"))
    if mode not in ("greedy_search", "sample"):
        advice = "; pass num_beams=1" if config.num_beams > 1 else ""
        raise ValueError(
            f"generation mode {str(mode.value)!r} cannot be combined with custom_generate="
            f"speculate(); only greedy search and sampling can (num_beams={config.num_beams}, "
            f"assistant_model={type(dropped.get('assistant_model')).__name__}, "
            f"prompt_lookup_num_tokens={config.prompt_lookup_num_tokens}){advice}"
        )
    if dropped.get("synced_gpus"):
        raise ValueError("synced_gpus=True (ZeRO-3, FSDP) is not supported by speculate()")
    chunk = config.prefill_chunk_size
    is_chunk = chunk is None or (is_integer(chunk) and chunk >= 1)
    require(is_chunk, "prefill_chunk_size", "None or an integer >= 1", chunk)
    if config.return_dict_in_generate:
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(config, name):
                raise ValueError(f"{name}=True is not supported by speculate()")
    if config.cache_implementation in ("quantized", "offloaded", "offloaded_static"):
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r} is not supported by speculate()"
        )
    family = _FAMILIES.get(model.config.model_type)
    known = _KNOWN_INPUTS | (family.GENERATE_INPUTS if family else frozenset())
    # Multimodal models are handed the outputs of their encoders, none of them for plain text.
    unknown = sorted(
        name for name, value in model_kwargs.items() if not _is_nothing(value) and name not in known
    )
    if unknown:
        raise ValueError(f"model inputs not supported by speculate(): {', '.join(unknown)}")


def _extras(
    model: Any,
    rows: TokenRows,
    model_kwargs: Mapping[str, Any],
    is_token_BP: Tensor,
    call: Mapping[str, Any],
) -> PromptExtras | None:
    """What the prompts have besides tokens, for families where they have more."""
    family = _FAMILIES.get(model.config.model_type)
    if family is None:
        return None
    given = {model.main_input_name: call.get("inputs")} | (call.get("kwargs") or {})
    extras: PromptExtras | None = family.extras_in_generate(
        model, rows, model_kwargs, is_token_BP, given
    )
    return extras


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and not value)
