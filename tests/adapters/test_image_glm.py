"""GLM-Image as a target, against transformers' own generate on tiny random weights in float64."""

import dataclasses
import random

import pytest
import torch
from glm import CODES, END, GLM_IMAGE, PAD, SPECIALS, START, glm_model, glm_processor
from transformers import DynamicCache

import mmspec
from mmspec.adapters.image_glm import GlmImageFamily
from mmspec.adapters.token_image import ImageLayout, image_family
from mmspec.law_config import LawConfig
from mmspec.noise import row_keys
from mmspec.pipelines import SpeculativeImagePipeline
from mmspec.pipelines.image_decoders import image_engine
from mmspec.sampling import build_law

LARGE, SMALL = (4, 3), (3, 2)
CPU = torch.device("cpu")
SUPPRESSED = list(range(CODES, CODES + SPECIALS))
PROMPTS = [[49, 50, START], [49, 52, 51, 54, 33, START], [40, START], [50, 50, 51, 29, START]]


@pytest.fixture(scope="module")
def model():
    return glm_model()


def padded(prompts, large=LARGE, small=SMALL):
    """The inputs of `generate`, as the processor lays them out."""
    longest = max(map(len, prompts))
    ids = [[PAD] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "image_grid_thw": torch.tensor([[1, *large], [1, *small]] * len(prompts)),
        "images_per_sample": torch.tensor([2] * len(prompts)),
    }


def layout_of(model, prompts=PROMPTS, **grids) -> ImageLayout:
    inputs = padded(prompts, **grids)
    return image_family(model).layout_in(inputs["image_grid_thw"], inputs["images_per_sample"])


def engine(model, prompts=PROMPTS, *, window=1, seeds=None, rule="exact", law=None, **grids):
    seeds = range(len(prompts)) if seeds is None else seeds
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return image_engine(
        image_family(model),
        layout_of(model, prompts, **grids),
        prompts,
        rule=rule,
        law=build_law(law or LawConfig()),
        window=window,
        guidance_scale=1.0,
        keys_B=row_keys(generators, len(prompts)),
        device=CPU,
    )[0]


def codes(model, prompts=PROMPTS, **options) -> list[list[int]]:
    return [list(row) for row in engine(model, prompts, **options).run().units]


GREEDY = LawConfig(temperature=0.0)


@pytest.mark.parametrize(("large", "small"), [((4, 3), (3, 2)), ((2, 5), (2, 4)), ((3, 3), (2, 2))])
def test_positions_are_those_of_transformers(model, large, small):
    inputs = padded(PROMPTS, large, small)
    model.model.get_rope_index(**inputs)
    theirs_B3T = model.model._cached_decode_position_ids
    lengths_B = inputs["attention_mask"].sum(1)
    place = layout_of(model, large=large, small=small).place
    place_BT = lengths_B[:, None] + torch.arange(theirs_B3T.shape[2])
    ours_3BT = place(place_BT, lengths_B)
    assert torch.equal(ours_3BT.permute(1, 0, 2), theirs_B3T)
    # Text counts on, and places behind the end mark stay on it.
    text = place(torch.tensor([[0, 1, 99]] * len(PROMPTS)), lengths_B)
    assert text[:, :, :2].tolist() == [[[0, 1]] * len(PROMPTS)] * 3
    assert torch.equal(text[:, :, 2].T, theirs_B3T[:, :, -1])


@pytest.mark.supports("greedy", GLM_IMAGE)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [1, 7])
def test_greedy_is_that_of_transformers(seed, window):
    model = glm_model(seed=seed)
    inputs = padded(PROMPTS)
    count = layout_of(model).num_tokens
    options = {"do_sample": False, "max_new_tokens": count, "suppress_tokens": SUPPRESSED}
    theirs = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert codes(model, window=window, law=GREEDY) == theirs.tolist()


def test_positions_matter_to_the_tokens(model, monkeypatch):
    layout_of_grids = GlmImageFamily.layout_of
    with_grids = codes(model, law=GREEDY)
    monkeypatch.setattr(
        GlmImageFamily, "layout_of", lambda *a: dataclasses.replace(layout_of_grids(*a), place=None)
    )
    assert codes(model, law=GREEDY) != with_grids


def test_special_tokens_are_never_drawn_where_transformers_draws_them():
    # Named defect: nothing in transformers keeps the end of the image out of the grid.
    model = glm_model(seed=4)
    with torch.no_grad():
        model.lm_head.weight[END] = model.lm_head.weight[:CODES].mean(0) * 20
    inputs = padded(PROMPTS)
    count = layout_of(model).num_tokens
    torch.manual_seed(0)
    theirs = model.generate(**inputs, do_sample=True, max_new_tokens=count)
    assert bool((theirs[:, inputs["input_ids"].shape[1] :] >= CODES).any())
    ours = torch.tensor(codes(model, window=7))
    assert ours.shape == (len(PROMPTS), count)
    assert int(ours.max()) < CODES


def test_interleaved_requests_do_not_meet(model):
    # Named defect: transformers keeps the coming positions on the module.
    first, second = PROMPTS[:3], PROMPTS[3:]
    sizes = {"large": (2, 5), "small": (2, 3)}
    alone = codes(model, first, window=7), codes(model, second, window=7, **sizes)
    one = engine(model, first, window=7).stream()
    two_engine = engine(model, second, window=7, **sizes)
    two = two_engine.stream()
    first_units = [[] for _ in first]
    second_units = [[] for _ in second]
    pending = [(one, first_units), (two, second_units)]
    while pending:
        for entry in list(pending):
            step = next(entry[0], None)
            if step is None:
                pending.remove(entry)
                continue
            for units, new in zip(entry[1], step[1].new_units, strict=True):
                units.extend(new)
    assert (first_units, second_units) == alone


def test_interleaved_requests_break_transformers(model):
    a, b = padded(PROMPTS[:1]), padded(PROMPTS[1:3])

    def continued(other):
        output = model(**a, use_cache=True)
        if other is not None:
            model(**other, use_cache=True)
        ids = output.logits[:, -1:, :CODES].argmax(-1)
        return model(
            input_ids=ids,
            attention_mask=torch.ones(1, a["input_ids"].shape[1] + 1),
            past_key_values=output.past_key_values,
        ).logits

    continued(None)
    with pytest.raises((RuntimeError, IndexError)):
        continued(b)


def test_transformers_mixes_the_grids_of_several_images_per_prompt(model):
    # Named defect: `num_return_sequences` repeats grid rows, not pairs of them.
    inputs = padded(PROMPTS[:1])
    model.generate(**inputs, max_new_tokens=1, do_sample=True, num_return_sequences=2)
    theirs = model.model._cached_decode_position_ids
    assert not torch.equal(theirs[0], theirs[1])


@pytest.mark.supports("sampled", GLM_IMAGE)
@pytest.mark.parametrize("window", [1, 2, 7, 16, 64])
@pytest.mark.parametrize("law", [GREEDY, LawConfig(), LawConfig(temperature=0.7, top_k=9)])
def test_exact_is_sequential_for_every_window(model, window, law):
    assert codes(model, window=window, law=law) == codes(model, law=law)


@pytest.mark.supports("batches", GLM_IMAGE)
@pytest.mark.parametrize("rule", ["exact", "coupled", "sjd"])
def test_row_of_a_batch_is_its_single_run(model, rule):
    batch = codes(model, window=7, rule=rule)
    for row, prompt in enumerate(PROMPTS):
        assert codes(model, [prompt], seeds=[row], window=7, rule=rule) == [batch[row]]


@pytest.mark.slow
@pytest.mark.parametrize("run", range(50))
def test_exact_is_sequential_at_random(run):
    rng = random.Random(run)
    model = glm_model(seed=run % 5)
    prompts = [
        [*rng.choices(range(28, 58), k=rng.randint(1, 9)), START] for _ in range(rng.randint(1, 4))
    ]
    options = {
        "seeds": [rng.randint(0, 999) for _ in prompts],
        "large": (rng.randint(1, 9), rng.randint(1, 9)),
        "small": (rng.randint(1, 5), rng.randint(1, 5)),
        "law": LawConfig(
            temperature=rng.choice([0.0, 0.7, 1.0]), top_p=rng.choice([None, 0.75, 0.95])
        ),
    }
    plain = codes(model, prompts, **options)
    for window in (1, 2, 7, 16, 64):
        assert codes(model, prompts, window=window, **options) == plain


# --------------------------------------------------------------------------- inside generate


@pytest.mark.parametrize("drafter", ["jacobi", "ngram"])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_speculate_keeps_the_greedy_tokens_of_generate(drafter, num_rows):
    model = glm_model(seed=2)
    inputs = padded(PROMPTS[:num_rows])
    options = {"do_sample": False, "max_new_tokens": layout_of(model).num_tokens + 1}
    theirs = model.generate(**inputs, **options)
    fast = mmspec.speculate(drafter=drafter, width=7, schedule="fixed")
    assert torch.equal(model.generate(**inputs, custom_generate=fast, **options), theirs)
    assert fast.stats.num_accepted > 0


def test_speculate_samples_the_same_tokens_with_every_drafter(model):
    inputs = padded(PROMPTS) | {"do_sample": True, "max_new_tokens": 18, "top_p": 0.9}

    def tokens(drafter):
        seeds = [torch.Generator().manual_seed(s) for s in range(len(PROMPTS))]
        fast = mmspec.speculate(drafter=drafter, width=7, generator=seeds)
        return model.generate(**inputs, custom_generate=fast)

    assert torch.equal(tokens("jacobi"), tokens("none"))


def test_speculate_keeps_nothing_on_the_module():
    names = ("rope_deltas", "_cached_decode_position_ids")
    model = glm_model()
    inputs = padded(PROMPTS) | {"do_sample": False, "max_new_tokens": 9}
    model.generate(**inputs, custom_generate=mmspec.speculate("jacobi", width=7))
    assert [getattr(model.model, name) for name in names] == [None, None]
    # What `generate` alone has left there is left as it is.
    model.generate(**inputs)
    left = [getattr(model.model, name) for name in names]
    assert None not in left
    kept = [value.clone() for value in left]
    other = padded(PROMPTS[:1], (2, 5), (2, 4)) | {"do_sample": False, "max_new_tokens": 9}
    model.generate(**other, custom_generate=mmspec.speculate("jacobi", width=7))
    for name, value, before in zip(names, left, kept, strict=True):
        assert getattr(model.model, name) is value
        assert torch.equal(value, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_return_sequences": 2, "do_sample": True}, "image_grid_thw must be the same"),
        ({"mm_encoder_outputs": {"image": 1}}, "source images .* are not supported"),
        ({"past_key_values": DynamicCache()}, "past_key_values must be left out for GLM-Image"),
        ({"images_per_sample": torch.tensor([1])}, "images_per_sample must be 2"),
    ],
)
def test_speculate_refuses_what_is_no_text_to_image(model, changes, message):
    inputs = padded(PROMPTS[:1]) | {"max_new_tokens": 3} | changes
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, custom_generate=mmspec.speculate("ngram"))


# --------------------------------------------------------------------------- refusals


def test_source_images_are_refused(model):
    with pytest.raises(ValueError, match=r"images_per_sample must be 2 \(text to image\)"):
        image_family(model).layout_in(torch.tensor([[1, 2, 2]]), torch.tensor([1]))


def test_images_of_several_sizes_are_refused(model):
    grids = torch.tensor([[1, 2, 2], [1, 1, 1], [1, 2, 3], [1, 1, 1]])
    with pytest.raises(ValueError, match="image_grid_thw must be the same for all images"):
        image_family(model).layout_in(grids, torch.tensor([2, 2]))


# --------------------------------------------------------------------------- the bare pipeline


@pytest.fixture(scope="module")
def pipe(model):
    pipe = SpeculativeImagePipeline.from_model(model, glm_processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.supports("processor", GLM_IMAGE)
def test_pipeline_makes_the_codes_of_the_picture(pipe):
    seeds = [torch.Generator().manual_seed(s) for s in (3, 4)]
    out = pipe(["a cat", "a red dog"], height=64, width=96, generator=seeds, output_type="tokens",
               window=16)  # fmt: skip
    assert out.tokens.shape == (2, 2 * 3)
    assert out.stats.num_units == 2 * (13 * 19 + 2 * 3)  # behind those of the small grid
    assert out.step_maps.shape == (2, 2, 3)
    assert int(out.tokens.min()) >= 0
    assert int(out.tokens.max()) < CODES
    seed = torch.Generator().manual_seed(4)
    one = pipe("a red dog", height=64, width=96, generator=seed, output_type="tokens",
               decoder="sequential")  # fmt: skip
    assert torch.equal(one.tokens[0], out.tokens[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_type": "pil"}, "no pixel decoder in transformers.*accelerate"),
        ({"guidance_scale": 3.0}, "guidance_scale must be 1"),
        ({"height": 65}, "height must be None or a multiple of 32 pixels, got 65"),
        ({"width": "64"}, "width must be None or a multiple of 32 pixels, got '64'"),
        ({"height": 0}, "got 0"),
    ],
)
def test_bad_options_are_refused_before_any_forward(pipe, model, monkeypatch, options, message):
    def must_not_run(*args, **kwargs):
        raise AssertionError("a forward ran before the arguments were checked")

    monkeypatch.setattr(model.model.language_model, "forward", must_not_run)
    defaults = {"height": 64, "width": 64, "output_type": "tokens"}
    with pytest.raises(ValueError, match=message):
        pipe("a cat", **(defaults | options))
