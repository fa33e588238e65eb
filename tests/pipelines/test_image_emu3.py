"""Emu3 in the image pipeline, on a tiny random model of transformers' own classes."""

import random

import pytest
import torch
from emu3 import EMU3, EOL, NUM_CODES, PROMPTS, allowed_tokens, tiny_emu3, tiny_processor

from mmspec.adapters.image_emu3 import Emu3Family
from mmspec.drafters.jacobi import JacobiDrafter
from mmspec.pipelines import SpeculativeImagePipeline
from mmspec.pipelines.image_decoders import DECODERS, DENOISE
from mmspec.verify import SeededMatch

ROWS, COLUMNS = 3, 4
SIZE = {"height": 8 * ROWS, "width": 8 * COLUMNS}
NEGATIVES = [None, "lowres", ["lowres hair and glasses", "a", "", "blue"]]


def make_pipe(model, processor) -> SpeculativeImagePipeline:
    pipe = SpeculativeImagePipeline.from_model(model, processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model():
    return tiny_emu3()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture
def pipe(model, processor) -> SpeculativeImagePipeline:
    return make_pipe(model, processor)


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def run(pipe, prompt=PROMPTS, **options):
    count = 1 if isinstance(prompt, str) else len(prompt)
    options = {"generator": seeds(*range(count)), "output_type": "tokens"} | SIZE | options
    return pipe(prompt, **options)


def laid_out(processor, texts):
    """Prompts and the size of an image, padded, as transformers has them."""
    area = ROWS * COLUMNS * 64
    options = {"return_for_image_generation": True, "ratio": f"{COLUMNS}:{ROWS}"}
    inputs = processor(text=texts, image_area=area, padding=True, return_tensors="pt", **options)
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


def generated(model, processor, guidance, negative, *, scores=False):
    """What transformers' own loop writes behind the prompts, or the scores it writes them by."""
    inputs, options = laid_out(processor, PROMPTS), {}
    if negative is not None:
        texts = [negative] * len(PROMPTS) if isinstance(negative, str) else negative
        laid = laid_out(processor, texts)
        options = {
            "negative_prompt_ids": laid["input_ids"],
            "negative_prompt_attention_mask": laid["attention_mask"],
        }
    output = model.generate(
        **inputs,
        **options,
        do_sample=False,
        guidance_scale=guidance,
        max_new_tokens=ROWS * (COLUMNS + 1) + 3,
        prefix_allowed_tokens_fn=allowed_tokens(model, ROWS, COLUMNS),
        return_dict_in_generate=True,
        output_scores=True,
    )
    return output.scores if scores else output.sequences[:, inputs["input_ids"].shape[1] :]


@pytest.mark.supports("greedy", EMU3)
@pytest.mark.supports("processor", EMU3)
@pytest.mark.parametrize("guidance", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("negative", NEGATIVES, ids=["none", "one", "each"])
@pytest.mark.parametrize("is_shuffled", [False, True], ids=["in order", "shuffled"])
def test_greedy_is_that_of_transformers(guidance, negative, is_shuffled):
    model, processor = tiny_emu3(is_shuffled=is_shuffled), tiny_processor(is_shuffled=is_shuffled)
    ids = generated(model, processor, guidance, negative)
    lines = ids[:, :-3].view(-1, ROWS, COLUMNS + 1)
    assert (lines[..., -1] == EOL).all()
    options = {"guidance_scale": guidance, "negative_prompt": negative, "temperature": 0.0}
    out = run(make_pipe(model, processor), window=8, output_type="pt", **options)
    codes = model.vocabulary_mapping.convert_bpe2img(lines)
    assert out.tokens.tolist() == codes.flatten(1).tolist()
    pixels = model.decode_image_tokens(image_tokens=ids, height=ROWS, width=COLUMNS)
    assert torch.equal(out.images, (pixels.float() * 0.5 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("guidance", [3.0, 0.5])
def test_the_law_is_that_of_transformers(pipe, model, processor, monkeypatch, guidance):
    """Log-probabilities over the whole vocabulary, masked, are the codes' own logits."""
    theirs = generated(model, processor, guidance, NEGATIVES[2], scores=True)
    laws, verify = [], SeededMatch.verify

    def watched(rule, proposal, scores):
        laws.append((verdict := verify(rule, proposal, scores)).law_logits_BNV[:, 0])
        return verdict

    monkeypatch.setattr(SeededMatch, "verify", watched)
    options = {"guidance_scale": guidance, "negative_prompt": NEGATIVES[2]}
    run(pipe, decoder="sequential", temperature=0.0, **options)
    ids = [model.vocabulary_mapping.img2bpe[code] for code in range(NUM_CODES)]
    for index in range(COLUMNS):
        ours, expected = laws[index][:, :NUM_CODES].softmax(-1), theirs[index].softmax(-1)[:, ids]
        # transformers rounds the conditional logits to float32.
        assert torch.allclose(ours, expected, atol=1e-5)
    assert len(laws) == len(theirs)


@pytest.mark.supports("sampled", EMU3)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 64])
def test_exact_is_sequential_for_every_window(pipe, guidance, temperature, window):
    options = {"guidance_scale": guidance, "temperature": temperature, "negative_prompt": "lowres"}
    plain = run(pipe, decoder="sequential", **options)
    fast = run(pipe, decoder="exact", window=window, **options)
    assert torch.equal(fast.tokens, plain.tokens)
    assert plain.stats.num_target_forwards == ROWS * (COLUMNS + 1) + 3
    if window > 2:
        assert fast.stats.num_target_forwards < plain.stats.num_target_forwards


def random_settings(seed):
    """A call of any size, batch, prompts and law."""
    dice = random.Random(seed)
    words = ["a", "pixel", "red", "blue", "hair", "and", "glasses", "lowres"]

    def text():
        return " ".join(dice.choices(words, k=dice.randint(1, 9)))

    count = dice.randint(1, 4)
    return [text() for _ in range(count)], {
        "negative_prompt": dice.choice([None, "", text(), [text() for _ in range(count)]]),
        "guidance_scale": dice.choice([1.0, 0.0, 1.5, 3.0, 7.5]),
        "temperature": dice.choice([0.0, 0.5, 1.0, 1.3]),
        "top_k": dice.choice([None, 3, 12]),
        "top_p": dice.choice([None, 0.8]),
        "height": 8 * dice.randint(1, 5),
        "width": 8 * dice.randint(1, 5),
        "window": dice.choice([1, 2, 3, 5, 7, 16, 33, 64, None]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_exact_is_sequential_for_random_settings(pipe, seed):
    prompts, options = random_settings(seed)
    plain = run(pipe, prompts, decoder="sequential", **options)
    assert torch.equal(run(pipe, prompts, **options).tokens, plain.tokens)
    row = seed % len(prompts)
    if isinstance(options["negative_prompt"], list):
        options["negative_prompt"] = options["negative_prompt"][row]
    single = run(pipe, prompts[row], generator=seeds(row), **options)
    assert torch.equal(single.tokens[0], plain.tokens[row])


@pytest.mark.supports("batches", EMU3)
@pytest.mark.parametrize("decoder", sorted(set(DECODERS) - {DENOISE}))
def test_row_of_a_batch_is_its_single_run(pipe, decoder):
    options = {"decoder": decoder, "window": 8}
    batch = run(pipe, negative_prompt=NEGATIVES[2], **options).tokens
    assert ((batch >= 0) & (batch < NUM_CODES)).all()
    for row, (prompt, negative) in enumerate(zip(PROMPTS, NEGATIVES[2], strict=True)):
        options["generator"] = seeds(row)
        single = run(pipe, prompt, negative_prompt=negative, **options).tokens
        assert torch.equal(batch[row], single[0])


@pytest.mark.parametrize("decoder", ["sequential", "exact"])
def test_both_prompts_of_an_image_share_one_forward(pipe, model, decoder):
    fed = []
    hook = model.model.text_model.register_forward_hook(
        lambda _, args, out: fed.append(len(out.last_hidden_state))
    )
    with hook:
        options = {"negative_prompt": "lowres", "guidance_scale": 3.0, "window": 8}
        stats = run(pipe, PROMPTS[:2], decoder=decoder, **options).stats
    assert len(fed) == stats.num_target_forwards
    assert fed[0] == 2 * 2
    assert set(fed) <= {2 * 2, 2 * 1}  # of an image that is complete neither prompt is fed


def test_image_of_a_prompt_is_its_single_run(pipe):
    options = {"num_images_per_prompt": 2, "generator": seeds(4, 5, 6, 7)}
    many = run(pipe, PROMPTS[:2], negative_prompt=["a", "lowres hair"], **options).tokens
    single = run(pipe, PROMPTS[1], negative_prompt="lowres hair", generator=seeds(6)).tokens
    assert torch.equal(many[2], single[0])
    assert not torch.equal(many[2], many[3])


@pytest.mark.parametrize("decoder", sorted(set(DECODERS) - {DENOISE, "sequential"}))
@pytest.mark.parametrize("window", [2, 5, 16, 64])
def test_forced_tokens_are_guessed_and_never_rejected(pipe, monkeypatch, decoder, window):
    forced = {r * (COLUMNS + 1) + COLUMNS: NUM_CODES for r in range(ROWS)}
    end = ROWS * (COLUMNS + 1)
    forced |= {end + index: NUM_CODES + 1 + index for index in range(3)}
    guesses = []
    propose = JacobiDrafter.propose

    def watched(drafter, plan):
        proposal = propose(drafter, plan)
        starts = (drafter._rows.lengths_B - drafter._rows.prompt_lengths_B).tolist()
        for row, start in enumerate(starts):
            drafts = proposal.tokens_BN[row, 1 : 1 + proposal.num_drafted[row]].tolist()
            guesses.extend(
                (token, forced[start + node])
                for node, token in enumerate(drafts)
                if start + node in forced
            )
        return proposal

    seen = [0] * len(PROMPTS)

    def check(_, step, details):
        record, outcome = details["record"], details["outcome"]
        for row, new in enumerate(outcome.new_units):
            seen[row] += len(new)
            stopped = record.num_accepted[row] < record.num_drafted[row] and not outcome.done[row]
            if outcome.was_active[row] and stopped:
                assert seen[row] - 1 not in forced

    monkeypatch.setattr(JacobiDrafter, "propose", watched)
    run(pipe, decoder=decoder, window=window, callback_on_step_end=check)
    assert guesses
    assert all(token == expected for token, expected in guesses)


def test_output_types_and_step_maps(pipe):
    out = run(pipe, output_type="pil", window=8)
    assert [image.size for image in out.images] == [(8 * COLUMNS, 8 * ROWS)] * len(PROMPTS)
    assert out.tokens.shape == (len(PROMPTS), ROWS * COLUMNS)
    assert out.step_maps.shape == (len(PROMPTS), ROWS, COLUMNS)
    assert (out.step_maps[:, 0, 0] == 0).all()
    assert (out.step_maps.flatten(1).diff() >= 0).all()
    assert run(pipe, output_type="np").images.shape == (len(PROMPTS), 8 * ROWS, 8 * COLUMNS, 3)


def test_callback_interrupts_and_keeps_what_there_is(pipe):
    full = run(pipe, decoder="sequential").tokens
    stop = {"callback_on_step_end": lambda pipeline, step, details: step == 6}
    out = run(pipe, decoder="sequential", output_type="pil", **stop)
    assert out.interrupted
    assert out.images is None
    # Seven tokens are six codes and, behind the fourth, the end of the line.
    assert torch.equal(out.tokens[:, :6], full[:, :6])
    assert (out.tokens[:, 6:] == -1).all()
    assert (out.step_maps.flatten(1)[:, 6:] == -1).all()


def test_saved_and_loaded_is_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = SpeculativeImagePipeline.from_pretrained(tmp_path, dtype=torch.float64)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded).tokens, run(pipe).tokens)


def test_a_negative_prompt_is_unused_without_guidance(pipe):
    options = {"guidance_scale": 1.0}
    assert torch.equal(
        run(pipe, negative_prompt="lowres", **options).tokens, run(pipe, **options).tokens
    )


def test_the_size_is_that_of_the_processor_unless_asked_for(model):
    layout = Emu3Family(model).layout(None, None)
    assert (layout.rows, layout.columns, layout.num_tokens) == (90, 90, 90 * 91 + 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 20}, "height must be None or a multiple of 8 pixels, got 20"),
        ({"width": 0}, "width must be None or a multiple of 8 pixels, got 0"),
        ({"width": "32"}, "got '32'"),
        ({"height": None}, "has a context of 160"),
        ({"negative_prompt": 3}, "negative_prompt must be None, a string, or a list of 4 strings"),
        ({"negative_prompt": ["a"]}, r"one per prompt, got \['a'\]"),
        ({"negative_prompt": ["a", None, "a", "a"]}, "negative_prompt must be"),
        ({"negative_prompt": "a " * 150}, "has a context of 160"),
    ],
)
def test_bad_options_are_refused_before_any_forward(pipe, model, monkeypatch, options, message):
    def fail(*args, **kwargs):
        raise AssertionError("a forward ran before the arguments were checked")

    monkeypatch.setattr(model.model.text_model, "forward", fail)
    with pytest.raises(ValueError, match=message):
        run(pipe, **options)


def test_a_tokenizer_is_not_enough(model, processor):
    with pytest.raises(ValueError, match="Emu3 needs its Emu3Processor"):
        run(make_pipe(model, processor.tokenizer))


def test_a_vocabulary_without_codes_or_ends_is_refused(processor):
    model = tiny_emu3()
    names = model.vocabulary_mapping.vocab_map
    del names["<|image end|>"]
    with pytest.raises(ValueError, match=r"missing: <\|image end\|>"):
        make_pipe(model, processor)
