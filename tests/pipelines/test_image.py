"""The image pipeline and the Janus adapter, on a tiny random Janus of transformers' own class."""

import io

import numpy as np
import pytest
import torch
from saved import JANUS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import JanusConfig, JanusForConditionalGeneration, PreTrainedTokenizerFast

from mmspec.pipelines import SpeculativeImagePipeline, image_decoders
from mmspec.pipelines.image_decoders import DECODERS, DENOISE
from mmspec.tree import pack_chain
from mmspec.window_schedule import _MEMORIES

BOS, PAD, BOI = 1, 0, 2
WORDS = ["a", "pixel", "avatar", "with", "red", "blue", "hair", "and", "glasses"]
PROMPTS = ["a pixel avatar", "a pixel avatar with red hair and glasses", "blue"]


class ConstantDrafter:
    """Drafts one code everywhere: right now and then, and without a window of its own."""

    name = "constant"

    def __init__(self, *, target, rows, law, max_width, shared_noise):
        self.rows, self.vocab_size = rows, target.vocab_size

    def prefill(self):
        pass

    def propose(self, plan):
        tokens = torch.full((self.rows.num_rows, plan.width), 13)
        tokens[:, 0] = self.rows.roots_B()
        counts = [0 if done else plan.width - 1 for done in self.rows.host_done]
        return pack_chain(tokens, counts, self.vocab_size)

    def commit(self, proposal, scores, verdict, outcome):
        pass


class SeatedDrafter(ConstantDrafter):
    """One that may begin rows anew: it keeps nothing."""

    def admit(self, rows, verdict):
        pass


@pytest.fixture(scope="module")
def model() -> JanusForConditionalGeneration:
    torch.manual_seed(0)
    config = JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
            "initializer_range": 0.3,
        },
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
            "patch_size": 4, "projection_dim": 32, "num_image_tokens": 16, "mlp_ratio": 2,
        },
        vq_config={
            "embed_dim": 8, "num_embeddings": 24, "latent_channels": 8, "base_channels": 32,
            "channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 32,
            "num_patches": 4, "hidden_size": 32, "image_token_embed_dim": 32,
        },
    )  # fmt: skip
    model = JanusForConditionalGeneration(config).double().eval()
    model.generation_config.generation_kwargs = {"boi_token_id": BOI}
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    # Otherwise transformers rebuilds the generation config from the model's when it loads one.
    model.generation_config._from_model_config = False
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": PAD, "<bos>": BOS, "<boi>": BOI, "<unk>": 3}
    vocabulary |= {word: 4 + index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture
def pipe(model, tokenizer) -> SpeculativeImagePipeline:
    pipe = SpeculativeImagePipeline.from_model(model, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def tokens(pipe, prompt=PROMPTS, **options) -> torch.Tensor:
    count = 1 if isinstance(prompt, str) else len(prompt)
    options = {"generator": seeds(*range(count)), "output_type": "tokens"} | options
    return pipe(prompt, **options).tokens


@pytest.mark.supports("greedy", JANUS)
@pytest.mark.supports("processor", JANUS)
@pytest.mark.parametrize("guidance", [1.0, 3.0, 5.0])
def test_greedy_is_that_of_transformers(pipe, model, tokenizer, guidance):
    ours = tokens(pipe, guidance_scale=guidance, temperature=0.0, window=8)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[*tokenizer(prompt)["input_ids"], BOI]])
        # Below guidance 1 transformers doubles the batch and then trips over it, so a scale just
        # above 1 stands in for 1: with the same argmax at every step of this model.
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_mode="image",
            do_sample=False,
            guidance_scale=guidance if guidance > 1 else 1.0 + 1e-9,
        )
        assert ours[row].tolist() == theirs[0].tolist()


@pytest.mark.supports("sampled", JANUS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("window", [1, 2, 5, 8, 16, 64])
def test_exact_is_sequential_for_every_window(pipe, guidance, temperature, window):
    options = {"guidance_scale": guidance, "temperature": temperature, "top_k": 12}
    plain = tokens(pipe, decoder="sequential", **options)
    assert torch.equal(tokens(pipe, decoder="exact", window=window, **options), plain)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_chosen_window_moves_no_token(pipe, model, guidance):
    options = {"guidance_scale": guidance, "top_k": 12}
    plain = tokens(pipe, decoder="sequential", **options)
    for _ in range(3):  # the later calls begin with what the earlier ones found
        assert torch.equal(tokens(pipe, **options), plain)
    memories = _MEMORIES[model.model.language_model]
    kind = next(kind for kind in memories if kind[0] == guidance)
    assert memories[kind].widest > 1


@pytest.mark.parametrize("decoder", ["coupled", "sjd"])
def test_rules_that_keep_the_law_get_a_fixed_window(pipe, decoder):
    widths = []

    def note(pipeline, step, details):
        widths.append(details["record"].width)

    pipe(PROMPTS, decoder=decoder, generator=seeds(0, 1, 2), callback_on_step_end=note)
    assert widths[0] == 1
    assert widths[1] == 8
    assert widths == [1, *sorted(widths[1:], reverse=True)]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("decoder", ["exact", "coupled"])
def test_images_that_are_complete_are_not_fed(pipe, model, guidance, decoder):
    fed, active = [], []
    layer = model.model.language_model.layers[-1].mlp
    hook = layer.register_forward_hook(lambda _, args, out: fed.append(len(out)))

    def note(pipeline, step, details):
        active.append(sum(details["record"].was_active))

    options = {"guidance_scale": guidance, "decoder": decoder, "window": 8, "top_k": 3}
    batch = tokens(pipe, callback_on_step_end=note, **options)
    hook.remove()
    copies = 1 if guidance == 1 else 2
    assert fed == [copies * 3] + [copies * rows for rows in active[1:]]
    assert active[-1] < 3
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(batch[row], tokens(pipe, prompt, generator=seeds(row), **options)[0])


@pytest.mark.supports("batches", JANUS)
@pytest.mark.parametrize("decoder", sorted(set(DECODERS) - {DENOISE}))
def test_row_of_a_batch_is_its_single_run(pipe, decoder):
    batch = tokens(pipe, decoder=decoder, window=8)
    for row, prompt in enumerate(PROMPTS):
        single = tokens(pipe, prompt, decoder=decoder, window=8, generator=seeds(row))
        assert torch.equal(batch[row], single[0])


@pytest.mark.parametrize(
    ("lossy", "lossless"), [("lossy-grouped", "coupled"), ("lossy-rows", "exact")]
)
def test_lenience_zero_is_the_lossless_decoder(pipe, lossy, lossless, monkeypatch):
    with monkeypatch.context() as patch:
        # Lossy decoders do not mend, and other guesses are another lawful picture of `coupled`.
        patch.setattr(image_decoders, "LOSSY", (lossless,))
        wanted = tokens(pipe, decoder=lossless, window=16)
    assert torch.equal(tokens(pipe, decoder=lossy, window=16, lenience=0), wanted)
    assert not torch.equal(tokens(pipe, decoder=lossy, window=16, lenience=1), wanted)


def test_image_of_a_prompt_is_its_single_run(pipe):
    many = tokens(pipe, PROMPTS[0], num_images_per_prompt=3, generator=seeds(4, 5, 6))
    assert torch.equal(many[1], tokens(pipe, PROMPTS[0], generator=seeds(5))[0])
    assert not torch.equal(many[0], many[1])


def test_one_generator_serves_all_rows_reproducibly(pipe):
    first = tokens(pipe, generator=torch.Generator().manual_seed(9))
    assert torch.equal(first, tokens(pipe, generator=torch.Generator().manual_seed(9)))
    # The first row draws the first key, as a call for it alone would.
    alone = tokens(pipe, PROMPTS[0], generator=torch.Generator().manual_seed(9))
    assert torch.equal(first[0], alone[0])


def test_no_generator_is_the_global_one(pipe):
    torch.manual_seed(3)
    first = tokens(pipe, generator=None)
    torch.manual_seed(3)
    assert torch.equal(first, tokens(pipe, generator=None))


def test_output_types_and_step_maps(pipe):
    out = pipe(PROMPTS, generator=seeds(0, 1, 2), window=8)
    assert [image.size for image in out.images] == [(8, 8)] * 3
    assert out.step_maps.shape == (3, 4, 4)
    for row, step_map in enumerate(out.step_maps):
        steps = step_map.flatten()
        assert steps[0] == 0
        assert (steps.diff() >= 0).all()
        assert int(steps[-1]) + 1 == out.row_stats[row].num_target_forwards
    array = pipe(PROMPTS, generator=seeds(0, 1, 2), output_type="np").images
    tensor = pipe(PROMPTS, generator=seeds(0, 1, 2), output_type="pt").images
    assert array.shape == (3, 8, 8, 3)
    assert tensor.shape == (3, 3, 8, 8)
    assert array.min() >= 0
    assert array.max() <= 1
    assert np.allclose(array, tensor.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize(
    ("decoder", "guarantee"),
    [("sequential", "exact"), ("exact", "exact"), ("coupled", "distribution"),
     ("sjd", "distribution"), ("lossy-grouped", "lossy"), ("lossy-rows", "lossy")],
)  # fmt: skip
def test_guarantee_is_named(pipe, decoder, guarantee):
    assert pipe("a", decoder=decoder, output_type="tokens").stats.guarantee == guarantee


def test_callback_interrupts_and_keeps_what_there_is(pipe):
    full = tokens(pipe, PROMPTS[0], decoder="sequential")
    seen = []

    def stop_after_five(pipeline, step, details):
        seen.append((pipeline, step, details["record"].num_emitted))
        return step == 4

    out = pipe(
        PROMPTS[0],
        decoder="sequential",
        generator=seeds(0),
        callback_on_step_end=stop_after_five,
    )
    assert out.interrupted
    assert out.images is None
    assert [step for _, step, _ in seen] == [0, 1, 2, 3, 4]
    assert out.tokens[0, :5].tolist() == full[0, :5].tolist()
    assert (out.tokens[0, 5:] == -1).all()


def test_interrupt_method_stops_the_call(pipe):
    out = pipe(PROMPTS[0], callback_on_step_end=lambda pipeline, *_: pipeline.interrupt())
    assert out.interrupted


@pytest.mark.parametrize("is_inner", [True, False])
def test_of_calls_within_calls_one_is_interrupted(pipe, is_inner):
    whole, inner = tokens(pipe, PROMPTS[0]), []

    def press(pipeline, *_):
        pipeline.interrupt()

    def ask(pipeline, step, details):
        if step == 1:
            inner.append(pipeline(PROMPTS[1], callback_on_step_end=press if is_inner else None))
        elif step == 2 and not is_inner:
            pipeline.interrupt()

    out = pipe(PROMPTS[0], generator=seeds(0), callback_on_step_end=ask)
    assert (inner[0].interrupted, out.interrupted) == (is_inner, not is_inner)
    assert torch.equal(out.tokens, whole) == is_inner


def test_saved_and_loaded_is_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = SpeculativeImagePipeline.from_pretrained(tmp_path, dtype=torch.float64)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(tokens(loaded), tokens(pipe))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "jacobi"}, "drafter must be None or a function that makes one, got 'jacobi'"),
        ({"drafter": ConstantDrafter, "decoder": "sjd"}, "beside drafter= must be 'exact'"),
        ({"decoder": "magic"}, "unknown decoder 'magic'; known: sequential, exact"),
        ({"window": 0}, "window must be None or between 1 and 128, got 0"),
        ({"window": 129}, "got 129"),
        ({"lenience": 0.5}, "lenience is for lossy-grouped and lossy-rows only, got 0.5"),
        ({"lenience": 1.5, "decoder": "lossy-rows"}, "a number between 0 and 1, got 1.5"),
        ({"lenience": True, "decoder": "lossy-grouped"}, "between 0 and 1, got True"),
        ({"window": "8"}, "got '8'"),
        ({"window": True}, "got True"),
        ({"top_p": "a"}, "top_p must be"),
        ({"temperature": None}, "temperature must be a number >= 0, got None"),
        ({"temperature": -1.0}, "temperature must be a number >= 0, got -1.0"),
        ({"top_k": 0}, "top_k must be None or an integer >= 1, got 0"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"guidance_scale": -2.0}, "guidance_scale must be a finite number >= 0, got -2.0"),
        ({"guidance_scale": "a"}, "guidance_scale must be a finite number >= 0, got 'a'"),
        ({"guidance_scale": float("nan")}, "got nan"),
        ({"compile": "yes"}, "compile must be True or False, got 'yes'"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt must be an integer >= 1, got 1.5"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be an integer >= 1, got 0"),
        ({"generator": seeds(1)}, "a list of 1 for 3 rows"),
        ({"output_type": "gif"}, "output_type must be one of"),
        ({"negative_prompt": "blue"}, "negative_prompt is not supported by Janus"),
        ({"negative_prompt": "blue", "guidance_scale": 1.0}, "not supported by Janus"),
        ({"height": 8}, "Janus makes images of one size; .* got height=8, width=None"),
        ({"width": 8}, "Janus makes images of one size"),
        ({"callback_on_step_end": lambda: None}, "callback_on_step_end must take"),
    ],
)
def test_bad_options_are_refused_before_any_forward(pipe, model, monkeypatch, options, message):
    monkeypatch.setattr(model.model.language_model, "forward", _must_not_run)
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS, **options)


@pytest.mark.parametrize("prompt", ["", "  ", [], ["a", ""], [3]])
def test_bad_prompts_are_refused(pipe, prompt):
    with pytest.raises(ValueError, match="prompt"):
        pipe(prompt)


def test_prompt_longer_than_the_model_is_refused(pipe):
    with pytest.raises(ValueError, match="context of 64"):
        pipe("a " * 60)


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="nothing bundled is called"):
        SpeculativeImagePipeline.from_pretrained("bundled:nothing")


def test_a_model_of_another_family_is_refused(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=1)
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .* known: .*janus"):
        SpeculativeImagePipeline.from_model(llama, tokenizer)


@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_drafter_of_the_users_own_moves_no_token(pipe, window, guidance):
    options = {"guidance_scale": guidance, "top_k": 4, "output_type": "tokens"}
    plain = tokens(pipe, decoder="sequential", **options)
    out = pipe(PROMPTS, drafter=ConstantDrafter, window=window, generator=seeds(0, 1, 2), **options)
    assert torch.equal(out.tokens, plain)
    assert out.stats.num_accepted > 0
    given_on = tokens(pipe, drafter=SeatedDrafter, window=window, batch_size=2, **options)
    assert torch.equal(given_on, plain)
    with pytest.raises(ValueError, match=r"drafter must be one with admit\(\)"):
        tokens(pipe, drafter=ConstantDrafter, batch_size=2, **options)


def _must_not_run(*args, **kwargs):
    raise AssertionError("a forward ran before the arguments were checked")


def test_a_model_with_a_pixel_decoder_takes_no_other(model, tokenizer):
    with pytest.raises(ValueError, match="image_decoder must be None for JanusForConditional"):
        SpeculativeImagePipeline.from_model(model, tokenizer, image_decoder=abs)


@pytest.fixture(scope="module")
def avatars() -> SpeculativeImagePipeline:
    pipe = SpeculativeImagePipeline.from_pretrained("bundled:avatars")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_preview_shows_what_is_there_and_grey_for_the_rest(avatars):
    frames, known = [], []

    def look(pipeline, step, details):
        known.append([known[-1][row] + len(new) if known else len(new)
                      for row, new in enumerate(details["outcome"].new_units)])  # fmt: skip
        frames.append(details["preview"]())

    out = avatars(PROMPTS[:2], generator=seeds(1, 2), window=16, callback_on_step_end=look)
    for counts, pictures in zip(known, frames, strict=True):
        for row, (count, picture) in enumerate(zip(counts, pictures, strict=True)):
            # This model's decoder makes one pixel of each code, whatever is around it.
            pixels = np.asarray(picture).reshape(-1, 3)
            assert (pixels[:count] == np.asarray(out.images[row]).reshape(-1, 3)[:count]).all()
            assert (pixels[count:] == 128).all()
    assert len({counts[0] for counts in known}) > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "prompt 0 must be a non-empty string"),
        ({"prompt": "a " * 60}, "context of 64"),
        ({"height": 8}, "Janus makes images of one size"),
        ({"negative_prompt": "blue"}, "negative_prompt is not supported by Janus"),
    ],
)
def test_a_request_can_be_checked_without_a_call(pipe, model, monkeypatch, options, message):
    monkeypatch.setattr(model.model.language_model, "forward", _must_not_run)
    pipe.check_request(PROMPTS[0])
    with pytest.raises(ValueError, match=message):
        pipe.check_request(**({"prompt": PROMPTS[0]} | options))


def test_the_bar_counts_codes_and_shows_tau_and_forwards(pipe):
    written = io.StringIO()
    pipe.set_progress_bar_config(file=written, leave=True, mininterval=0)
    stats = pipe(PROMPTS, window=8, output_type="tokens").stats
    last = written.getvalue().split("\r")[-1]
    assert f"{stats.num_units}/{3 * 16} " in last
    assert f"tau {stats.tau:.2f}, {stats.num_target_forwards} forwards" in last
