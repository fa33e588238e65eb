"""Which models are supported, and how that is known: the one table of it.

`mmspec models` prints it. Every row names the test that covers it, and a test checks that the
class exists in transformers and that the named test does.
"""

from dataclasses import dataclass

_CAUSAL_TEST = "tests/test_support.py::test_causal_lm_keeps_its_tokens"
_IMAGE_TEST = "tests/test_support.py::test_image_model_keeps_its_tokens"
_TINY = "tiny random weights, float64, greedy and sampled, ragged batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportRow:
    """One model family.

    Attributes:
        family: What people call it.
        class_name: Class in transformers.
        adapter: File under ``mmspec/adapters`` that serves it.
        pipeline: What to load it with.
        tested: On which weights and how.
        test: Id of the test.
        guarantee: What the default rule promises: with "exact", the tokens of plain decoding with
            the same seed. Rules of other guarantees are chosen by name.
    """

    family: str
    class_name: str
    adapter: str
    pipeline: str
    tested: str
    test: str
    guarantee: str = "exact"


def _causal(family: str, class_name: str, tested: str = _TINY) -> SupportRow:
    return SupportRow(
        family=family,
        class_name=class_name,
        adapter="causal_lm",
        pipeline="SpeculativeTextPipeline",
        tested=tested,
        test=f"{_CAUSAL_TEST}[{class_name}]",
    )


SUPPORT = (
    _causal("Llama", "LlamaForCausalLM", f"{_TINY}; SmolLM2-135M-Instruct (Q4_1), float32"),
    _causal("Qwen2", "Qwen2ForCausalLM"),
    _causal("Qwen3", "Qwen3ForCausalLM"),
    _causal("Gemma2", "Gemma2ForCausalLM"),
    _causal("Gemma3", "Gemma3ForCausalLM"),
    _causal("Mistral", "MistralForCausalLM"),
    _causal("GPT-NeoX", "GPTNeoXForCausalLM"),
    _causal("Phi3", "Phi3ForCausalLM"),
    _causal("Mixtral", "MixtralForCausalLM"),
    SupportRow(
        family="Janus",
        class_name="JanusForConditionalGeneration",
        adapter="token_image",
        pipeline="SpeculativeImagePipeline",
        tested=f"{_TINY}, with guidance; bundled:avatars, float32",
        test=f"{_IMAGE_TEST}[JanusForConditionalGeneration]",
    ),
)
