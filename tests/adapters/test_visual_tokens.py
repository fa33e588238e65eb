"""Drafters that are shown a part of the images: the same tokens, from the parts asked for."""

import copy

import pytest
import torch
import transformers
from PIL import Image
from tiny import make_rows, tiny_model
from transformers import DynamicCache
from vlm import FAMILIES, FILMED, IMAGE, PAD, SUPPORTED, TEXT, request, tiny_vlm
from vlm_processors import PROCESSORS

import mmspec
from mmspec.adapters import vision_language
from mmspec.attention_scores import attention_scores
from mmspec.law_config import LawConfig
from mmspec.pipelines import SpeculativeVLMPipeline
from mmspec.sampling import build_law
from mmspec.speculation import Settings, build_engine
from mmspec.visual_tokens import around_peak, evenly

#: One image, two of other sizes, none; the longest in the middle.
ROWS = [
    [1, 2, (2, 3), 3, 4, 1, 2],
    [5, (2, 2), 6, (3, 2), 7, 8, 5, 6, 7],
    [9, 8, 7, 9, 8],
]
#: Two videos in a row beside one with a longer text; none.
FILMS = [[5, (2, 2, 2), 6, (2, 1, 2), 7, 8], [1, 2, (2, 2, 1), 3, 4, 1, 2, 3, 4], [9, 8, 7, 9]]
SHOWN = ["uniform:0.5", "attention:0.4", "reuse", "reuse+attention:0.4", "pool:2", "reuse+pool:2"]
NUM_NEW = 18
SMALL = {"hidden_size": 16}


def decoded(model, inputs, custom_generate=None, **options):
    options = {"max_new_tokens": NUM_NEW, "do_sample": False} | options
    return model.generate(**inputs, **options, custom_generate=custom_generate)


def fixed(drafter, width=6, **options):
    return mmspec.speculate(drafter, width=width, schedule="fixed", **options)


def drafters(name, model):
    clone = copy.deepcopy(model)
    shown = [o for o in SHOWN if name != "llava_onevision" or "pool" not in o]
    mixed = {"name": "mixed", "model": clone}
    return [
        *({"name": "model", "model": clone, "visual_tokens": option} for option in shown),
        {"name": "model", "visual_tokens": "self"},
        {"name": "model", "visual_tokens": "self:0.5"},
        mixed,
        mixed | {"members": ["none", "uniform:0.3", "reuse+attention:0.2"], "memory": 0.5},
    ]


@pytest.mark.supports("visual shares", SUPPORTED)
@pytest.mark.parametrize(
    ("name", "num_rows"), [*((name, 3) for name in FAMILIES), ("llava", 1), ("qwen3_vl", 1)]
)
def test_greedy_equals_generate(name, num_rows):
    model = tiny_vlm(name)
    rows = ROWS[:num_rows]
    expected = decoded(model, request(name, rows))
    for drafter in drafters(name, model):
        fast = fixed(drafter)
        assert torch.equal(decoded(model, request(name, rows), fast), expected), drafter
        assert fast.stats.num_accepted > 0, drafter


@pytest.mark.supports("visual shares", SUPPORTED)
@pytest.mark.parametrize("name", FILMED)
def test_videos_are_cut_as_images_are(name):
    model = tiny_vlm(name)
    expected = decoded(model, request(name, FILMS), max_new_tokens=12)
    for drafter in drafters(name, model):
        fast = fixed(drafter)
        out = decoded(model, request(name, FILMS), fast, max_new_tokens=12)
        assert torch.equal(out, expected), drafter
        assert fast.stats.num_accepted > 0, drafter


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_a_seed_gives_the_same_tokens_with_every_drafter(name):
    model = tiny_vlm(name)

    def sampled(drafter, rule="exact"):
        seeds = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]
        fast = fixed(drafter, generator=seeds, rule=rule)
        return decoded(model, request(name, ROWS), fast, do_sample=True, top_p=0.9)

    expected = sampled("none")
    for drafter in drafters(name, model):
        assert torch.equal(sampled(drafter), expected), drafter
    # Rules that keep the law only want the law that was drawn from.
    sampled(drafters(name, model)[-1], rule="speculative")


def test_rows_end_one_after_the_other():
    """Those that have ended are not fed, in the target's cache and the drafter's own."""
    model = tiny_vlm("qwen2_5_vl")
    start = request("qwen2_5_vl", ROWS)["input_ids"].shape[1]
    free = decoded(model, request("qwen2_5_vl", ROWS), max_new_tokens=30)[:, start:]
    ends = [int(free[0, 4]), int(free[1, 11])]
    options = {"max_new_tokens": 30, "eos_token_id": ends}
    expected = decoded(model, request("qwen2_5_vl", ROWS), **options)
    lengths = {int((row != PAD).sum()) for row in expected[:, start:]}
    assert len(lengths) == 3
    for drafter in drafters("qwen2_5_vl", model):
        fast = fixed(drafter, width=3)
        assert torch.equal(decoded(model, request("qwen2_5_vl", ROWS), fast, **options), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_clone_that_sees_everything_is_accepted_wholly(name):
    """All of the images, by each way to say which part: features, positions and masks are right."""
    model = tiny_vlm(name)
    clone = copy.deepcopy(model)
    expected = decoded(model, request(name, ROWS))
    for option, num_asked in (
        ("reuse", 0),
        ("uniform:1", 0),
        ("reuse+attention:1", 1),
        ("self:1", 1),
    ):
        drafter = {"name": "model", "visual_tokens": option}
        fast = fixed(drafter if "self" in option else drafter | {"model": clone})
        assert torch.equal(decoded(model, request(name, ROWS), fast), expected)
        assert fast.stats.num_target_forwards == 1 + -(-NUM_NEW // 6) + num_asked, option


def fed(model, call, part=None):
    """What each forward of a part of a model is given while something is called."""
    seen = []

    def note(module, args, kwargs):
        seen.append(kwargs)

    hook = (part or model).register_forward_pre_hook(note, with_kwargs=True)
    call()
    hook.remove()
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_kept_keeps_its_features_and_its_positions(name):
    model = tiny_vlm(name)
    clone = copy.deepcopy(model)
    rows = [[5, (2, 2), 6, (3, 2), 7, 8]]
    drafter = {"name": "model", "model": clone, "visual_tokens": "uniform:0.4"}
    (whole, *_) = fed(model, lambda: decoded(model, request(name, rows), fixed("none")))
    (short, *_) = fed(clone, lambda: decoded(model, request(name, rows), fixed(drafter)))
    ids = whole["input_ids"][0]
    (places,) = (ids == IMAGE).nonzero(as_tuple=True)
    chosen = evenly(len(places), int(0.4 * len(places)))
    is_kept = ids != IMAGE
    is_kept[places[chosen]] = True
    assert short["input_ids"].tolist() == [ids[is_kept].tolist()]
    assert torch.equal(short["position_ids"], whole["position_ids"][..., is_kept])

    def flat(features):
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in features])

    theirs, ours = (kwargs["mm_encoder_outputs"]["image"] for kwargs in (whole, short))
    assert torch.equal(flat(ours.pooler_output), flat(theirs.pooler_output)[chosen])
    for mine, all_of_them in zip(
        getattr(ours, "deepstack_features", None) or (),
        getattr(theirs, "deepstack_features", None) or (),
        strict=True,
    ):
        assert torch.equal(flat(mine), flat(all_of_them)[chosen])


def test_pooled_features_are_means_of_squares():
    model = tiny_vlm("qwen3_vl")
    clone = copy.deepcopy(model)
    rows = [[5, (3, 4), 6, 7]]
    drafter = {"name": "model", "model": clone, "visual_tokens": "pool:2"}
    (whole, *_) = fed(model, lambda: decoded(model, request("qwen3_vl", rows), fixed("none")))
    (short, *_) = fed(clone, lambda: decoded(model, request("qwen3_vl", rows), fixed(drafter)))
    grid = whole["mm_encoder_outputs"]["image"].pooler_output[0].view(3, 4, -1)
    pooled = short["mm_encoder_outputs"]["image"].pooler_output[0]
    squares = [grid[r : r + 2, c : c + 2].mean((0, 1)) for r in (0, 2) for c in (0, 2)]
    torch.testing.assert_close(pooled, torch.stack(squares))
    # Each stands where the first token of its square stood.
    corners = [2 + 4 * r + c for r in (0, 2) for c in (0, 2)]
    kept = [0, 1, *corners, 14, 15, 16]
    assert torch.equal(short["position_ids"], whole["position_ids"][..., kept])


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_scores_are_the_targets_own_attention(name):
    """Of Gemma 3 half the layers have a window, and images see themselves."""
    model = tiny_vlm(name)
    inputs = request(name, ROWS[:1])
    engine = engine_of(model, name, ROWS[:1], {"name": "model", "visual_tokens": "self"})
    engine.target.prefill()
    places = engine.drafter._places
    starts = [places[0][-1] + 1]
    scores = attention_scores(engine.target.forward, engine.target.rows, starts)[0]
    model.set_attn_implementation("eager")
    attentions = model(**inputs, output_attentions=True).attentions
    expected = torch.stack([a[0, :, starts[0] :].mean((0, 1)) for a in attentions]).mean(0)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


def engine_of(model, name, rows, drafter):
    """The engine of a request, as the pipeline wires it."""
    inputs = request(name, rows)
    is_token = inputs["attention_mask"].bool()
    prompts = [ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], is_token, strict=True)]
    token_rows = make_rows(prompts, [NUM_NEW] * len(prompts))
    prepared = vision_language.prepare(model, inputs)
    extras = vision_language.extras_in_generate(model, token_rows, prepared, is_token, inputs)
    settings = Settings(drafter=drafter, width=6, schedule="fixed")
    law = build_law(LawConfig(temperature=0.0))
    return build_engine(model, token_rows, law, settings, extras=extras)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("option", ["attention:0.3", "self:0.3"])
@torch.no_grad()
def test_asking_the_target_leaves_its_cache_and_its_attention_as_they_were(name, option):
    model = tiny_vlm(name)
    drafter = {"name": "model", "visual_tokens": option}
    if "self" not in option:
        drafter["model"] = copy.deepcopy(model)
    engine = engine_of(model, name, ROWS, drafter)
    engine.target.prefill()
    cache = engine.target.forward.cache
    before = [buffer.clone() for layer in cache.layers for buffer in layer.buffers]
    cursor = (cache.cursor.order, cache.cursor.extent, cache.cursor.past)
    engine.drafter.prefill()
    after = [buffer for layer in cache.layers for buffer in layer.buffers]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert cursor == (cache.cursor.order, cache.cursor.extent, cache.cursor.past)
    assert engine.drafter.num_target_forwards == 1
    engine.run()
    kinds = {m.config._attn_implementation for m in model.modules() if hasattr(m, "layer_idx")}
    assert kinds == {"sdpa"}


@pytest.mark.parametrize(
    ("name", "attention", "rows"),
    [("llava", "sdpa", ROWS), ("llava", "eager", ROWS[1:2]), ("qwen3_vl", "sdpa", ROWS[1:2])],
)
@torch.no_grad()
def test_the_target_drafts_around_where_it_looked_last(name, attention, rows):
    """Room by room the keys of the chosen places, found anew by whole forwards of the first row."""
    model = tiny_vlm(name)
    model.set_attn_implementation(attention)
    engine = engine_of(model, name, rows, {"name": "model", "visual_tokens": "self:0.4"})
    judge = copy.deepcopy(model)
    judge.set_attn_implementation("eager")
    caches = engine.drafter.forward, engine.target.forward
    choices = set()
    for record, _ in engine.stream():
        if record.width == 1 or engine.target.is_done:
            continue
        whole = request(name, [[*rows[0], *engine.target.rows.new_tokens(0)[:-1]]])
        (places,) = (whole["input_ids"][0] == IMAGE).nonzero(as_tuple=True)
        attentions = judge(**whole, output_attentions=True).attentions
        looked = torch.stack([a[0, :, -1].mean(0) for a in attentions]).mean(0)[places]
        keep = max(1, int(0.4 * len(places)))
        count, kept = torch.tensor([len(places)]), torch.tensor([keep])
        chosen = around_peak(looked[None], count, kept, keep)[0]
        choices.add(tuple(chosen.tolist()))
        own, theirs = (forward.cache for forward in caches)
        own.restore()
        theirs.restore()
        room = engine.drafter._room_BK[0, :keep]
        for mine, wanted in zip(own.layers, theirs.layers, strict=True):
            for held, all_of_them in zip(mine.buffers, wanted.buffers, strict=True):
                assert torch.equal(held[0, room], all_of_them[0, places[chosen]])
    assert len(choices) > 1


def test_a_drafter_has_room_for_what_it_reads_and_no_more():
    model = tiny_vlm("qwen2_vl")
    clone = {"name": "model", "model": copy.deepcopy(model)}
    rows = [[1, (8, 10), 2, 3], [1, (6, 10), 2, 3]]
    engines = {
        option: engine_of(model, "qwen2_vl", rows, drafter | {"visual_tokens": option})
        for option, drafter in (
            ("all", clone),
            ("uniform:0.1", clone),
            ("none", clone),
            ("self:0.1", {"name": "model"}),
        )
    }
    capacities = {}
    for option, engine in engines.items():
        engine.run()
        capacities[option] = engine.drafter.forward.cache.capacity
    whole = engines["all"].target.forward.cache.capacity
    # The longest row decides: 80 of 86 tokens are its image, 60 of the other's.
    assert capacities == {
        "all": whole,
        "uniform:0.1": whole - 54,
        "none": whole - 60,
        "self:0.1": whole - 54,
    }
    assert engines["uniform:0.1"].drafter.num_prompt_tokens == [5 + 8, 5 + 6]


def tower_of(model):
    ends = ("vision_tower", "visual")
    return next(module for name, module in model.named_modules() if name.endswith(ends))


SMALLER = {
    "llava": {"text_config": transformers.LlamaConfig(**(TEXT | SMALL))},
    "qwen2_5_vl": {
        "text_config": SMALL | {"num_attention_heads": 2},
        "vision_config": {"out_hidden_size": 16},
    },
}


@pytest.mark.parametrize("name", SMALLER)
def test_whose_tower_runs(name):
    """A drafter of another hidden size looks for itself; one that shares the tower need not."""
    model, small = tiny_vlm(name), tiny_vlm(name, **SMALLER[name])
    clone = copy.deepcopy(model)
    expected, outputs = decoded(model, request(name, ROWS)), []
    for drafter, option, num_runs in (
        (small, "all", 1),
        (small, "uniform:0.5", 1),
        (clone, "uniform:0.5", 1),
        (clone, "reuse+uniform:0.5", 0),
        (small, "none", 0),
    ):
        fast = fixed({"name": "model", "model": drafter, "visual_tokens": option})
        runs = fed(
            drafter,
            lambda fast=fast: outputs.append(decoded(model, request(name, ROWS), fast)),
            tower_of(drafter),
        )
        assert len(runs) == num_runs, option
    mixed = {"name": "mixed", "model": small, "members": ["all", "uniform:0.5", "none"]}
    fast = fixed(mixed)
    runs = fed(
        small,
        lambda: outputs.append(decoded(model, request(name, ROWS), fast)),
        tower_of(small),
    )
    assert len(runs) == 1
    assert all(torch.equal(out, expected) for out in outputs)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_views_share_each_forward_and_the_better_one_is_believed(name):
    model = tiny_vlm(name)
    clone = copy.deepcopy(model)
    drafter = {"name": "mixed", "model": clone, "members": ["none", "all", "uniform:0.3"]}
    engine = engine_of(model, name, ROWS[:2], drafter)
    runs = fed(clone, engine.run)
    num_drafts = sum(step.width - 1 for step in engine.ledger.steps)
    assert len(runs) == 1 + num_drafts
    assert {len(kwargs["input_ids"]) for kwargs in runs[1:2]} == {6}
    assert (engine.drafter.weights_MB[1] > 0.8).all()
    torch.testing.assert_close(engine.drafter.weights_MB.sum(0), torch.ones(2).double())


def test_text_alone_is_drafted_as_text():
    model = tiny_vlm("paligemma")
    expected = decoded(model, request("paligemma", ROWS[2:]))
    clone = {"name": "model", "model": copy.deepcopy(model)}
    for option in ("all", "uniform:0.1", "pool:2", "attention:0.1", "reuse", "self"):
        drafter = ({"name": "model"} if option == "self" else clone) | {"visual_tokens": option}
        fast = fixed(drafter)
        assert torch.equal(decoded(model, request("paligemma", ROWS[2:]), fast), expected)
        assert fast.stats.num_target_forwards == 1 + -(-NUM_NEW // 6), option


@pytest.mark.parametrize("option", ["uniform:0.3", "reuse+attention:0.3", "self:0.3"])
def test_the_pipeline_takes_the_option(option):
    processor = PROCESSORS["qwen3_vl"]()
    pipe = SpeculativeVLMPipeline.from_model(tiny_vlm("qwen3_vl"), processor, schedule="fixed")
    pipe.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (16, 12), (200, 30, 90))
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it"}]
    chats = [[{"role": "user", "content": parts}], [{"role": "user", "content": "abcabc"}]]
    expected = pipe(chats, max_new_tokens=12, decoder="sequential").tokens
    drafter = {"name": "model", "visual_tokens": option}
    if "self" not in option:
        drafter["model"] = copy.deepcopy(pipe.model)
    out = pipe(chats, max_new_tokens=12, drafter=drafter)
    assert [t.tolist() for t in out.tokens] == [t.tolist() for t in expected]
    assert out.stats.num_accepted > 0


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "changes", "option", "message"),
    [
        ("llava", {"seed": 1}, "reuse", "differ in model.multi_modal_projector.linear_1.weight"),
        ("llava", SMALL, "reuse+uniform:0.1", "'reuse.uniform:0.1' needs .* differ in model.multi"),
        ("llava_onevision", {}, "pool:2", "at the end of each row of an image"),
        (
            "qwen2_vl",
            {},
            "all",
            "Qwen2VLForConditionalGeneration does not read the images of Llava",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused(name, changes, option, message):
    target = name if name != "qwen2_vl" else "llava"
    model, other = tiny_vlm(target), tiny_vlm(name)
    if "hidden_size" in changes:
        other = tiny_vlm(name, text_config=transformers.LlamaConfig(**(TEXT | changes)))
    elif changes:
        torch.nn.init.normal_(other.model.multi_modal_projector.linear_1.weight)
    runs = []
    model.register_forward_pre_hook(lambda *args: runs.append(args))
    drafter = {"name": "model", "model": other, "visual_tokens": option}
    with pytest.raises(ValueError, match=message):
        decoded(model, request(target, ROWS), fixed(drafter))
    assert not runs


@pytest.mark.parametrize("drafter", ["all", "self"])
def test_images_that_are_cached_cannot_be_shown(drafter):
    model = tiny_vlm("llava")
    cache = DynamicCache(config=model.config.text_config)
    first = decoded(model, request("llava", ROWS[:1]), past_key_values=cache)
    longer = {"input_ids": torch.cat([first, torch.tensor([[3, 4]])], dim=1)}
    options = {"name": "model", "visual_tokens": drafter}
    if drafter == "all":
        fast = fixed(options | {"model": copy.deepcopy(model)})
        with pytest.raises(ValueError, match="'all' needs the pixel_values of images, and none"):
            decoded(model, longer, fast, past_key_values=cache)
        return
    # The target has seen them, and its cache says where to look.
    fast = fixed(options)
    cache_too = copy.deepcopy(cache)
    out = decoded(model, longer, fast, past_key_values=cache)
    assert torch.equal(out, decoded(model, longer, past_key_values=cache_too))


def test_a_text_model_has_no_visual_tokens():
    model = tiny_model("Llama")
    ids = {"input_ids": torch.tensor([[1, 2, 3]])}
    with pytest.raises(ValueError, match="needs a target that reads images; LlamaForCausalLM has"):
        decoded(model, ids, fixed({"name": "model", "visual_tokens": "self"}))
    drafter = {"name": "model", "model": model, "visual_tokens": "all"}
    with pytest.raises(ValueError, match="needs the pixel_values of images, and none are given"):
        decoded(model, ids, fixed(drafter))
