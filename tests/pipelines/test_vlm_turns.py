"""Turns of a conversation about images: nothing is read twice, and the answer is a fresh one."""

import pytest
import torch
from PIL import Image
from towers import CALLS, NUM_NEW, TowerRuns, another, figures_of, make_fresh
from vlm import NUM_TEXT, SUPPORTED, VOCAB, tiny_vlm
from vlm_processors import PROCESSORS

from mmspec.adapters.image_features import FeatureCache
from mmspec.pipelines import SpeculativeVLMPipeline
from mmspec.pipelines.turns import num_common

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
#: Only letters, which are the same tokens when they are read again.
OPTIONS = {
    "max_new_tokens": 8,
    "min_new_tokens": 8,
    "bad_words": [[token] for token in range(NUM_TEXT, VOCAB)],
}
WORDS = ["what is it", "why", "and then?"]
KEPT = sorted(set(PROCESSORS) - {"paligemma"})


def picture(seed, width=12, height=8):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def make_pipe(name, **options):
    processor = PROCESSORS[name]()
    pipe = SpeculativeVLMPipeline.from_model(tiny_vlm(name), processor, schedule="fixed", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def said(role, *parts):
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": role, "content": content}


def tokens_of(out):
    return [tokens.tolist() for tokens in out.tokens]


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


class Work:
    """What a call costs: images through the tower, and columns of each forward."""

    def __init__(self, pipe):
        model = pipe.model.model
        names = ("vision_tower", "vision_model", "visual")
        tower = next(getattr(model, name) for name in names if hasattr(model, name))
        self.num_tower, self.widths, self.prompt_length = 0, [], 0
        self._hooks = [
            tower.register_forward_pre_hook(self._tower),
            pipe.model.register_forward_pre_hook(self._forward, with_kwargs=True),
        ]

    def _tower(self, module, args):
        self.num_tower += 1

    def _forward(self, module, args, kwargs):
        self.widths.append(kwargs["input_ids"].shape[1])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for hook in self._hooks:
            hook.remove()


def conversation(pipe, turns, **options):
    """Asks row by row and turn by turn, once with a kept cache and once afresh.

    Returns:
        The outputs, and the work of the calls with the cache.
    """
    chats, cache = [[] for _ in turns[0]], None
    outputs, works = [], []
    for questions in turns:
        chats = [[*chat, question] for chat, question in zip(chats, questions, strict=True)]
        with Work(pipe) as work:
            out = pipe(chats, cache=cache, **OPTIONS, **options)
        work.prompt_length = max(map(len, out.cache.tokens)) + 1 - OPTIONS["max_new_tokens"]
        fresh = make_fresh(pipe)(chats, **OPTIONS, **options)
        assert tokens_of(out) == tokens_of(fresh)
        assert out.cache is cache or cache is None
        cache = out.cache
        chats = [
            [*chat, said("assistant", text)] for chat, text in zip(chats, out.texts, strict=True)
        ]
        outputs.append(out)
        works.append(work)
    return outputs, works


@pytest.mark.supports("cached turns", SUPPORTED)
@pytest.mark.parametrize("name", KEPT)
def test_a_turn_reads_only_what_is_new(name):
    pipe = make_pipe(name)
    turns = [
        [said("user", picture(1), "what is it")],
        [said("user", "and ", picture(2, 8, 12), "why")],
        [said("user", "no.")],
    ]
    _, works = conversation(pipe, turns, drafter="early_exit", width=3)
    assert works[2].num_tower == 0
    # The last token of an answer has no keys yet.
    known = [work.prompt_length + OPTIONS["max_new_tokens"] - 1 for work in works]
    read = [work.prompt_length - before for work, before in zip(works, [0, *known], strict=False)]
    if name == "llava_onevision":
        # A second image in the prompt takes the tiles from the first one: its tokens are others.
        assert [works[0].widths[0], works[2].widths[0]] == read[::2]
    else:
        assert [work.widths[0] for work in works] == read
        assert works[0].num_tower == works[1].num_tower


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_rows_of_a_batch_go_on_by_themselves(name):
    turns = [
        [said("user", picture(1), "what"), said("user", "tell ", picture(2), "from", picture(3))],
        [said("user", "and then?"), said("user", picture(1), "so")],
    ]
    _, works = conversation(make_pipe(name), turns, width=4)
    # The first row's image is known to the second row.
    assert [work.num_tower for work in works] == [3, 0]


def test_a_prompt_that_sees_itself_whole_is_read_again():
    """PaliGemma: the keys of a prompt depend on all of it."""
    turns = [[said("user", picture(1), "what")], [said("user", "and then?")]]
    _, works = conversation(make_pipe("paligemma"), turns)
    assert [work.num_tower for work in works] == [1, 0]
    assert [work.widths[0] for work in works] == [work.prompt_length for work in works]


@pytest.mark.supports("sampled", SUPPORTED)
@pytest.mark.supports("cached turns", SUPPORTED)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_sampled_turns_are_those_of_sequential_decoding(name):
    pipe = make_pipe(name)
    options = OPTIONS | {"temperature": 1.0, "top_p": 0.95}
    chat, cache = [said("user", "see ", picture(1), "what")], None
    for question in ("and then?", "why"):
        plain = make_fresh(pipe)(chat, decoder="sequential", generator=seeds(4), **options)
        out = pipe(chat, drafter="jacobi", cache=cache, generator=seeds(4), **options)
        assert tokens_of(out) == tokens_of(plain)
        chat += [said("assistant", out.texts[0]), said("user", picture(2), question)]
        cache = out.cache


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "internvl"])
def test_the_same_tokens_about_another_image_share_nothing_behind_it(name):
    pipe = make_pipe(name)
    parts = ("see ", picture(1), " what", picture(2), " now")
    first = pipe([said("user", *parts)], **OPTIONS)
    changed = [said("user", *parts[:3], picture(3), parts[4])]
    with Work(pipe) as work:
        out = pipe(changed, cache=first.cache, **OPTIONS, drafter="none")
    # A tile of InternVL is an item for itself.
    assert work.num_tower == (7 if name == "internvl" else 1)
    expected = make_fresh(pipe)(changed, **OPTIONS)
    assert tokens_of(out) == tokens_of(expected)
    assert tokens_of(out) != tokens_of(first), "the images must matter"
    one = OPTIONS | {"max_new_tokens": 1, "min_new_tokens": 1}
    asked, again = (pipe(chat, **one).cache.tokens[0] for chat in ([said("user", *parts)], changed))
    assert work.widths[0] == len(again) - num_common(asked, again) < len(again)
    # And back again, and shorter.
    for chat in ([said("user", *parts)], [said("user", *parts[:2])], [said("user", "other")]):
        assert tokens_of(pipe(chat, cache=first.cache, **OPTIONS)) == tokens_of(
            make_fresh(pipe)(chat, **OPTIONS)
        )


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_drafter_that_sees_reads_its_prompt_anew(name):
    pipe = make_pipe(name)
    clone = {"name": "model", "model": pipe.model, "visual_tokens": "all"}
    turns = [[said("user", picture(1), "what is it")], [said("user", "and", picture(2))]]
    outputs, _ = conversation(pipe, turns, drafter=clone, width=4)
    assert [out.stats.num_target_forwards for out in outputs] == [1 + 8 // 4] * 2


def test_turns_in_parts():
    pipe = make_pipe("llava")
    turns = [[said("user", picture(1), "what is it")], [said("user", "and", picture(2), "why not")]]
    _, works = conversation(pipe, turns, prefill_chunk_size=5, width=2)
    assert [max(work.widths) for work in works] == [5, 5]


def test_caches_of_others_are_refused():
    pipe = make_pipe("llava")
    cache = pipe(["a", "b"], **OPTIONS).cache
    with pytest.raises(ValueError, match="cache holds 2 rows, got 1 prompts"):
        pipe("a", cache=cache)
    with pytest.raises(ValueError, match="made by another model"):
        make_pipe("llava")(["a", "b"], cache=cache)
    with pytest.raises(ValueError, match="cache must be None or an earlier output's cache, got 3"):
        pipe("a", cache=3)


# --------------------------------------------------------------------------- images by content


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_a_second_question_does_not_run_the_tower(name):
    pipe, one, two = make_pipe(name), picture(1), picture(2, 8, 12)
    first = [said("user", one, "what")]
    second = [said("user", "say", two, "or", one, "why")]
    fresh = make_fresh(pipe)
    expected = [fresh(chat, **OPTIONS) for chat in (first, second)]
    with Work(pipe) as work:
        outputs = [pipe(chat, **OPTIONS) for chat in (first, second)]
        pipe([second, first], **OPTIONS)
    assert list(map(tokens_of, outputs)) == list(map(tokens_of, expected))
    # LLaVA-OneVision cuts an image into tiles only where it stands alone in its prompt; InternVL's
    # tiles are items for themselves.
    num_seen = {"llava_onevision": 3, "internvl": 14}.get(name, 2)
    assert work.num_tower == num_seen
    assert pipe.image_cache.num_misses == len(pipe.image_cache) == num_seen
    assert fresh.image_cache.size_bytes == 0


def test_a_small_cache_drops_the_least_recently_used():
    cache = FeatureCache()
    pipe = make_pipe("llava", image_cache=cache)
    ask = lambda seed: pipe([said("user", picture(seed), "what")], **OPTIONS)  # noqa: E731
    ask(1)
    cache.max_bytes = 2 * cache.size_bytes
    for seed in (2, 1, 3, 1, 2):
        ask(seed)
    # 3 displaces 2, which is older than 1 by then.
    assert (cache.num_hits, cache.num_misses, len(cache)) == (2, 4, 2)
    assert cache.size_bytes == cache.max_bytes == 2 * 4 * 32 * 8
    cache.clear()
    assert (len(cache), cache.size_bytes) == (0, 0)
    ask(2)
    assert cache.num_misses == 5


def test_changed_weights_are_another_model():
    pipe = make_pipe("llava")
    chat = [said("user", picture(1), "what")]
    pipe(chat, **OPTIONS)
    with torch.no_grad():
        pipe.model.model.multi_modal_projector.linear_1.weight.mul_(-1)
    assert tokens_of(pipe(chat, **OPTIONS)) == tokens_of(make_fresh(pipe)(chat, **OPTIONS))
    assert pipe.image_cache.num_hits == 0


def test_a_cache_is_shared_between_pipelines_and_models():
    one = make_pipe("llava")
    two = make_pipe("llava", image_cache=one.image_cache)
    chat = [said("user", picture(1), "what")]
    for pipe in (one, two, one, two):
        pipe(chat, **OPTIONS)
    assert (one.image_cache.num_misses, one.image_cache.num_hits) == (2, 2)


@pytest.mark.parametrize("size", [-1, 1.5, None, True])
def test_a_cache_of_no_size_is_refused(size):
    with pytest.raises(ValueError, match="max_bytes must be an integer >= 0"):
        make_pipe("llava", image_cache=size)


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_a_tower_of_a_drafter_sees_a_picture_once(name):
    pipe = make_pipe(name)
    small = another(pipe.model)
    fresh, runs = make_fresh(pipe), TowerRuns(small)
    drafter = {"name": "model", "model": small, "visual_tokens": "all"}
    counts, accepted = [], 0
    for shown in CALLS:
        # Only where an image stands alone in its prompt is it always the same item.
        chats = [[said("user", picture(index), WORDS[k])] for k, index in enumerate(shown)]
        before = runs.count
        out = pipe(chats, drafter=drafter, **OPTIONS)
        counts.append(runs.count - before)
        wanted = fresh(chats, drafter=drafter, **OPTIONS)
        assert (tokens_of(out), figures_of(out)) == (tokens_of(wanted), figures_of(wanted))
        # Nothing is kept: all of them again.
        assert runs.count - before - counts[-1] == counts[0] * len(shown)
        accepted += out.stats.num_accepted
    assert counts == [counts[0] * num_new for num_new in NUM_NEW]
    assert counts[0] >= 1
    assert accepted > 0


def test_views_and_turns_share_what_a_drafters_tower_made():
    pipe = make_pipe("llava")
    small = another(pipe.model)
    runs, chat, cache = TowerRuns(small), [said("user", picture(1), "what")], None
    for sight in ("all", "uniform:0.5", "pool:2", "attention:0.5"):
        pipe(chat, drafter={"name": "model", "model": small, "visual_tokens": sight}, **OPTIONS)
    members = {"name": "mixed", "model": small, "members": ["all", "none"]}
    for question in ("why", "and then?"):
        cache = pipe(chat, cache=cache, drafter=members, **OPTIONS).cache
        chat += [said("assistant", "a"), said("user", question)]
    assert runs.count == 1
    assert (pipe.image_cache.num_misses, len(pipe.image_cache)) == (2, 2)
