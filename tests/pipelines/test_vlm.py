"""The vision-language pipeline: the tokens of `generate` on the same inputs, and refusals."""

import pytest
import torch
from PIL import Image
from tiny import tiny_model
from transformers import TextStreamer
from vlm import SUPPORTED
from vlm_processors import PROCESSORS, loaded_vlm

from mmspec.pipelines import SpeculativeVLMPipeline


def picture(seed, width=12, height=8):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def make_pipe(name):
    pipe = SpeculativeVLMPipeline.from_model(*loaded_vlm(name), schedule="fixed")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def llava_pipe():
    return make_pipe("llava")


def chat(*parts):
    return [{"role": "user", "content": [part_of(part) for part in parts]}]


def part_of(part):
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image"} | ({} if part is None else {"image": part})


CHATS = [
    chat(picture(1), "what is it"),
    chat("tell", picture(2, 8, 12), "from", picture(3), "abcabcab"),
    chat("no image at all, no"),
]


def generated(pipe, chats):
    """New tokens of transformers' own loop on what its own processor makes of each chat."""
    rows = []
    for one in chats:
        inputs = pipe.processor.apply_chat_template(
            one,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(pipe.dtype)
        out = pipe.model.generate(**inputs, do_sample=False, max_new_tokens=12)
        rows.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return rows


def tokens_of(out):
    return [tokens.tolist() for tokens in out.tokens]


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


@pytest.mark.supports("processor", SUPPORTED)
# What transformers' own processors warn of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(set(PROCESSORS) - {"got_ocr2"}))
def test_greedy_is_that_of_generate(name):
    pipe = make_pipe(name)
    # PaliGemma's processor takes no prompt without an image.
    chats = CHATS[:2] if name == "paligemma" else CHATS
    expected = generated(pipe, chats)
    out = pipe(chats, max_new_tokens=12, drafter="early_exit", width=6)
    assert tokens_of(out) == expected
    assert out.texts == [pipe.tokenizer.decode(t, skip_special_tokens=True) for t in out.tokens]
    assert out.stats.num_units == sum(map(len, expected))
    assert not out.interrupted
    # The first row may as well be the one without images.
    assert tokens_of(pipe(chats[::-1], max_new_tokens=12)) == expected[::-1]
    assert tokens_of(pipe(chats[-1], max_new_tokens=12)) == expected[-1:]


@pytest.mark.supports("processor", SUPPORTED["got_ocr2"])
def test_a_chat_is_what_the_processor_writes_itself():
    """GOT-OCR2's has no template: it makes a prompt of an image alone, or takes a text."""
    processor = PROCESSORS["got_ocr2"]()
    assert processor.chat_template is None
    pipe = make_pipe("got_ocr2")
    page, others = picture(1), [picture(2, 8, 12), picture(3)]
    text, blind = "see <imgpad> and <imgpad>, abcabcab", "no image at all, no"
    expected = []
    for inputs in (
        processor(images=page, return_tensors="pt"),
        processor(images=others, text=[text], return_tensors="pt"),
        processor.tokenizer(blind, return_tensors="pt"),
    ):
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(pipe.dtype)
        out = pipe.model.generate(**inputs, do_sample=False, max_new_tokens=12)
        expected.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    prompts, images = [chat(page, " OCR: "), text, blind], [None, others, None]
    for drafter in ("early_exit", "jacobi"):
        options = {"max_new_tokens": 12, "drafter": drafter, "width": 6}
        assert tokens_of(pipe(prompts, images=images, **options)) == expected
        for row in (0, 1):
            alone = pipe(prompts[row], images=images[row], **options)
            assert tokens_of(alone) == expected[row : row + 1]
    changed = pipe(chat(picture(4), " OCR: "), max_new_tokens=12)
    assert tokens_of(changed) != expected[:1], "the image must matter"
    options = {"format": False, "images_kwargs": {}}
    _, (own,), *_ = processor.prepare_inputs_layout(images=[page], **options)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " OCR: "}]}]
    template = {"add_generation_prompt": True, "tokenize": False}
    assert pipe.processor.apply_chat_template(said, **template) == own


@pytest.mark.supports("sampled", SUPPORTED["llava"])
def test_a_seed_gives_the_tokens_of_sequential_in_any_batch(llava_pipe):
    options = {"max_new_tokens": 16, "temperature": 1.0, "top_k": 20, "top_p": 0.95}
    plain = llava_pipe(CHATS, decoder="sequential", generator=seeds(1, 2, 3), **options)
    fast = llava_pipe(CHATS, drafter="jacobi", generator=seeds(1, 2, 3), **options)
    alone = llava_pipe(CHATS[1], generator=seeds(2), **options)
    assert tokens_of(fast) == tokens_of(plain)
    assert tokens_of(alone) == tokens_of(plain)[1:2]
    assert (plain.stats.tau, plain.stats.guarantee.value) == (1.0, "exact")


@pytest.mark.supports("model drafter", SUPPORTED)
@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_a_drafter_of_the_family_sees_the_images(name):
    pipe = make_pipe(name)
    clone = {"name": "model", "model": pipe.model, "visual_tokens": "all"}
    out = pipe(CHATS[:2], max_new_tokens=16, drafter=clone, width=6, min_new_tokens=16)
    assert out.stats.num_target_forwards == 1 + -(-16 // 6)


def test_images_may_stand_beside_the_prompts(llava_pipe, tmp_path):
    file = tmp_path / "a.png"
    picture(1).save(file)
    expected = llava_pipe(CHATS, max_new_tokens=8).texts
    beside = [chat(None, "what is it"), chat("tell", None, "from", None, "abcabcab"), CHATS[2]]
    images = [file, [picture(2, 8, 12), picture(3)], None]
    assert llava_pipe(beside, images=images, max_new_tokens=8).texts == expected
    one = llava_pipe(beside[0], images=str(file), max_new_tokens=8)
    also = llava_pipe(chat(file, "what is it"), max_new_tokens=8)
    as_text = "<user><image>what is it<end><bot>"
    text = llava_pipe(as_text, images=picture(1), max_new_tokens=8)
    plain = [{"role": "user", "content": "no image at all, no"}]
    assert one.texts == also.texts == text.texts == expected[:1]
    assert llava_pipe(plain, max_new_tokens=8, return_dict=False)[0] == expected[2:]


def test_what_the_checkpoint_says_of_generation_is_not_heeded(llava_pipe, monkeypatch):
    expected = llava_pipe(CHATS, max_new_tokens=8).texts
    for name, value in {"num_beams": 2, "max_length": 5, "do_sample": True}.items():
        monkeypatch.setattr(llava_pipe.model.generation_config, name, value)
    assert llava_pipe(CHATS, max_new_tokens=8).texts == expected


def test_stops_streams_and_callbacks(llava_pipe, capsys):
    whole = llava_pipe(CHATS[1], max_new_tokens=12)
    stop = whole.texts[0][4:6]
    stopped = llava_pipe(CHATS[1], max_new_tokens=12, stop=stop, drafter="jacobi")
    assert stopped.texts[0] == whole.texts[0][: whole.texts[0].index(stop)]
    streamer = TextStreamer(llava_pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    llava_pipe(CHATS[1], max_new_tokens=12, streamer=streamer)
    assert capsys.readouterr().out.rstrip() == whole.texts[0].rstrip()
    out = llava_pipe(CHATS, max_new_tokens=12, callback_on_step_end=lambda *_: True)
    assert out.interrupted


# --------------------------------------------------------------------------- refusals


@pytest.fixture
def no_forward(llava_pipe, monkeypatch):
    """Any forward, that of the vision tower included, fails the test."""

    def fail(*args, **kwargs):
        raise AssertionError("a forward ran")

    monkeypatch.setattr(llava_pipe.model, "forward", fail)
    monkeypatch.setattr(llava_pipe.model.model, "get_image_features", fail)


REFUSED = [
    (chat(None, "a"), {}, "prompt 0 has 1 places for images and 0 images"),
    (chat(None, "a"), {"images": [picture(1)] * 2}, "has 1 places for images and 2 images"),
    (chat("a"), {"images": picture(1)}, "has 0 places for images and 1 images"),
    ("a<image>", {}, r"prompt 0 has 1 places for images \('<image>'\) and 0 images"),
    ("a", {"images": picture(1)}, r"has 0 places for images \('<image>'\) and 1 images"),
    (["a", "b"], {"images": picture(1)}, "images must be a list with an entry for each of the 2"),
    (
        ["a", "b<image>"],
        {"images": [None, "none.png"]},
        r"image 0 of prompt 1 \(none.png\) cannot be read: No such file",
    ),
    (
        "a<image>",
        {"images": __file__},
        r"image 0 of prompt 0 \(/.*test_vlm.py\) cannot be read: UnidentifiedImageError",
    ),
    (
        "a<image>",
        {"images": Image.new("RGB", (0, 0))},
        r"size of image 0 .* must be .*, got \(0, 0",
    ),
    (chat(Image.new("L", (5, 0)), "a"), {}, r"size of image 0 .* must be .*, got \(5, 0\)"),
    ("a<image>", {"images": 3.5}, "image 0 of prompt 0 must be a PIL image or the path of a file"),
    (torch.tensor([1, 2]), {}, "prompt 0 is token ids; pass a text or a chat"),
    ([], {}, "at least one prompt is needed"),
    ("a", {"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
    ("a", {"temperature": -1.0}, "temperature"),
    ("a", {"decoder": "nonsense"}, "unknown decoder 'nonsense'"),
    (["a", "b"], {"generator": seeds(1)}, "generator"),
    (["a", "b"], {"streamer": TextStreamer(None)}, "a streamer shows one row, got 2 prompts"),
    (CHATS[0], {"max_new_tokens": 600}, "row 0 has .* prompt tokens .* has a context of 512"),
]


@pytest.mark.parametrize(("prompt", "options", "message"), REFUSED)
def test_bad_arguments_are_refused_before_any_forward(
    llava_pipe, no_forward, prompt, options, message
):
    with pytest.raises(ValueError, match=message):
        llava_pipe(prompt, **options)


def test_images_that_cannot_be_decoded_are_refused_by_name(
    llava_pipe, no_forward, monkeypatch, tmp_path
):
    whole, cut, text = (tmp_path / name for name in ("whole.png", "cut.png", "text.png"))
    Image.effect_noise((90, 90), 60).save(whole)
    cut.write_bytes(whole.read_bytes()[:3000])
    text.write_bytes(whole.read_bytes()[:8] + b"text")
    for file in (cut, text, tmp_path):
        with pytest.raises(ValueError, match=f"image 0 of prompt 0 .{file}. cannot be read: ."):
            llava_pipe("a<image>", images=file)
    with Image.open(cut) as lazy, pytest.raises(ValueError, match=r"prompt 0 cannot be read: ."):
        llava_pipe("a<image>", images=lazy)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    message = f"{whole}. cannot be read: DecompressionBombError: .*8100 pixels"
    with pytest.raises(ValueError, match=message):
        llava_pipe("a<image>", images=whole)


def test_what_cannot_be_cut_is_refused_before_the_tower_runs(monkeypatch):
    """Images of Gemma 3 see themselves whole."""
    pipe = make_pipe("gemma3")

    def fail(*args, **kwargs):
        raise AssertionError("the tower ran")

    monkeypatch.setattr(pipe.model.model, "get_image_features", fail)
    with pytest.raises(ValueError, match="prefill_chunk_size=2 would cut tokens"):
        pipe(CHATS[0], prefill_chunk_size=2)
    monkeypatch.undo()
    expected = pipe(CHATS[0], max_new_tokens=8).tokens[0].tolist()
    whole = pipe(CHATS[0], max_new_tokens=8, prefill_chunk_size=64).tokens[0].tolist()
    assert whole == expected


def test_unknown_options_and_models_are_refused(llava_pipe):
    with pytest.raises(TypeError, match="num_beams"):
        llava_pipe("a", num_beams=2)
    text = tiny_model("Llama")
    with pytest.raises(ValueError, match=r"unknown model type 'llama'; known: .*llava"):
        SpeculativeVLMPipeline.from_model(text, llava_pipe.processor)


def test_save_and_load(llava_pipe, tmp_path):
    llava_pipe.save_pretrained(tmp_path)
    again = SpeculativeVLMPipeline.from_pretrained(tmp_path, drafter="jacobi")
    again.set_progress_bar_config(disable=True)
    assert again.dtype == torch.float64
    assert again(CHATS, max_new_tokens=8).texts == llava_pipe(CHATS, max_new_tokens=8).texts
