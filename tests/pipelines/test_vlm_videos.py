"""Videos in the pipeline: the tokens of `generate` on what the processor makes of them."""

import pytest
import torch
import transformers
from PIL import Image
from towers import TowerRuns, another, figures_of, make_fresh
from transformers.utils import is_av_available
from transformers.video_utils import VideoMetadata
from vlm import FAMILIES as TINY
from vlm import NUM_TEXT, VOCAB, tiny_vlm
from vlm_processors import PROCESSORS

from mmspec.adapters.vision_language import FAMILIES
from mmspec.pipelines import SpeculativeVLMPipeline, vlm_inputs
from mmspec.pipelines.turns import num_common

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
FILMED = sorted(name for name in PROCESSORS if FAMILIES[name].videos is not None)
OPTIONS = {
    "max_new_tokens": 8,
    "min_new_tokens": 8,
    "bad_words": [[token] for token in range(NUM_TEXT, VOCAB)],
}


def picture(seed, width=8, height=8):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def film(seed, num_frames=4):
    return [picture(100 * seed + index) for index in range(num_frames)]


def make_pipe(name):
    processor = PROCESSORS[name]()
    pipe = SpeculativeVLMPipeline.from_model(tiny_vlm(name), processor, schedule="fixed")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def said(*parts, role="user"):
    return {"role": role, "content": [part_of(part) for part in parts]}


def part_of(part):
    if isinstance(part, dict):
        return part
    kinds = {str: ("text", "text"), list: ("video", "video")}
    kind, key = kinds.get(type(part), ("image", "image"))
    return {"type": kind, key: part}


def tokens_of(out):
    return [tokens.tolist() for tokens in out.tokens]


def generated(pipe, chat):
    """New tokens of transformers' own loop on what its own processor makes of a chat."""
    parts = [part for message in chat for part in message["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"]
    films = [part["video"] for part in parts if part["type"] == "video"]
    plain = [
        {
            **m,
            "content": [
                {k: v for k, v in p.items() if k in ("type", "text")} for p in m["content"]
            ],
        }
        for m in chat
    ]
    text = pipe.processor.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    given = {"images": images} if images else {}
    if films:
        metadata = [
            VideoMetadata(total_num_frames=len(one), frames_indices=list(range(len(one))))
            for one in films
        ]
        given |= {"videos": films, "video_metadata": metadata, "do_sample_frames": False}
    inputs = pipe.processor(text=[text], return_tensors="pt", **given)
    words = OPTIONS["bad_words"]
    out = pipe.model.generate(
        **inputs.to(pipe.dtype), do_sample=False, max_new_tokens=8, bad_words_ids=words
    )
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def chats_for(name):
    chats = [
        [said(film(1), "what is it")],
        [said("tell ", film(2), "from ", film(3, 2), "abcabc")],
        [said("no video at all, no")],
    ]
    if name != "glm_ocr":
        chats.append([said("see ", picture(4), "and ", film(1), "now")])
    return chats


@pytest.mark.parametrize("name", FILMED)
def test_greedy_is_that_of_generate(name):
    pipe = make_pipe(name)
    chats = chats_for(name)
    if name == "smolvlm":
        # Its processor reads images or videos in a call.
        chats = chats[:3]
    if name in ("llava_onevision", "internvl", "smolvlm"):
        # Their processors stack all videos of a call, which must have as many frames.
        chats[1] = [said("tell ", film(2), "from ", film(3), "abcabc")]
    expected = [generated(pipe, chat) for chat in chats]
    others = [[said(film(5), "what is it")], [said("tell ", film(6), "from ", film(7), "abcabc")]]
    assert expected[:2] != [generated(pipe, chat) for chat in others], "the videos must matter"
    assert tokens_of(pipe(chats, **OPTIONS, drafter="early_exit", width=3)) == expected
    for chat, tokens in zip(chats, expected, strict=True):
        assert tokens_of(pipe(chat, **OPTIONS, drafter="jacobi")) == [tokens]


@pytest.mark.parametrize("name", FILMED)
def test_a_turn_behind_a_video_reads_only_what_is_new(name):
    pipe, fresh = make_pipe(name), make_pipe(name)
    chat = [said(film(1), "what is it")]
    first = pipe(chat, **OPTIONS)
    chat = [*chat, said(first.texts[0], role="assistant"), said("and ", film(2), "why")]
    widths = []
    hook = pipe.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    known = first.cache.tokens[0]
    out = pipe(chat, cache=first.cache, **OPTIONS)
    hook.remove()
    assert tokens_of(out) == tokens_of(fresh(chat, **OPTIONS))
    # The template that SmolVLM takes for videos writes an answer otherwise than it asks for one.
    shared = num_common(known, out.cache.tokens[0])
    assert shared == len(known) if name != "smolvlm" else shared > len(known) - 8
    assert widths[0] == len(out.cache.tokens[0]) + 1 - OPTIONS["max_new_tokens"] - shared
    misses = pipe.image_cache.num_misses
    pipe(chat, **OPTIONS)
    assert pipe.image_cache.num_misses == misses


def test_sampled_tokens_are_those_of_sequential_decoding():
    pipe = make_pipe("qwen2_5_vl")
    chats = chats_for("qwen2_5_vl")

    def seeds():
        return [torch.Generator().manual_seed(seed) for seed in range(len(chats))]

    options = OPTIONS | {"temperature": 1.0}
    plain = pipe(chats, decoder="sequential", generator=seeds(), **options)
    assert tokens_of(pipe(chats, drafter="jacobi", generator=seeds(), **options)) == tokens_of(
        plain
    )


def test_videos_may_stand_beside_the_prompts(tmp_path):
    pipe = make_pipe("qwen2_vl")
    expected = pipe([[said(film(1), "a")], [said(film(2), "x", film(3), "b")]], **OPTIONS).texts
    empty = {"type": "video"}
    beside = [[said(empty, "a")], [said(empty, "x", empty, "b")]]
    assert pipe(beside, videos=[film(1), [film(2), film(3)]], **OPTIONS).texts == expected
    assert pipe(beside[1], videos=[film(2), film(3)], **OPTIONS).texts == expected[1:]
    for index, frame in enumerate(film(1)):
        frame.save(tmp_path / f"{index:04}.png")
    text = "<user><video>a<end><bot>"
    for video in (film(1), tmp_path, str(tmp_path)):
        assert pipe(beside[0], videos=video, **OPTIONS).texts == expected[:1]
        assert pipe(text, videos=video, **OPTIONS).texts == expected[:1]
    named = [said({"type": "video", "path": str(tmp_path)}, "a")]
    assert pipe(named, **OPTIONS).texts == expected[:1]


def test_frames_a_second_place_the_tokens():
    pipe = make_pipe("qwen2_5_vl")
    ask = lambda fps: [said({"type": "video", "video": film(1), "fps": fps}, "what")]  # noqa: E731
    slow, fast = pipe(ask(0.5), **OPTIONS), pipe(ask(24), **OPTIONS)
    assert tokens_of(fast) == tokens_of(pipe(ask(None), **OPTIONS))
    assert tokens_of(slow) != tokens_of(fast)
    # What another clock placed is not shared.
    again = pipe(ask(0.5), cache=fast.cache, **OPTIONS)
    assert tokens_of(again) == tokens_of(slow)


@pytest.mark.skipif(not is_av_available(), reason="av, which decodes files, is not installed")
def test_a_file_is_decoded(tmp_path):
    import av

    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=4)
        stream.width = stream.height = 8
        stream.pix_fmt = "rgb24"
        for frame in film(1):
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    pipe = make_pipe("qwen2_5_vl")
    timed = [said({"type": "video", "video": film(1), "fps": 4}, "what")]
    from_file = [said({"type": "video", "path": str(path)}, "what")]
    assert tokens_of(pipe(from_file, **OPTIONS)) == tokens_of(pipe(timed, **OPTIONS))


# --------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def pipe():
    return make_pipe("qwen2_vl")


EMPTY = {"type": "video"}
REFUSED = [
    ([said(EMPTY, "a")], {}, "prompt 0 has 1 places for videos and 0 videos"),
    ([said("a")], {"videos": film(1)}, "prompt 0 has 0 places for videos and 1 videos"),
    ("a<video>", {"videos": [film(1), film(2)]}, r"has 1 places for videos \('<video>'\) and 2"),
    ("a<video>", {"videos": 3}, "video 0 of prompt 0 must be a list of PIL images, or the path"),
    ("a<video>", {"videos": "none.mp4"}, "video 0 of prompt 0 cannot be read: no file or folder"),
    ("a<video>", {"videos": [[picture(1), picture(2, 9)]]}, "must have frames of one size, got 2"),
    (
        "a<video>",
        {"videos": [[picture(1), Image.new("RGB", (0, 5))]]},
        "size of frame 1 of video 0 of prompt 0 must be at least",
    ),
    (
        ["a<video>", "b"],
        {"videos": film(1)},
        "videos must be a list with an entry for each of the 2",
    ),
    (
        [said({**EMPTY, "video": film(1), "fps": 0})],
        {},
        "fps of video 0 of prompt 0 must be None or",
    ),
]


@pytest.mark.parametrize(("prompt", "options", "message"), REFUSED)
def test_bad_videos_are_refused_before_any_forward(pipe, monkeypatch, prompt, options, message):
    def fail(*args, **kwargs):
        raise AssertionError("a forward ran")

    monkeypatch.setattr(pipe.model, "forward", fail)
    with pytest.raises(ValueError, match=message):
        pipe(prompt, **options)


def test_a_file_that_nothing_decodes_is_refused(pipe, tmp_path, monkeypatch):
    for name in ("is_av_available", "is_torchcodec_usable"):
        monkeypatch.setattr(vlm_inputs, name, lambda **kinds: False)
    path = tmp_path / "a.mp4"
    path.write_bytes(b"-")
    with pytest.raises(ValueError, match="is a file, and neither torchcodec nor av is installed"):
        pipe("a<video>", videos=path)


def test_an_empty_folder_is_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="must have frames of one size, got 0 sizes"):
        pipe("a<video>", videos=tmp_path)


@pytest.mark.parametrize("name", sorted(set(PROCESSORS) - set(FILMED)))
def test_families_without_videos_say_so(name):
    pipe = make_pipe(name)
    class_name = TINY[name].class_name
    with pytest.raises(ValueError, match=f"has videos, and {class_name} reads none; pass their"):
        pipe([said(picture(1), film(1), "a")])


MIXED = {"glm_ocr": "has one token for images and", "smolvlm": "reads images or videos in a call"}


@pytest.mark.parametrize("name", sorted(MIXED.keys() & PROCESSORS.keys()))
def test_images_beside_videos_may_be_refused(name):
    with pytest.raises(ValueError, match=MIXED[name]):
        make_pipe(name)([said(picture(1), film(1), "a")])


def test_the_class_of_transformers_is_there():
    """Every family that is said to have videos has inputs for them."""
    for name, family in FAMILIES.items():
        model_class = getattr(transformers, TINY[name].class_name)
        assert ("video" in model_class.input_modalities) >= (family.videos == "own")


@pytest.mark.parametrize("name", FILMED)
def test_a_tower_of_a_drafter_sees_a_film_once(name):
    pipe = make_pipe(name)
    small = another(pipe.model)
    drafter = {"name": "model", "model": small, "visual_tokens": "all"}
    runs, counts, fresh = TowerRuns(small), [], make_fresh(pipe)
    for chats in ([[said(film(1), "what")]], [[said(film(2), "so")], [said(film(1), "why")]]):
        for _ in range(2):
            before = runs.count
            out = pipe(chats, drafter=drafter, **OPTIONS)
            counts.append(runs.count - before)
        wanted = fresh(chats, drafter=drafter, **OPTIONS)
        assert (tokens_of(out), figures_of(out)) == (tokens_of(wanted), figures_of(wanted))
    assert counts == [counts[0], 0, counts[0], 0]
    assert counts[0] >= 1
