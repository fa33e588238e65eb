"""diffusers' `GlmImagePipeline` with its autoregressive stage run by this library's engine.

    fast = mmspec.pipelines.accelerate(pipe)
    image = fast("a cat", height=1024, width=1024, generator=g).images[0]

The pipeline makes codes with a language model and paints them with a diffusion transformer. Only
the first stage is replaced: diffusers' own methods prepare its input, cut and upsample its output,
and paint. The pipeline and its models are never changed.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from mmspec.adapters.token_image import image_family
from mmspec.checks import is_list, require, require_generator, require_known
from mmspec.forward import text_device
from mmspec.law_config import LawConfig
from mmspec.noise import row_keys
from mmspec.pipelines.base import check_positive, check_window, token_mover
from mmspec.pipelines.image_decoders import DECODERS, DENOISE, check_lenience, image_engine
from mmspec.records import Stats
from mmspec.sampling import build_law

Generators = torch.Generator | Sequence[torch.Generator] | None

#: What `generate` cuts to where neither the model nor the caller says anything.
DEFAULT_TOP_K = 50

#: Settings of a generation config that the engine has no law for, with the value that is none.
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "watermarking_config": None,
}


class PriorOptions(TypedDict, total=False):
    """How the autoregressive stage decodes; all may be left out.

    Attributes:
        decoder: "exact" (the default), "sequential", "coupled", "sjd" or a lossy one, as in
            `SpeculativeImagePipeline`.
        window: Codes per image and forward. None chooses: with "exact" while running, by what
            widths bring and cost, for the other decoders and with ``compile`` by the size and the
            batch.
        lenience: Of a lossy decoder, as there.
        temperature: 0 is greedy. This and the filters come from the model's generation config
            unless given, as in diffusers; None switches a filter off.
        top_k: Keep the k most likely codes. transformers takes 50 where the config has none.
        top_p: Keep the smallest set with this mass.
        min_p: Drop codes less likely than this share of the most likely.
        compile: Compile the language model's forward.
    """

    decoder: str
    window: int | None
    lenience: float | None
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    compile: bool


_LAW_OPTIONS = ("temperature", "top_k", "top_p", "min_p")
_DEFAULTS = {"decoder": "exact", "window": None, "lenience": None, "compile": False}


def accelerate(pipe: Any, **options: Unpack[PriorOptions]) -> "AcceleratedGlmImage":
    """Runs the autoregressive stage of a diffusers pipeline several codes per forward.

    Args:
        pipe: A loaded `diffusers.GlmImagePipeline`.
        **options: See `PriorOptions`; a call may override them.

    Returns:
        An object that is called as the pipeline is. The pipeline itself stays as it was.

    Raises:
        ValueError: If it is another pipeline, or an option is unknown or out of its range.

    Example:
        >>> fast = mmspec.pipelines.accelerate(pipe, window=64)  # doctest: +SKIP
        >>> seeds = [torch.Generator("cuda").manual_seed(s) for s in range(4)]  # doctest: +SKIP
        >>> fast("a cat", height=1024, width=1024, num_images_per_prompt=4,
        ...     generator=seeds).images  # doctest: +SKIP
        >>> fast.stats.tau  # doctest: +SKIP
    """
    names = {cls.__name__ for cls in type(pipe).__mro__}
    if "GlmImagePipeline" not in names:
        raise ValueError(
            f"accelerate() works with diffusers' GlmImagePipeline, got {type(pipe).__name__}"
        )
    return AcceleratedGlmImage(pipe, options)


class AcceleratedGlmImage:
    """What `accelerate` returns.

    Attributes:
        pipe: The diffusers pipeline, unchanged.
        options: Options of every call, see `PriorOptions`.
        stats: Figures of the autoregressive stage of the last call; None before, and where
            ``prior_token_ids`` were passed.
        row_stats: The same per image.
    """

    # No other attribute can be set: `fast.scheduler = ...` would otherwise do nothing, silently.
    __slots__ = ("options", "pipe", "row_stats", "stats")

    def __init__(self, pipe: Any, options: Mapping[str, Any]) -> None:
        """Use `accelerate`."""
        self.pipe = pipe
        self.options = dict(options)
        self.stats: Stats | None = None
        self.row_stats: tuple[Stats, ...] = ()
        _prior_settings(pipe.vision_language_encoder, self.options)

    def restore(self) -> Any:
        """The pipeline as it was; nothing has to be undone."""
        return self.pipe

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Makes images: the arguments of the pipeline, and `PriorOptions` by name.

        Each of ``num_images_per_prompt`` images gets codes of its own, where diffusers paints the
        same codes several times. ``generator`` is one for all images or one per image; the codes
        of image k are those of a single call with generator k. The painting gets the noise that it
        gets without `accelerate`, because the codes draw from a copy of the generator.

        Returns:
            What the pipeline returns.

        Raises:
            ValueError: On arguments out of their range, before any forward; on ``image``, which
                needs image-to-image.
            TypeError: On an argument that the pipeline does not know.
        """
        own = {name: kwargs.pop(name) for name in PriorOptions.__annotations__ if name in kwargs}
        given = inspect.signature(self.pipe.__call__).bind(*args, **kwargs).arguments
        self.stats, self.row_stats = None, ()
        if given.get("prior_token_ids") is None:
            self._check_inputs(given)
            count = given.pop("num_images_per_prompt", 1)
            prior_token_ids = self.generate_prior_tokens(
                given["prompt"],
                given.get("height"),
                given.get("width"),
                num_images_per_prompt=count,
                generator=given.get("generator"),
                **own,
            )
            given["prior_token_ids"] = prior_token_ids
            # One prompt per image, because the pipeline would repeat the codes.
            given["prompt"] = _repeated(given["prompt"], count)
        return self.pipe(**given)

    @torch.no_grad()
    def generate_prior_tokens(
        self,
        prompt: str | Sequence[str],
        height: int | None,
        width: int | None,
        *,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        **options: Unpack[PriorOptions],
    ) -> Tensor:
        """The autoregressive stage alone.

        Args:
            prompt: One prompt or several.
            height: Pixels, a multiple of 32.
            width: The same.
            num_images_per_prompt: Images of each prompt, next to each other.
            generator: One for all images or one per image; they are not advanced. None is torch's
                global generator, which is.
            **options: See `PriorOptions`.

        Returns:
            Codes of the large grid, doubled in both directions, ``[B, 4 * rows * columns]`` int64:
            the ``prior_token_ids`` of the pipeline.

        Raises:
            ValueError: On arguments out of their range, before any forward.
        """
        model = self.pipe.vision_language_encoder
        settings = _prior_settings(model, self.options | dict(options))
        check_positive("num_images_per_prompt", num_images_per_prompt)
        for name, side in (("height", height), ("width", width)):
            require(side is not None, name, "given for text to image", side)
        prompts = _repeated(prompt, num_images_per_prompt)
        keys_B = row_keys(_copied(generator), len(prompts))

        def generate(**inputs: Any) -> Tensor:
            return self._codes(inputs, settings, keys_B)

        # diffusers' method on a view of the pipeline whose language model generates by our engine.
        view = _View(self.pipe, vision_language_encoder=_View(model, generate=generate))
        device = self.pipe._execution_device
        codes, *_ = type(self.pipe).generate_prior_tokens(
            view, prompt=prompts, height=height, width=width, device=device
        )
        return codes

    def _codes(self, inputs: Mapping[str, Any], settings: "_Settings", keys_B: Tensor) -> Tensor:
        """Stands in for the model's ``generate``: prompts with the codes of both grids behind."""
        model = self.pipe.vision_language_encoder
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        family: Any = image_family(model)
        layout = family.layout_in(inputs["image_grid_thw"], inputs["images_per_sample"])
        engine, rows = image_engine(
            family,
            layout,
            [row[is_token != 0].tolist() for row, is_token in zip(ids, mask, strict=True)],
            rule=settings.rule,
            law=build_law(settings.law),
            window=settings.window,
            lenience=settings.lenience,
            guidance_scale=1.0,
            keys_B=keys_B,
            device=_loaded_device(model),
            compile=settings.compile,
        )
        with self.pipe.progress_bar(total=rows.num_rows * layout.num_tokens) as bar:
            move = token_mover(bar)
            result = engine.run(lambda record, _: move(record))
        self.stats, self.row_stats = result.stats, result.row_stats
        return torch.cat([ids, torch.tensor(result.units, device=ids.device)], dim=1)

    def _check_inputs(self, given: Mapping[str, Any]) -> None:
        """The pipeline's own checks, and what the engine cannot do."""
        if given.get("image") is not None:
            raise ValueError(
                "accelerate() makes images from text only; for image-to-image call the pipeline "
                "itself (accelerated.pipe)"
            )
        if given.get("prompt") is None:
            raise ValueError("prompt must be given, or prior_token_ids, got neither")
        names = inspect.signature(self.pipe.check_inputs).parameters
        steps = "callback_on_step_end_tensor_inputs"
        known = {name: given[name] for name in names if name in given}
        needed = {name: given.get(name) for name in ("prompt", "height", "width")}
        self.pipe.check_inputs(**({steps: None} | needed | known))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """Checked options."""

    rule: str
    window: int | None
    lenience: float | None
    law: LawConfig
    compile: bool


def _prior_settings(model: Any, options: Mapping[str, Any]) -> _Settings:
    """Options with defaults, checked."""
    for name in options:
        require_known("option", name, PriorOptions.__annotations__)
    decoder, window, lenience, compile = (
        options.get(name, value) for name, value in _DEFAULTS.items()
    )
    # No pipeline of diffusers carries a denoiser.
    require_known("decoder", decoder, [name for name in DECODERS if name != DENOISE])
    check_window(window)
    check_lenience(lenience, DECODERS[decoder])
    require(isinstance(compile, bool), "compile", "True or False", compile)
    law = _config_law(model.generation_config)
    law |= {name: options[name] for name in _LAW_OPTIONS if name in options}
    return _Settings(
        rule=DECODERS[decoder],
        window=1 if decoder == "sequential" else window,
        lenience=lenience,
        law=LawConfig(**law),
        compile=compile,
    )


def _config_law(config: Any) -> dict[str, Any]:
    """What diffusers samples with: the generation config, and transformers' defaults behind it.

    Raises:
        ValueError: If the config sets what the engine has no law for.
    """
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        is_neutral = value is None or value == neutral
        require(is_neutral, f"generation_config.{name}", f"None or {neutral}", value)
    top_k = DEFAULT_TOP_K if config.top_k is None else config.top_k
    law = {"top_k": top_k or None, "top_p": config.top_p, "min_p": config.min_p}
    return law | ({} if config.temperature is None else {"temperature": config.temperature})


def _repeated(prompt: Any, count: int) -> list[str]:
    """Each prompt as often as it has images; an empty string is a prompt, as in diffusers."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    is_good = is_list(prompts, lambda text: isinstance(text, str)) and len(prompts) > 0
    require(is_good, "prompt", "a string or a non-empty list of them", prompt)
    return [text for text in prompts for _ in range(count)]


def _copied(generator: Any) -> Any:
    """Copies of generators: the pipeline draws the noise of its painting from the originals."""
    require_generator(generator)
    if generator is None:
        return None
    if isinstance(generator, torch.Generator):
        return generator.clone_state()
    return [one.clone_state() for one in generator]


def _loaded_device(model: Any) -> torch.device:
    """Where the model takes its input, brought there if it waits on another device.

    `enable_model_cpu_offload` loads a model when its own forward begins; the engine calls the
    parts of the model only.
    """
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(model)
    return text_device(model)


class _View:
    """An object with some attributes replaced, which leaves the object itself alone."""

    def __init__(self, inner: Any, **replaced: Any) -> None:
        """Looks at ``inner`` through ``replaced``."""
        self.__dict__.update(replaced)
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        """Whatever is not replaced."""
        return getattr(self._inner, name)
