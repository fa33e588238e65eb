"""Vision-language models to measure, and the same job given to transformers and to us.

``tiny-vlm`` is a random LLaVA with random pictures: it needs no download, so the benchmarks run on
it, and it is meaningless for acceptance.
"""

import importlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from torch import nn

from mmspec.adapters import vision_language
from mmspec.assets import bundled_names, bundled_path
from mmspec.bench.measure import Sample, timed
from mmspec.bench.setups import DTYPES, seeded, static_card, step_figures
from mmspec.checks import require
from mmspec.engine import Engine
from mmspec.law_config import LawConfig
from mmspec.noise import row_keys
from mmspec.pipelines.image import SpeculativeImagePipeline
from mmspec.rows import TokenRows
from mmspec.sampling import build_law
from mmspec.speculation import Settings, build_engine

TINY = "tiny-vlm"
_CLEAN = {"blur": 0.0, "noise": 0.0}
#: Kinds of pages -> how they are drawn: blur in pixels, noise in grey levels. Of "failed" ones the
#: OCR is garbled.
PAGE_KINDS = {
    "clean": _CLEAN,
    "noisy": {"blur": 0.6, "noise": 15.0},
    "failed": _CLEAN,
    "tables": _CLEAN,
}
#: What is on them, as the held-out pages are sorted; anything else is prose.
_CONTENT = {"tables": ("table",)}
_PROSE = ("docs", "wordnet")
#: Bundled model -> the name of its drafter, if it has one.
VLM_MODELS: dict[str, str | None] = {"pages": "pages-drafter", "captioner": None, TINY: None}

_LETTERS = "abcdefghijklmnopqrstuvwxyz .,|-#0123456789\n"
_TEMPLATE = (
    "{% for m in messages %}{% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
)
_SIDE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionModel:
    """A vision-language model and how to talk to it.

    Attributes:
        name: For tables.
        model: The model, in evaluation mode.
        processor: Its processor, with a chat template.
        drafter: A smaller model of the same tokens that sees the pictures too; None if there is
            none.
        eos_token_ids: What ends an answer.
    """

    name: str
    model: Any
    processor: Any
    drafter: Any
    eos_token_ids: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device

    def encode(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The model's inputs for a batch: one picture and one prompt each, padded on the left."""
        texts = []
        for entry in entries:
            parts = [{"type": "image"}, {"type": "text", "text": entry["prompt"]}]
            turn = [{"role": "user", "content": parts}]
            texts.append(
                self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            )
        encoded = self.processor(
            text=texts,
            images=[[entry["image"]] for entry in entries],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return dict(encoded.to(self.device, self.model.dtype))


def load_vlm(name: str, dtype: str, device: str = "cpu") -> VisionModel:
    """Loads a vision-language model, its processor and its drafter by name.

    Args:
        name: One of `VLM_MODELS`.
        dtype: A name of `DTYPES`.
        device: Where to.

    Raises:
        ValueError: If a name is unknown or not bundled.
    """
    if name not in VLM_MODELS or dtype not in DTYPES:
        raise ValueError(
            f"unknown model {name!r} or dtype {dtype!r}; known: {', '.join(VLM_MODELS)}; "
            f"{', '.join(DTYPES)}"
        )
    model: Any
    drafter: Any
    if name == TINY:
        model, drafter, processor = _random_llava(2), _random_llava(1), _tiny_processor()
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        small = VLM_MODELS[name]
        load = AutoModelForImageTextToText.from_pretrained
        model = load(bundled_path(name))
        drafter = load(bundled_path(small)) if small in bundled_names() else None
        processor = AutoProcessor.from_pretrained(bundled_path(name))
    model = model.to(device, DTYPES[dtype]).eval()
    eos = model.generation_config.eos_token_id
    return VisionModel(
        name=name,
        model=model,
        processor=processor,
        drafter=None if drafter is None else drafter.to(device, DTYPES[dtype]).eval(),
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
    )


def _random_llava(num_layers: int) -> nn.Module:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    image = len(_LETTERS)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config=LlamaConfig(
            **sizes,
            vocab_size=image + 3,
            num_hidden_layers=num_layers,
            initializer_range=0.2,
            max_position_embeddings=1024,
        ),
        vision_config=CLIPVisionConfig(
            **sizes, num_hidden_layers=1, image_size=_SIDE, patch_size=_SIDE // 4, projection_dim=64
        ),
        image_token_index=image,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = image + 1
    return model


def _tiny_processor() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    special = ["<image>", "<pad>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*_LETTERS, *special])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters,
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": _SIDE}, crop_size=_SIDE),
        tokenizer,
        patch_size=_SIDE // 4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def load_captions(model: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Pictures to caption, held out from the model's training: ``limit`` of them.

    Beyond those that come with the captioner, `bundled:avatars` draws them, of its own held-out
    captions.
    """
    if model == TINY:
        return [
            {
                "id": f"noise-{seed}",
                "kind": "captions",
                "prompt": "say",
                "image": random_picture(seed),
                "max_new_tokens": 32,
            }
            for seed in range(8)
        ][:limit]
    if model != "captioner":
        raise ValueError(f"no pictures to caption come with {model!r}")
    folder = bundled_path(model) / "samples"
    rows = _json_lines(folder / "samples.jsonl")[:limit]
    pictures = {Path(row["file"]).stem: _opened(folder / row["file"]) for row in rows}
    pictures |= _drawn_avatars((limit or 0) - len(rows))
    return [
        {
            "id": name,
            "kind": "captions",
            "prompt": "describe",
            "image": picture,
            "max_new_tokens": 40,
        }
        for name, picture in pictures.items()
    ]


def _drawn_avatars(count: int) -> dict[str, Image.Image]:
    """Pictures of held-out captions, seeded; none if ``count`` is below 1."""
    if count < 1:
        return {}
    entries = _json_lines(bundled_path("avatars") / "heldout_fresh.jsonl")
    if count > len(entries):
        rule = f"at most {len(entries)} more than come with the captioner"
        require(False, "captions", rule, count)
    pipe = SpeculativeImagePipeline.from_pretrained("bundled:avatars")
    pipe.set_progress_bar_config(disable=True)
    captions = [entry["caption"] for entry in entries[:count]]
    images = pipe(captions, generator=seeded(0, count), batch_size=8).images
    return {f"drawn-{number:03d}": image for number, image in enumerate(images)}


def load_pages(model: str, kinds: Sequence[str], limit: int | None = None) -> list[dict[str, Any]]:
    """Pages of these kinds, held out from the model's training: ``limit`` of each.

    Returns:
        Entries with the page as ``image`` and, as a text layer would have it, what is written on
        it as ``text``: without markup, the rows as they stand.
    """
    if model == TINY:
        found = [
            {"id": f"{kind}-{seed}", "kind": kind, "prompt": "read", "image": random_picture(seed)}
            for kind in kinds
            for seed in range(4)[:limit]
        ]
        return [entry | {"text": "a page of noise", "max_new_tokens": 32} for entry in found]
    if model != "pages":
        raise ValueError(f"no pages come with {model!r}")
    # It comes with the model, which may not be there.
    rendering: Any = importlib.import_module("mmspec.assets.pages.rendering")
    rows = _json_lines(bundled_path(model) / "held_out.jsonl")
    found = []
    for kind in kinds:
        wanted = _CONTENT.get(kind, _PROSE)
        chosen = [(i, row["markdown"]) for i, row in enumerate(rows) if row["kind"] in wanted]
        for seed, markdown in chosen[:limit]:
            lines = (line.replace("\0", " ").strip() for line in rendering.lay_out(markdown)[0])
            found.append(
                {
                    "id": f"{kind}-{seed:03}",
                    "kind": kind,
                    "prompt": "Convert to Markdown.",
                    "image": rendering.render_page(markdown, seed=seed, **PAGE_KINDS[kind]),
                    "text": "\n".join(lines),
                    "max_new_tokens": 480,
                }
            )
    return found


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def random_picture(seed: int) -> Image.Image:
    """Noise that `TINY` can see."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (_SIDE, _SIDE, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# --------------------------------------------------------------------------- ours


def vlm_engine(
    loaded: VisionModel,
    inputs: Mapping[str, Any],
    *,
    settings: Settings,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> tuple[Engine, Sample]:
    """Our engine as `mmspec.pipelines.SpeculativeVLMPipeline` wires it.

    Row i of a seed draws with the generator of ``seed + 1000 * i``, whatever the drafter.

    Returns:
        The engine, and the seconds of the vision tower and of all that is set up after it (the
        drafter's own tower is a part of that).
    """
    prepared, vision_s = timed(lambda: vision_language.prepare(loaded.model, inputs), loaded.device)

    def build() -> Engine:
        is_token_BP = inputs["attention_mask"].bool()
        pairs = zip(inputs["input_ids"], is_token_BP, strict=True)
        prompts = [ids[mask].tolist() for ids, mask in pairs]
        rows = TokenRows(
            prompts,
            max_new_tokens=[max_new_tokens] * len(prompts),
            keys_B=row_keys(seeded(seed, len(prompts)), len(prompts)),
            eos_token_ids=loaded.eos_token_ids,
            device=loaded.device,
        )
        extras = vision_language.extras_in_generate(
            loaded.model, rows, prepared, is_token_BP, inputs
        )
        law = build_law(LawConfig(temperature=temperature))
        return build_engine(loaded.model, rows, law, settings, extras=extras)

    engine, setup_s = timed(build, loaded.device)
    return engine, {"vision_time_s": vision_s, "setup_time_s": setup_s}


@torch.no_grad()
def run_vlm(
    loaded: VisionModel, inputs: Mapping[str, Any], **options: Any
) -> tuple[list[list[int]], Sample]:
    """Decodes a batch; returns its rows and what a sample keeps of it.

    Args:
        loaded: The model.
        inputs: Of `VisionModel.encode`.
        **options: Of `vlm_engine`.
    """
    engine, seconds = vlm_engine(loaded, inputs, **options)
    result = engine.run()
    return list(result.units), step_figures(result) | seconds


@torch.no_grad()
def vlm_card(loaded: VisionModel, inputs: Mapping[str, Any]) -> list[Sample]:
    """The static card of a vision-language model behind prompts with pictures."""
    engine, _ = vlm_engine(
        loaded,
        inputs,
        settings=Settings(drafter="none"),
        max_new_tokens=128,
        temperature=0.0,
        seed=0,
    )
    engine.prefill()
    return static_card(engine.target)


# --------------------------------------------------------------------------- the drafter's prompt


class PromptMeter:
    """Counts and clocks what a drafter reads before its first guess.

    Attributes:
        num_tokens: Tokens of the first forward, over all rows.
        time_s: Seconds of it.
    """

    def __init__(self, model: nn.Module | None) -> None:
        """Prepares to watch a model; None is watched for nothing."""
        self._model = model
        self._handles: list[Any] = []
        self._started = 0.0
        self._is_first = True
        self.num_tokens = 0
        self.time_s = 0.0

    def __enter__(self) -> "PromptMeter":
        """Starts watching."""
        if self._model is not None:
            self._handles = [
                self._model.register_forward_pre_hook(self._start, with_kwargs=True),
                self._model.register_forward_hook(self._stop),
            ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()

    def _start(self, module: nn.Module, _: object, inputs: dict[str, Any]) -> None:
        if self._is_first:
            fed = inputs["inputs_embeds"] if "inputs_embeds" in inputs else inputs["input_ids"]
            self.num_tokens += fed.shape[0] * fed.shape[1]
            self._started = time.perf_counter()

    def _stop(self, module: nn.Module, _: object, __: object) -> None:
        if self._is_first:
            self.time_s += time.perf_counter() - self._started
            self._is_first = False
