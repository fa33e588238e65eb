"""diffusers' GlmImagePipeline through `accelerate`, on tiny random parts of the real classes."""

import pytest
import torch
from glm import CODES, END, glm_model, glm_pipe
from PIL import Image
from transformers.generation import LogitsProcessorList

import mmspec.pipelines
from mmspec.adapters.processors import Layout, law_from_processors
from mmspec.pipelines import accelerate
from mmspec.pipelines.glm_image import DEFAULT_TOP_K, _config_law
from mmspec.sampling import Temperature, TopK, TopP

SIZE = {"height": 64, "width": 96}
CALL = SIZE | {"num_inference_steps": 2, "output_type": "latent"}
PROMPTS = ["a cat", "a red dog hat 'dog'"]


@pytest.fixture(scope="module")
def pipe():
    return glm_pipe()


@pytest.fixture
def fast(pipe):
    return accelerate(pipe, window=16)


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


def test_latents_are_those_of_sequential_codes_passed_by_hand(pipe, fast):
    ours = fast(PROMPTS, generator=seeds(1, 2), **CALL).images
    assert fast.stats.guarantee == "exact"
    assert fast.stats.num_target_forwards < fast.stats.num_units / len(PROMPTS)
    codes = fast.generate_prior_tokens(PROMPTS, **SIZE, generator=seeds(1, 2), decoder="sequential")
    by_hand = pipe(PROMPTS, generator=seeds(1, 2), prior_token_ids=codes, **CALL).images
    assert ours.shape == (2, 4, 8, 12)
    assert torch.equal(ours, by_hand)


def test_codes_are_those_that_diffusers_cuts_from_greedy_generate(pipe, fast):
    greedy = fast.generate_prior_tokens(PROMPTS, **SIZE, temperature=0.0)
    model = pipe.vision_language_encoder

    class Greedy:
        """diffusers samples; the same call, greedy, and with no special token."""

        def generate(self, do_sample, **inputs):
            blocked = list(range(CODES, model.lm_head.out_features))
            return model.generate(**inputs, do_sample=False, suppress_tokens=blocked)

    theirs = type(pipe).generate_prior_tokens(
        mmspec.pipelines.glm_image._View(pipe, vision_language_encoder=Greedy()),
        prompt=PROMPTS, device=torch.device("cpu"), **SIZE,
    )[0]  # fmt: skip
    assert torch.equal(greedy, theirs)


def test_plain_pipeline_crashes_where_the_end_is_drawn_inside_the_grid(fast):
    # Named defect: nothing keeps the end of the image from being drawn too early.
    model = glm_model()
    with torch.no_grad():
        model.lm_head.weight[END] = model.lm_head.weight[:CODES].mean(0) * 20
    pipe = glm_pipe(model)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        pipe("a cat", generator=seeds(1)[0], **CALL)
    assert accelerate(pipe)("a cat", generator=seeds(1)[0], **CALL).images.isfinite().all()


def test_plain_pipeline_crashes_on_source_images(pipe):
    # Named defect: diffusers joins the maps of all source images before the codebook, which wants
    # one at a time. So image-to-image cannot be compared, and is refused.
    with pytest.raises(RuntimeError, match="to have 16 channels, but got 1"):
        pipe("a cat", image=[Image.new("RGB", (64, 64))], **CALL)


def test_pictures_are_painted(fast):
    call = SIZE | {"num_inference_steps": 1}
    images = fast("a cat", num_images_per_prompt=2, **call).images
    assert [image.size for image in images] == [(96, 64)] * 2


def test_images_of_a_prompt_have_codes_of_their_own(fast):
    codes = fast.generate_prior_tokens(
        PROMPTS[0], **SIZE, num_images_per_prompt=3, generator=seeds(5, 6, 7)
    )
    assert codes.shape == (3, 4 * 2 * 3)
    assert len({tuple(row) for row in codes.tolist()}) == 3
    alone = fast.generate_prior_tokens(PROMPTS[0], **SIZE, generator=seeds(6))
    assert torch.equal(codes[1], alone[0])


def test_image_of_a_batch_is_its_single_call(fast):
    many = fast(PROMPTS[1], num_images_per_prompt=3, generator=seeds(5, 6, 7), **CALL).images
    assert many.shape[0] == len(fast.row_stats) == 3
    alone = fast(PROMPTS[1], generator=seeds(6), **CALL).images
    assert torch.allclose(many[1], alone[0], atol=1e-5)
    # Of several prompts the codes are; diffusers paints a padded prompt a little differently.
    codes = fast.generate_prior_tokens(
        PROMPTS, **SIZE, num_images_per_prompt=2, generator=seeds(4, 5, 6, 7)
    )
    alone = fast.generate_prior_tokens(PROMPTS[1], **SIZE, generator=seeds(6))
    assert torch.equal(codes[2], alone[0])


def test_lossy_rows_begin_behind_the_small_grid(fast):
    def codes(decoder, **options):
        return fast.generate_prior_tokens(
            PROMPTS, **SIZE, generator=seeds(4, 5), decoder=decoder, window=16, **options
        )

    assert torch.equal(codes("lossy-rows", lenience=0.0), codes("exact"))
    assert codes("lossy-rows", lenience=1.0).shape == codes("exact").shape
    with pytest.raises(ValueError, match="lenience is for lossy-grouped and lossy-rows only"):
        codes("exact", lenience=1.0)


def test_generators_give_the_painting_the_noise_of_the_plain_pipeline(fast):
    (one,) = seeds(3)
    fast.generate_prior_tokens(PROMPTS, **SIZE, generator=one)
    assert torch.equal(one.get_state(), seeds(3)[0].get_state())


def test_no_generator_is_the_global_one(fast):
    torch.manual_seed(3)
    first = fast.generate_prior_tokens(PROMPTS, **SIZE)
    assert not torch.equal(first, fast.generate_prior_tokens(PROMPTS, **SIZE))
    torch.manual_seed(3)
    assert torch.equal(first, fast.generate_prior_tokens(PROMPTS, **SIZE))


def test_given_codes_are_painted_as_they_are(pipe, fast):
    fast(PROMPTS[0], generator=seeds(1), **CALL)
    codes = torch.zeros(1, 24, dtype=torch.long)
    ours = fast(PROMPTS[0], generator=seeds(1), prior_token_ids=codes, **CALL).images
    theirs = pipe(PROMPTS[0], generator=seeds(1), prior_token_ids=codes, **CALL).images
    assert torch.equal(ours, theirs)
    assert fast.stats is None


def test_pipeline_stays_as_it_was():
    pipe = glm_pipe()
    before = dict(vars(pipe)), dict(vars(pipe.vision_language_encoder))
    fast = accelerate(pipe)
    fast.generate_prior_tokens("a cat", **SIZE)
    assert fast.restore() is pipe
    assert (dict(vars(pipe)), dict(vars(pipe.vision_language_encoder))) == before
    model = pipe.vision_language_encoder.model
    assert model.rope_deltas is None
    assert model._cached_decode_position_ids is None
    with pytest.raises(AttributeError):
        fast.scheduler = None


def test_model_that_waits_on_another_device_is_fetched(pipe):
    fetched = []

    class Hook:
        def pre_forward(self, module, *args, **kwargs):
            fetched.append(module)
            return args, kwargs

    model = pipe.vision_language_encoder
    model._hf_hook = Hook()
    try:
        accelerate(pipe).generate_prior_tokens("a cat", **SIZE)
    finally:
        del model._hf_hook
    assert fetched == [model]


# --------------------------------------------------------------------------- the law


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.9, "top_p": 0.75}, {"top_k": 0}])
def test_law_is_the_one_that_generate_samples_from(changes):
    model = glm_model()
    model.generation_config.update(**changes)
    seen = []

    def look(model, input_ids, logits_processor, *args, **kwargs):
        seen.append(LogitsProcessorList(logits_processor))
        return input_ids

    ids = torch.tensor([[40, 24]])
    model.generate(ids, do_sample=True, max_new_tokens=1, custom_generate=look)
    layout = Layout(prompt_ids_BP=ids, is_token_BP=ids > 0, vocab_size=28)
    stages = law_from_processors(seen[0], layout, is_greedy=False).stages
    theirs = {}
    for stage in stages:
        name, attribute = {
            Temperature: ("temperature", "value"), TopK: ("top_k", "k"), TopP: ("top_p", "p")
        }[type(stage)]  # fmt: skip
        theirs[name] = getattr(stage, attribute)
    ours = _config_law(model.generation_config)
    # What is left out there changes nothing here.
    assert {**dict.fromkeys(ours), **theirs} == {
        name: None if value == 1.0 else value for name, value in ours.items()
    }
    assert ours["top_k"] == (None if changes.get("top_k") == 0 else DEFAULT_TOP_K)


def test_generation_config_without_a_law_is_refused():
    pipe = glm_pipe()
    pipe.vision_language_encoder.generation_config.typical_p = 0.5
    with pytest.raises(ValueError, match=r"generation_config.typical_p must be None or 1.0"):
        accelerate(pipe)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "magic"}, "unknown decoder 'magic'"),
        ({"decoder": "jacobi-denoise"}, "unknown decoder 'jacobi-denoise'"),
        ({"window": 0}, "window must be None or between 1 and 128, got 0"),
        ({"temperature": -1.0}, "temperature must be a number >= 0"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"compile": 1}, "compile must be True or False"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be an integer >= 1, got 0"),
        ({"generator": seeds(1, 2, 3)}, "a list of 3 for 2 rows"),
        ({"generator": 7}, "generator must be"),
        ({"height": None}, "height must be given for text to image"),
        ({"height": 65}, "have to be divisible"),
        ({"prompt": None}, "prompt must be given"),
        ({"prompt": []}, "prompt must be a string or a non-empty list"),
        ({"image": [Image.new("RGB", (32, 32))]}, "from text only"),
    ],
)
def test_bad_arguments_are_refused_before_any_forward(fast, pipe, monkeypatch, options, message):
    def must_not_run(*args, **kwargs):
        raise AssertionError("a forward ran before the arguments were checked")

    layers = pipe.vision_language_encoder.model.language_model.layers
    monkeypatch.setattr(layers[0], "forward", must_not_run)
    with pytest.raises(ValueError, match=message):
        fast(**({"prompt": PROMPTS} | CALL | options))


def test_unknown_arguments_and_options_are_refused(fast, pipe):
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        fast("a cat", steps=3)
    with pytest.raises(ValueError, match="unknown option 'beam'"):
        accelerate(pipe, beam=3)


def test_other_pipelines_are_refused():
    with pytest.raises(ValueError, match="works with diffusers' GlmImagePipeline, got object"):
        accelerate(object())
