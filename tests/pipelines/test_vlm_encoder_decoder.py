"""The vision-language pipeline on encoder-decoders: the tokens of `generate` on the same inputs."""

import pytest
import torch
import transformers
from encoder_decoders import NUM_PLACEHOLDERS, SIDE, SUPPORTED, tiny_encoder_decoder
from PIL import Image
from towers import CALLS, NUM_NEW, TowerRuns, another, figures_of, make_fresh
from vlm_processors import tokenizer

from mmspec.pipelines import SpeculativeDocumentPipeline, SpeculativeVLMPipeline


def picture(seed, width, height):
    made = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 3), generator=made, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


def tokens_of(out):
    return [tokens.tolist() for tokens in out.tokens]


SIZE = {"height": SIDE, "width": SIDE}
PICTURES = [picture(1, 16, 16), picture(2, 20, 12), picture(3, 16, 30)]


def letters():
    """The tokenizer of the other models; ids as in `encoder_decoders`."""
    made = tokenizer()
    made.bos_token, made.eos_token = "<start>", "<end>"
    return made


def florence2():
    pictures = transformers.CLIPImageProcessor(size=SIZE, crop_size=SIZE)
    pictures.image_seq_length = NUM_PLACEHOLDERS
    return transformers.Florence2Processor(pictures, letters())


def donut():
    return transformers.DonutProcessor(transformers.DonutImageProcessor(size=SIZE), letters())


def nougat():
    pictures = transformers.NougatImageProcessor(size=SIZE)
    return transformers.NougatProcessor(pictures, letters())


PROCESSORS = {"donut": donut, "florence2": florence2, "nougat": nougat}
#: Of different lengths: Florence-2's tasks are read by the encoder, Donut's begin the decoder.
PROMPTS = {
    "donut": ["<user>", "<bot>ab", "<user>abc"],
    "florence2": ["<CAPTION>", "a cat", "<OPEN_VOCABULARY_DETECTION> a red cat, a dog"],
    "nougat": ["<start>", "<start>", "<start>ab"],
}


def make_pipe(name):
    processor = PROCESSORS[name]()
    model = tiny_encoder_decoder(name)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    pipe = SpeculativeVLMPipeline.from_model(model, processor, schedule="fixed")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def donut_pipe():
    return make_pipe("donut")


def generated(pipe, name):
    """New tokens of transformers' own loop, a prompt at a time."""
    rows = []
    for text, image in zip(PROMPTS[name], PICTURES, strict=True):
        if name == "florence2":
            inputs = pipe.processor(text=text, images=image, return_tensors="pt")
        else:
            inputs = pipe.processor(images=image, return_tensors="pt")
            ids = pipe.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            inputs["decoder_input_ids"] = ids
        out = pipe.model.generate(
            **inputs.to(pipe.dtype), do_sample=False, max_new_tokens=12, num_beams=1
        )
        rows.append(out[0, 1 if name == "florence2" else ids.shape[1] :].tolist())
    return rows


@pytest.mark.supports("processor", SUPPORTED)
# What transformers' own processors warn of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", PROCESSORS)
def test_greedy_is_that_of_generate(name):
    pipe = make_pipe(name)
    expected = generated(pipe, name)
    assert len({tuple(row) for row in expected}) > 1
    options = {"max_new_tokens": 12, "images": PICTURES, "width": 6}
    for drafter in ("ngram", "early_exit", pipe.model):
        out = pipe(PROMPTS[name], drafter=drafter, **options)
        assert tokens_of(out) == expected, drafter
    assert out.texts == [pipe.tokenizer.decode(t, skip_special_tokens=True) for t in out.tokens]
    alone = pipe(PROMPTS[name][2], max_new_tokens=12, images=PICTURES[2])
    assert tokens_of(alone) == expected[2:]


def test_a_seed_gives_the_tokens_of_sequential_in_any_batch(donut_pipe):
    prompts = PROMPTS["donut"]
    options = {"max_new_tokens": 16, "temperature": 2.0, "top_p": 0.95}
    many = options | {"images": PICTURES, "generator": seeds(1, 2, 3)}
    plain = donut_pipe(prompts, decoder="sequential", **many)
    many["generator"] = seeds(1, 2, 3)
    fast = donut_pipe(prompts, drafter="jacobi", **many)
    alone = donut_pipe(prompts[1], images=PICTURES[1], generator=seeds(2), **options)
    assert tokens_of(fast) == tokens_of(plain)
    assert tokens_of(alone) == tokens_of(plain)[1:2]
    assert (plain.stats.tau, plain.stats.guarantee.value) == (1.0, "exact")


def test_a_drafter_of_the_family_sees_the_images(donut_pipe):
    out = donut_pipe(
        PROMPTS["donut"],
        images=PICTURES,
        drafter=donut_pipe.model,
        width=6,
        max_new_tokens=16,
        min_new_tokens=16,
    )
    assert out.stats.num_target_forwards == 1 + -(-16 // 6)


CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
REFUSED = [
    ("<user>", {}, "prompt 0 of VisionEncoderDecoderModel needs one image, got 0"),
    ("<user>", {"images": PICTURES[:2]}, "needs one image, got 2"),
    (CHAT, {"images": PICTURES[:1]}, "prompt 0 of VisionEncoderDecoderModel must be a text, got"),
    (torch.tensor([1, 2]), {"images": PICTURES[:1]}, "must be a text, got"),
    ("<user>", {"images": "none.png"}, r"image 0 of prompt 0 \(none.png\) cannot be read: No"),
    ("<user>", {"images": Image.new("RGB", (0, 5))}, r"size of image 0 of prompt 0 .* got \(0, 5"),
    ("<user>", {"images": PICTURES[0], "max_new_tokens": 96}, "context of 96"),
]


@pytest.mark.parametrize(("prompt", "options", "message"), REFUSED)
def test_bad_arguments_are_refused(donut_pipe, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        donut_pipe(prompt, **options)


def test_a_text_encoder_decoder_is_no_vision_language_model():
    with pytest.raises(ValueError, match=r"unknown model type 'bart'; known: .*florence2"):
        SpeculativeVLMPipeline.from_model(tiny_encoder_decoder("bart"), donut())


@pytest.mark.parametrize("name", ["donut", "florence2"])
def test_save_and_load(name, tmp_path):
    pipe = make_pipe(name)
    pipe.save_pretrained(tmp_path)
    again = SpeculativeVLMPipeline.from_pretrained(tmp_path, drafter="jacobi")
    again.set_progress_bar_config(disable=True)
    assert again.dtype == torch.float64
    options = {"max_new_tokens": 8, "images": PICTURES}
    assert tokens_of(again(PROMPTS[name], **options)) == tokens_of(pipe(PROMPTS[name], **options))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_pages_are_asked_for_in_the_words_of_the_family(donut_pipe):
    reader = make_pipe("florence2")
    pages = SpeculativeDocumentPipeline(reader)
    pages.set_progress_bar_config(disable=True)
    expected = reader("<OCR>", images=PICTURES[0], max_new_tokens=12, decoder="sequential")
    read = pages(PICTURES[0], ocr=None, references="some text", max_new_tokens=12).pages[0]
    assert read.tokens.tolist() == expected.tokens[0].tolist()
    pages = SpeculativeDocumentPipeline(donut_pipe)
    with pytest.raises(ValueError, match="prompt must be given: what begins a page depends on the"):
        pages(PICTURES[0], ocr=None, max_new_tokens=12)
    expected = donut_pipe("<user>", images=PICTURES[0], max_new_tokens=12, decoder="sequential")
    read = pages(PICTURES[0], ocr=None, prompt="<user>", max_new_tokens=12).pages[0]
    assert read.tokens.tolist() == expected.tokens[0].tolist()


# --------------------------------------------------------------------------- images by content


# What transformers' own processors warn of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", PROCESSORS)
def test_an_encoder_sees_a_picture_once(name):
    pipe = make_pipe(name)
    fresh, runs = make_fresh(pipe), TowerRuns(pipe.model)
    answers = []
    for shown, num_new in zip(CALLS, NUM_NEW, strict=True):
        # The same picture under another text.
        prompts = [PROMPTS[name][(index + len(answers)) % 3] for index in shown]
        asked = {"images": [[PICTURES[index]] for index in shown], "max_new_tokens": 8}
        before = runs.count
        answers.append(tokens_of(pipe(prompts, **asked)))
        assert runs.count - before == num_new
        assert answers[-1] == tokens_of(fresh(prompts, **asked))
        assert runs.count - before == num_new + len(shown), "nothing is kept: all of them again"
    assert answers[2][0] != answers[2][1], "the pictures must matter"
    cache = pipe.image_cache
    assert (cache.num_misses, cache.num_hits, len(cache)) == (3, 5, 3)
    assert len(fresh.image_cache) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["donut", "florence2"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_an_encoder_of_a_drafter_sees_a_picture_once(name, dtype):
    pipe = make_pipe(name)
    small = another(pipe.model).to(dtype)
    fresh, runs = make_fresh(pipe), TowerRuns(small)
    for shown, num_new in zip(CALLS, NUM_NEW, strict=True):
        prompts = [PROMPTS[name][index] for index in shown]
        asked = {"images": [[PICTURES[index]] for index in shown], "max_new_tokens": 8}
        before = runs.count
        out = pipe(prompts, drafter=small, **asked)
        assert runs.count - before == num_new
        wanted = fresh(prompts, drafter=small, **asked)
        assert (tokens_of(out), figures_of(out)) == (tokens_of(wanted), figures_of(wanted))
    assert len(pipe.image_cache) == 6


def test_the_bound_holds_for_both_towers_together():
    pipe = make_pipe("donut")
    small = another(pipe.model)
    ask = lambda index: pipe("<user>", images=PICTURES[index], drafter=small, max_new_tokens=2)  # noqa: E731
    ask(0)
    cache = pipe.image_cache
    assert len(cache) == 2
    cache.max_bytes = cache.size_bytes * 3 // 2
    for index in (1, 2, 0, 0):
        ask(index)
        assert len(cache) == 3
        assert cache.size_bytes <= cache.max_bytes
    # The last call found both.
    assert (cache.num_hits, cache.num_misses) == (2, 8)
