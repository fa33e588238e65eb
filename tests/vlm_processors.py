"""Real processors for the models of `vlm`, with a tokenizer of one token per letter."""

from collections.abc import Sequence
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_num2words_available
from vlm import TOWER, tiny_vlm

LETTERS = "abcdefghijklmnopqrstuvwxyz .,:;!?-0123456789\n'()+="
#: In the order of their ids behind the letters, those of `vlm.SPECIAL` first.
SPECIAL = [
    "<image>",
    "<start>",
    "<stop>",
    "<video>",
    "<user>",
    "<bot>",
    "<end>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<pad>",
]
#: What processors ask their tokenizer for.
NAMED = {
    "image_token": "<image>",
    "context_image_token": "<image>",
    "boi_token": "<start>",
    "eoi_token": "<stop>",
    "start_image_token": "<start>",
    "end_image_token": "<stop>",
    "video_token": "<video>",
}
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}"
    "{% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else '<video>' if part.type == 'video' else part.text }}"
    "{% endfor %}<end>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
SIDE = TOWER["image_size"]
SQUARE = {"height": SIDE, "width": SIDE}
GRID = {"patch_size": 2, "merge_size": 2}
#: Pixels of a whole video; frames come in pairs.
FILM = {**GRID, "temporal_patch_size": 2, "size": {"shortest_edge": 32, "longest_edge": 256}}


def tokenizer(special: Sequence[str] = SPECIAL) -> PreTrainedTokenizerFast:
    """One token per letter."""
    vocab = {token: index for index, token in enumerate([*LETTERS, *special])}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    letters.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        eos_token="<end>",
        extra_special_tokens=NAMED,
    )
    made.add_tokens(list(special), special_tokens=True)
    return made


def llava() -> Any:
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE),
        tokenizer(),
        patch_size=TOWER["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def llava_onevision() -> Any:
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=[[SIDE, SIDE]]),
        tokenizer(),
        transformers.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def idefics3() -> Any:
    edge = {"longest_edge": SIDE}
    pictures = transformers.Idefics3ImageProcessor(
        size=edge, max_image_size=edge, do_image_splitting=False
    )
    return transformers.Idefics3Processor(
        pictures, tokenizer(), image_seq_len=4, chat_template=TEMPLATE
    )


def smolvlm() -> Any:
    edge = {"longest_edge": SIDE}
    return transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(
            size=edge, max_image_size=edge, do_image_splitting=False
        ),
        tokenizer(),
        transformers.SmolVLMVideoProcessor(size=edge, max_image_size=edge),
        image_seq_len=4,
        chat_template=TEMPLATE,
    )


def gemma3() -> Any:
    return transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size=SQUARE),
        tokenizer(),
        image_seq_length=4,
        chat_template=TEMPLATE.replace("<image>", "<start>"),
    )


def paligemma() -> Any:
    pictures = transformers.SiglipImageProcessor(size=SQUARE)
    pictures.image_seq_length = 4
    letters = tokenizer()
    letters.bos_token = "a"
    return transformers.PaliGemmaProcessor(pictures, letters, chat_template=TEMPLATE)


def internvl() -> Any:
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=SQUARE),
        tokenizer(),
        transformers.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=TEMPLATE,
    )


def qwen(name: str) -> Any:
    """A processor of the Qwen-VL line."""

    def build() -> Any:
        pictures = transformers.Qwen2VLImageProcessor(
            **GRID, temporal_patch_size=2, min_pixels=16, max_pixels=96
        )
        films = transformers.Qwen3VLVideoProcessor if "3" in name else None
        films = films or transformers.Qwen2VLVideoProcessor
        return getattr(transformers, name)(
            pictures, tokenizer(), films(**FILM), chat_template=TEMPLATE
        )

    return build


def glm_ocr() -> Any:
    pictures = transformers.Glm46VImageProcessor(
        **GRID, temporal_patch_size=2, size={"shortest_edge": 16, "longest_edge": 192}
    )
    made = transformers.Glm46VProcessor(
        pictures,
        tokenizer(),
        transformers.Glm46VVideoProcessor(**FILM),
        chat_template=TEMPLATE.replace("<video>", "(<video>)"),
    )
    # It tells frames from images by the tokens around them, and there are no more tokens.
    made.video_start_id, made.video_end_id = map(made.tokenizer.convert_tokens_to_ids, "()")
    return made


def paddleocr_vl() -> Any:
    pictures = transformers.PaddleOCRVLImageProcessor(
        **GRID, size={"shortest_edge": 16, "longest_edge": 96}
    )
    return transformers.PaddleOCRVLProcessor(pictures, tokenizer(), chat_template=TEMPLATE)


def got_ocr2() -> Any:
    own = {"<image>": "<imgpad>", "<start>": "<img>", "<stop>": "</img>"}
    own |= {"<user>": "<|im_start|>", "<end_of_utterance>": "<|im_end|>"}
    made = transformers.GotOcr2Processor(
        transformers.GotOcr2ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer([own.get(token, token) for token in SPECIAL]),
    )
    made.num_image_tokens = 4
    return made


PROCESSORS = {
    "gemma3": gemma3,
    "glm_ocr": glm_ocr,
    "got_ocr2": got_ocr2,
    "idefics3": idefics3,
    "internvl": internvl,
    "llava": llava,
    "llava_onevision": llava_onevision,
    "paddleocr_vl": paddleocr_vl,
    "paligemma": paligemma,
    "qwen2_5_vl": qwen("Qwen2_5_VLProcessor"),
    "qwen2_vl": qwen("Qwen2VLProcessor"),
    "qwen3_vl": qwen("Qwen3VLProcessor"),
}
if is_num2words_available():
    # It writes the number of frames as a word.
    PROCESSORS["smolvlm"] = smolvlm


def loaded_vlm(name: str) -> tuple[Any, Any]:
    """A tiny model and its processor, which agree on the token that ends an answer."""
    processor = PROCESSORS[name]()
    model = tiny_vlm(name)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model, processor
