"""CLIP and its kin, through transformers at tiny size, against the plain formula."""

import pytest
import torch
from blocks import noise_frames, scores_of, view
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from mmspec.routers import build_router
from mmspec.routers.clip import ClipScorer, HpsScorer, PickScorer
from mmspec.routers.preprocess import crop_to_square, normalized, pad_to_square

WORDS = ["<pad>", "<start>", "<end>", "a", "red", "cat", "dog", "<unk>"]
SIDE, MAX_TOKENS = 16, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": MAX_TOKENS, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8,
        },
        projection_dim=24,
    )  # fmt: skip
    model = CLIPModel(config)
    # The published initialisation is so narrow that pictures would hardly differ.
    for value in model.parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(path)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", unk_token="<unk>",
        pad_token="<pad>",
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("scorer", "squared", "formula"),
    [
        (ClipScorer, crop_to_square, lambda cosine, _: 2.5 * cosine.clamp_min(0)),
        (PickScorer, crop_to_square, lambda cosine, logit: logit),
        (HpsScorer, pad_to_square, lambda cosine, _: cosine),
    ],
)
def test_scores_are_those_of_the_whole_model(folder, scorer, squared, formula):
    frames = noise_frames(5, 20, 36)
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([[1, 3, 4, 5, 2]]),
            pixel_values=normalized(squared(frames, SIDE)),
        )
    logit = output.logits_per_image[:, 0]
    expected = formula(logit / model.logit_scale.exp(), logit)
    found = scores_of(scorer(folder, batch_size=2), view(frames, prompt="a red cat"))
    # Batches of two are spread: 0 3, 1 4, 2.
    assert torch.allclose(found, expected[[0, 3, 1, 4, 2]], rtol=1e-4, atol=1e-6)
    assert found.std() > 0 or scorer is ClipScorer


def test_a_router_by_name(folder):
    router = build_router(f"hps:-1,weights={folder},aggregate=mean")
    assert router.needs_prompt
    assert router.score_name == "hps,aggregate=mean"
    block = view(noise_frames(2, 20, 20), prompt="cat " * 40)
    assert router.judge(block).keep


@pytest.mark.parametrize("name", ["clip-score", "pick-score", "hps"])
def test_published_weights_that_are_not_there_are_named(name):
    with pytest.raises(ValueError, match=f"router '{name}' has no weights"):
        build_router(f"{name}:0.2")


def test_bad_batch_size(folder):
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got '0'"):
        build_router(f"hps:-1,weights={folder},batch_size=0")
