"""Tiny random vision-language models of the real classes, and requests for them.

A request is a list of rows; a row is a list of text tokens, images and videos. An image is its size
in placeholders, (height, width), which families whose images have one size do not heed; a video is
(frames, height, width).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import transformers
from supported import Supported

IMAGE, START, END, VIDEO, PAD = 50, 51, 52, 53, 60
VOCAB = 61
#: Text tokens lie below the special ones.
NUM_TEXT = 50

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 2, 1]}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
GRID_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 2, "initializer_range": 0.3}
SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
Grid = tuple[int, int]
Film = tuple[int, int, int]
Row = Sequence[int | Grid | Film]


def squares(count: int, side: int = 8) -> torch.Tensor:
    """Random pictures ``[count, 3, side, side]``; every call draws the same."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64)


def plain_pictures(rows: Sequence[Row], family: "Family") -> dict[str, Any]:
    """One picture of one size after the other."""
    return {"pixel_values": squares(len(images(rows)), family.pixels)}


def padded_pictures(rows: Sequence[Row], family: "Family") -> dict[str, Any]:
    """Pictures by row, rows with fewer of them filled up with black."""
    counts = [len(images([row])) for row in rows]
    pictures = iter(squares(sum(counts), family.pixels))
    values = torch.zeros(len(rows), max(counts), 3, family.pixels, family.pixels).double()
    for row, count in enumerate(counts):
        for index in range(count):
            values[row, index] = next(pictures)
    mask = torch.ones(len(rows), max(counts), family.pixels, family.pixels, dtype=torch.bool)
    return {"pixel_values": values, "pixel_attention_mask": mask}


def flat_patches(rows: Sequence[Row], family: "Family") -> dict[str, Any]:
    """Patches of pictures of any size; a placeholder stands for 2 x 2 of them."""
    grids = [(1, 2 * height, 2 * width) for height, width in images(rows)]
    num_patches = sum(height * width for _, height, width in grids)
    generator = torch.Generator().manual_seed(3)
    shape = (num_patches, *family.patch_shape)
    values = torch.rand(shape, generator=generator, dtype=torch.float64)
    return {"pixel_values": values, "image_grid_thw": torch.tensor(grids)}


def flat_frames(rows: Sequence[Row], family: "Family") -> dict[str, Any]:
    """Patches of videos, as `flat_patches`."""
    grids = [(frames, 2 * height, 2 * width) for frames, height, width in videos(rows)]
    num_patches = sum(frames * height * width for frames, height, width in grids)
    generator = torch.Generator().manual_seed(5)
    shape = (num_patches, *family.patch_shape)
    values = torch.rand(shape, generator=generator, dtype=torch.float64)
    return {"pixel_values_videos": values, "video_grid_thw": torch.tensor(grids)}


def timed_frames(rows: Sequence[Row], family: "Family") -> dict[str, Any]:
    """Qwen2.5-VL: the time between frames places them."""
    seconds = [0.25 * (1 + index) for index in range(len(videos(rows)))]
    return flat_frames(rows, family) | {"second_per_grid_ts": seconds}


def stacked_frames(rows: Sequence[Row], family: "Family") -> dict[str, Any]:
    """LLaVA-OneVision: videos of as many frames each."""
    (frames,) = {film[0] for film in videos(rows)}
    values = 1 - squares(len(videos(rows)) * frames, family.pixels)
    return {"pixel_values_videos": values.unflatten(0, (-1, frames))}


def tiled_pictures(rows: Sequence[Row], family: "Family") -> dict[str, Any]:
    """LLaVA-OneVision: a thumbnail and one tile each, of square pictures."""
    count = len(images(rows))
    values = squares(2 * count, family.pixels).unflatten(0, (count, 2))
    sizes = torch.full((count, 2), family.pixels)
    return {"pixel_values": values, "image_sizes": sizes}


def images(rows: Sequence[Row]) -> list[Grid]:
    """The images of all rows in the order in which the placeholders stand."""
    return [item for row in rows for item in row if isinstance(item, tuple) and len(item) == 2]


def videos(rows: Sequence[Row]) -> list[Film]:
    """The videos of all rows, likewise."""
    return [item for row in rows for item in row if isinstance(item, tuple) and len(item) == 3]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to build a model and its inputs.

    Attributes:
        title: What people call it.
        class_name: Class in transformers.
        config: Makes its configuration.
        pictures: Makes the inputs of the vision tower.
        num_placeholders: Placeholders of an image; None where its size says how many.
        pixels: Side of a picture.
        patch_shape: Shape of a flat patch.
        token_types: Name of the input that tells image tokens from text, if it is needed.
        films: Makes the inputs of the vision tower for videos; None where there are none.
        frame_token: Stands for a feature of a video.
        is_timed: Text stands between the frames of a video.
    """

    title: str
    class_name: str
    config: Callable[[], Any]
    pictures: Callable[..., dict[str, Any]] = plain_pictures
    num_placeholders: int | None = 4
    pixels: int = 8
    patch_shape: tuple[int, ...] = (24,)
    token_types: str | None = None
    films: Callable[..., dict[str, Any]] | None = None
    frame_token: int = VIDEO
    is_timed: bool = False

    @property
    def supported(self) -> Supported:
        """Its row in the table of supported models."""
        return Supported(
            family=self.title,
            class_name=self.class_name,
            adapter="vision_language",
            pipeline="SpeculativeVLMPipeline",
        )


def llama() -> Any:
    return transformers.LlamaConfig(**TEXT)


def qwen2() -> Any:
    return transformers.Qwen2Config(**TEXT)


def clip() -> Any:
    return transformers.CLIPVisionConfig(**TOWER, projection_dim=16)


def siglip(**changes: Any) -> Any:
    return transformers.SiglipVisionConfig(**(TOWER | {"vision_use_head": False} | changes))


def llava(text_config: Any = None) -> Any:
    return transformers.LlavaConfig(
        text_config=text_config or llama(),
        vision_config=clip(),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )


def llava_onevision() -> Any:
    return transformers.LlavaOnevisionConfig(
        text_config=qwen2(),
        vision_config=siglip(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[8, 8]],
    )


def gemma3() -> Any:
    changes = {"sliding_window": 5, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2}
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**(TEXT | changes)),
        vision_config=siglip(),
        mm_tokens_per_image=4,
        boi_token_index=START,
        eoi_token_index=END,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def paligemma(text_config: Any = None) -> Any:
    return transformers.PaliGemmaConfig(
        text_config=text_config or transformers.GemmaConfig(**TEXT),
        vision_config=siglip(projection_dim=32),
        image_token_index=IMAGE,
        vocab_size=VOCAB,
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )


def internvl() -> Any:
    tower = TOWER | {"image_size": [8, 8], "patch_size": [2, 2]}
    return transformers.InternVLConfig(
        text_config=qwen2(),
        vision_config=transformers.InternVLVisionConfig(**tower),
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def smolvlm(name: str) -> Callable[[], Any]:
    def build() -> Any:
        vision = getattr(transformers, f"{name}VisionConfig")(**TOWER)
        return getattr(transformers, f"{name}Config")(
            text_config=llama(),
            vision_config=vision,
            image_token_id=IMAGE,
            scale_factor=1,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        )

    return build


def qwen_vl(name: str, tower: dict[str, Any], **text: Any) -> Callable[[], Any]:
    def build(
        text_config: Mapping[str, Any] = MappingProxyType({}),
        vision_config: Mapping[str, Any] = MappingProxyType({}),
    ) -> Any:
        return getattr(transformers, f"{name}Config")(
            text_config={**TEXT, "rope_parameters": dict(MROPE), **text, **text_config},
            vision_config={**GRID_TOWER, **tower, **vision_config},
            tie_word_embeddings=False,
            **SPECIAL,
        )

    return build


def got_ocr2() -> Any:
    vision = {
        "hidden_size": 16,
        "output_channels": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 24,
        "initializer_range": 0.3,
    }
    return transformers.GotOcr2Config(
        text_config=qwen2(),
        vision_config=transformers.GotOcr2VisionConfig(**vision),
        image_token_index=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


FAMILIES = {
    "llava": Family(title="LLaVA", class_name="LlavaForConditionalGeneration", config=llava),
    "llava_onevision": Family(
        title="LLaVA-OneVision",
        class_name="LlavaOnevisionForConditionalGeneration",
        config=llava_onevision,
        pictures=tiled_pictures,
        num_placeholders=4 + 4 + 2,
        films=stacked_frames,
    ),
    "smolvlm": Family(
        title="SmolVLM",
        class_name="SmolVLMForConditionalGeneration",
        config=smolvlm("SmolVLM"),
        pictures=padded_pictures,
    ),
    "idefics3": Family(
        title="Idefics3, Granite-Docling",
        class_name="Idefics3ForConditionalGeneration",
        config=smolvlm("Idefics3"),
        pictures=padded_pictures,
    ),
    "internvl": Family(
        title="InternVL", class_name="InternVLForConditionalGeneration", config=internvl
    ),
    "gemma3": Family(
        title="Gemma3 (images)",
        class_name="Gemma3ForConditionalGeneration",
        config=gemma3,
        token_types="token_type_ids",
    ),
    "paligemma": Family(
        title="PaliGemma",
        class_name="PaliGemmaForConditionalGeneration",
        config=paligemma,
        token_types="token_type_ids",
    ),
    "got_ocr2": Family(
        title="GOT-OCR2",
        class_name="GotOcr2ForConditionalGeneration",
        config=got_ocr2,
        pixels=32,
    ),
    "qwen2_vl": Family(
        title="Qwen2-VL",
        class_name="Qwen2VLForConditionalGeneration",
        config=qwen_vl("Qwen2VL", {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
        pictures=flat_patches,
        num_placeholders=None,
        token_types="mm_token_type_ids",
        films=flat_frames,
    ),
    "qwen2_5_vl": Family(
        title="Qwen2.5-VL",
        class_name="Qwen2_5_VLForConditionalGeneration",
        config=qwen_vl(
            "Qwen2_5_VL",
            {
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                "window_size": 8,
                "fullatt_block_indexes": [1],
            },
        ),
        pictures=flat_patches,
        num_placeholders=None,
        token_types="mm_token_type_ids",
        films=timed_frames,
    ),
    "qwen3_vl": Family(
        title="Qwen3-VL",
        class_name="Qwen3VLForConditionalGeneration",
        config=qwen_vl(
            "Qwen3VL",
            {
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        ),
        pictures=flat_patches,
        num_placeholders=None,
        token_types="mm_token_type_ids",
        films=flat_frames,
        is_timed=True,
    ),
    "glm_ocr": Family(
        title="GLM-OCR",
        class_name="GlmOcrForConditionalGeneration",
        config=qwen_vl(
            "GlmOcr", {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
        ),
        pictures=flat_patches,
        num_placeholders=None,
        token_types="mm_token_type_ids",
        films=flat_frames,
        frame_token=IMAGE,
        is_timed=True,
    ),
    "paddleocr_vl": Family(
        title="PaddleOCR-VL",
        class_name="PaddleOCRVLForConditionalGeneration",
        config=qwen_vl("PaddleOCRVL", TOWER | {"patch_size": 2}),
        pictures=flat_patches,
        num_placeholders=None,
        patch_shape=(3, 2, 2),
        token_types="mm_token_type_ids",
    ),
}

SUPPORTED = {name: family.supported for name, family in FAMILIES.items()}
FILMED = [name for name, family in FAMILIES.items() if family.films is not None]


def tiny_vlm(name: str, **changes: Any) -> Any:
    """A random model in float64 whose next tokens depend on its images."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, family.class_name)(family.config(**changes))
    for parameter in model.parameters():
        # Initial values of the towers differ by family and may be next to nothing.
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    scale = getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)
    # Gemma multiplies its embeddings; a token would then hear little but itself.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3 / scale**2)
    model.generation_config.pad_token_id = PAD
    return model.double().eval()


def request(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What a processor would hand to `generate`: left-padded rows, pictures and videos."""
    family = FAMILIES[name]
    pairs = [[*itertools.chain(*(_placed(item, family) for item in row))] for row in rows]
    longest = max(map(len, pairs))
    ids, types = (
        torch.tensor(
            [[fill] * (longest - len(row)) + [pair[part] for pair in row] for row in pairs]
        )
        for part, fill in enumerate((PAD, 0))
    )
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in pairs])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if family.token_types is not None:
        inputs[family.token_types] = types
    if name == "paligemma":
        # The whole prompt is a prefix.
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if images(rows):
        inputs |= family.pictures(rows, family)
    if videos(rows):
        inputs |= family.films(rows, family)
    return inputs


def _placed(item: int | Grid | Film, family: Family) -> list[tuple[int, int]]:
    """The tokens of an item, each with its type: 1 in images, 2 in videos."""
    if not isinstance(item, tuple):
        return [(item, 0)]
    if len(item) == 2:
        count = family.num_placeholders
        own = [(IMAGE, 1)] * (item[0] * item[1] if count is None else count)
        return [(START, 0), *own, (END, 0)]
    frames, height, width = item
    if family.is_timed:
        frame = [(START, 0), *[(family.frame_token, 2)] * (height * width), (END, 0)]
        return [pair for index in range(frames) for pair in [(10 + index, 0), *frame]]
    # A newline stands behind the frames of LLaVA-OneVision, a feature each.
    count = frames + 1 if family.films is stacked_frames else frames * height * width
    return [(START, 0), *[(family.frame_token, 2)] * count, (END, 0)]
