"""Which models are supported, and how that is known: the one table of it.

`mmspec models` prints it. Every row names the test that covers it, and a test checks that the
class exists in transformers or diffusers and that the named test does.
"""

from dataclasses import dataclass

_CAUSAL_TEST = "tests/adapters/test_causal_lm.py::test_greedy_equals_generate"
_IMAGE_TEST = "tests/test_support.py::test_image_model_keeps_its_tokens"
_EMU3_TEST = "tests/pipelines/test_image_emu3.py::test_greedy_is_that_of_transformers"
_CHAMELEON_TEST = (
    "tests/pipelines/test_image_chameleon.py::test_greedy_is_that_of_the_decoder_and_the_head"
)
_VLM_TEST = "tests/adapters/test_vision_language.py::test_greedy_equals_generate"
_TINY = "tiny random weights against generate(), greedy, single rows and ragged batches"


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportRow:
    """One model family.

    Attributes:
        family: What people call it.
        class_name: Class in transformers or diffusers.
        adapter: File under ``mmspec/adapters`` that serves it.
        pipeline: What to load it with; "speculate" where it runs inside `generate` only.
        tested: On which weights and how.
        test: Id of the test.
        guarantee: What the default rule promises: with "exact", the tokens of plain decoding with
            the same seed. Rules of other guarantees are chosen by name, for videos the routers.
    """

    family: str
    class_name: str
    adapter: str
    pipeline: str
    tested: str
    test: str
    guarantee: str = "exact"


def _causal(family: str, key: str, more: str = "", class_name: str | None = None) -> SupportRow:
    return SupportRow(
        family=family,
        class_name=class_name or f"{key}ForCausalLM",
        adapter="causal_lm",
        pipeline="SpeculativeTextPipeline",
        tested=_TINY + more,
        test=f"{_CAUSAL_TEST}[{key}-1]",
    )


def _vision(
    family: str,
    key: str,
    class_name: str,
    more: str = "; its processor",
    pipeline: str = "SpeculativeVLMPipeline",
) -> SupportRow:
    return SupportRow(
        family=family,
        class_name=f"{class_name}ForConditionalGeneration",
        adapter="vision_language",
        pipeline=pipeline,
        tested=_TINY + ", with and without images" + more,
        test=f"{_VLM_TEST}[{key}-1]",
    )


SUPPORT = (
    _causal("Llama", "Llama", "; SmolLM2-135M-Instruct (Q4_1)"),
    _causal("Qwen2", "Qwen2", "; sliding windows too"),
    _causal("Qwen2-MoE", "Qwen2Moe"),
    _causal("Qwen3", "Qwen3"),
    _causal("Gemma2", "Gemma2"),
    _causal("Gemma3", "Gemma3"),
    _causal("Mistral", "Mistral", "; with and without sliding window"),
    _causal("Mixtral", "Mixtral"),
    _causal("Phi3", "Phi3"),
    _causal("GPT-NeoX", "GPTNeoX"),
    _causal("GPT-2", "GPT2", class_name="GPT2LMHeadModel"),
    SupportRow(
        family="GLM-Image",
        class_name="GlmImageForConditionalGeneration",
        adapter="image_glm",
        pipeline="accelerate",
        tested="tiny random weights against generate() and plain decoding, greedy and sampled; "
        "a tiny GlmImagePipeline",
        test="tests/adapters/test_image_glm.py::test_exact_is_sequential_for_every_window",
    ),
    SupportRow(
        family="Janus",
        class_name="JanusForConditionalGeneration",
        adapter="token_image",
        pipeline="SpeculativeImagePipeline",
        tested="tiny random weights against plain decoding, greedy and sampled; bundled:avatars",
        test=_IMAGE_TEST,
    ),
    SupportRow(
        family="Emu3",
        class_name="Emu3ForConditionalGeneration",
        adapter="image_emu3",
        pipeline="SpeculativeImagePipeline",
        tested="tiny random weights against generate() (greedy) and plain decoding (sampled)",
        test=_EMU3_TEST,
    ),
    SupportRow(
        family="Chameleon",
        class_name="ChameleonForConditionalGeneration",
        adapter="image_chameleon",
        pipeline="SpeculativeImagePipeline",
        tested="tiny random weights against a plain loop over its decoder and head (greedy) and "
        "plain decoding (sampled); pixels need a supplied image_decoder",
        test=_CHAMELEON_TEST,
    ),
    SupportRow(
        family="AnyFlow-FAR",
        class_name="AnyFlowFARPipeline",
        adapter="video_anyflow",
        pipeline="SpeculativeVideoPipeline",
        tested="tiny random weights against the pipeline of diffusers, to the bit",
        test="tests/adapters/test_block_video.py::test_nothing_drafted_is_the_target_pipeline",
    ),
    SupportRow(
        family="Helios",
        class_name="HeliosPipeline",
        adapter="video_helios",
        pipeline="SpeculativeVideoPipeline",
        tested="tiny random weights against the pipeline of diffusers, to the bit",
        test="tests/adapters/test_video_helios.py::"
        "test_target_and_drafter_alone_are_their_pipelines",
    ),
    _vision("LLaVA", "llava", "Llava"),
    _vision("LLaVA-OneVision", "llava_onevision", "LlavaOnevision"),
    _vision("Qwen2-VL", "qwen2_vl", "Qwen2VL"),
    _vision("Qwen2.5-VL", "qwen2_5_vl", "Qwen2_5_VL"),
    _vision("Qwen3-VL", "qwen3_vl", "Qwen3VL"),
    _vision("SmolVLM", "smolvlm", "SmolVLM", more=""),
    _vision("Idefics3, Granite-Docling", "idefics3", "Idefics3"),
    _vision("InternVL", "internvl", "InternVL"),
    _vision("Gemma3 (images)", "gemma3", "Gemma3"),
    _vision("PaliGemma", "paligemma", "PaliGemma"),
    _vision("GLM-OCR", "glm_ocr", "GlmOcr"),
    _vision("PaddleOCR-VL", "paddleocr_vl", "PaddleOCRVL"),
    _vision("GOT-OCR2", "got_ocr2", "GotOcr2", more="", pipeline="speculate"),
)
