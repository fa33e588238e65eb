"""`jacobi-denoise`: noise in the window moves no token, and belongs to the model's folder."""

import json

import pytest
import torch
from safetensors.torch import save_file
from saved import JANUS, save_janus

from mmspec.assets import bundled_path
from mmspec.denoiser import FILE_NAME, Denoiser, NoiseSchedule
from mmspec.drafters.denoise import DenoiseDrafter
from mmspec.pipelines import SpeculativeImagePipeline

PROMPTS = ["a pixel avatar", "a pixel avatar with red hair and glasses", "blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_janus(tmp_path_factory.mktemp("janus"), side=8)


@pytest.fixture(scope="module")
def pipe(folder) -> SpeculativeImagePipeline:
    pipe = SpeculativeImagePipeline.from_pretrained(folder, dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    pipe.denoiser = random_denoiser()
    return pipe


def random_denoiser(seed=0) -> Denoiser:
    torch.manual_seed(seed)
    denoiser = Denoiser(32, NoiseSchedule(num_steps=3))
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter)
    denoiser.measure(torch.randn(40, 32))
    return denoiser


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def make(pipe, prompts=PROMPTS, **options):
    options = {"generator": seeds(*range(len(prompts))), "output_type": "tokens"} | options
    return pipe(prompts, **options)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_is_sequential_for_every_window(pipe, guidance, temperature):
    options = {"guidance_scale": guidance, "temperature": temperature, "top_k": 5}
    plain = make(pipe, decoder="sequential", **options)
    for window in (1, 2, 5, 8, 33, 64, None):
        ours = make(pipe, decoder="jacobi-denoise", window=window, **options)
        assert torch.equal(ours.tokens, plain.tokens), window
        assert ours.stats.guarantee == "exact"


def test_no_schedule_and_no_noise_moves_a_token(pipe, monkeypatch):
    options = {"guidance_scale": 3.0, "top_k": 4, "window": 16}
    plain = make(pipe, decoder="sequential", **options | {"window": None})
    for seed in range(6):
        torch.manual_seed(seed)
        schedule = NoiseSchedule(
            num_steps=int(torch.randint(0, 9, ())),
            num_clean=int(torch.randint(0, 20, ())),
            sigma_max=float(2 + 50 * torch.rand(())),
            sigma_min=float(0.1 + torch.rand(())),
            rho=float(1 + 6 * torch.rand(())),
        )
        denoiser = random_denoiser(seed)
        denoiser.schedule = schedule
        monkeypatch.setattr(pipe, "denoiser", denoiser)
        ours = make(pipe, decoder="jacobi-denoise", **options)
        assert torch.equal(ours.tokens, plain.tokens), schedule
    # Nor do embeddings far off any that the model knows.
    with torch.no_grad():
        pipe.denoiser.mean_H.fill_(1e4)
    ours = make(pipe, decoder="jacobi-denoise", **options)
    assert torch.equal(ours.tokens, plain.tokens)


def test_rows_are_independent_and_complete_rows_are_not_fed(pipe):
    options = {"decoder": "jacobi-denoise", "window": 16, "top_k": 3, "guidance_scale": 3.0}
    fed, active = [], []
    layer = pipe.model.model.language_model.layers[-1].mlp
    hook = layer.register_forward_hook(lambda _, args, out: fed.append(len(out)))

    def note(pipeline, step, details):
        active.append(sum(details["record"].was_active))

    batch = make(pipe, callback_on_step_end=note, **options)
    hook.remove()
    assert fed == [2 * 3, *(2 * rows for rows in active[1:])]
    for row, prompt in enumerate(PROMPTS):
        single = make(pipe, [prompt], **options | {"generator": seeds(row)})
        assert torch.equal(batch.tokens[row], single.tokens[0])
        taken = batch.row_stats[row].num_target_forwards
        assert taken == single.row_stats[0].num_target_forwards


def test_drafts_end_at_the_first_noisy_position(pipe, monkeypatch):
    proposals = []
    propose = DenoiseDrafter.propose

    def spy(self, plan):
        proposals.append((propose(self, plan), len(self._rows.host_tokens[0]) - 1))
        return proposals[-1][0]

    monkeypatch.setattr(DenoiseDrafter, "propose", spy)
    monkeypatch.setattr(pipe.denoiser, "schedule", NoiseSchedule(num_steps=3, num_clean=2))
    make(pipe, [PROMPTS[0]], decoder="jacobi-denoise", window=8, top_k=2)
    wide = [(proposal, root) for proposal, root in proposals if proposal.width > 1]
    reached = []
    for proposal, root in wide:
        # Fed in three forwards before, or one of the two behind the root: that is a draft.
        num_fed = [sum(end >= root + depth for end in reached) for depth in range(proposal.width)]
        drafts = [depth for depth in range(1, proposal.width) if num_fed[depth] >= 3 or depth <= 2]
        assert proposal.valid_BN[0].tolist() == [
            depth in [0, *drafts] for depth in range(proposal.width)
        ]
        assert proposal.num_drafted == proposal.num_levels == (len(drafts),)
        reached.append(root + proposal.width - 1)
    assert wide[0][0].num_drafted == (2,)
    assert max(proposal.num_drafted[0] for proposal, _ in wide) > 2


def test_the_first_level_hides_the_guess_and_the_last_shows_it():
    denoiser = Denoiser(32, NoiseSchedule(num_steps=2, sigma_min=0.01, sigma_max=1000.0))
    clean, noise = torch.randn(2, 500, 32)
    high = denoiser(clean, noise, denoiser.schedule.sigmas()[1].expand(500))
    low = denoiser(clean, noise, denoiser.schedule.sigmas()[0].expand(500))
    torch.testing.assert_close(high, noise, atol=0.01, rtol=0)
    torch.testing.assert_close(low, clean, atol=0.1, rtol=0)


def test_levels_fall_from_the_first_forward_to_the_last():
    sigmas = NoiseSchedule(num_steps=5, sigma_min=0.5, sigma_max=80.0).sigmas()
    torch.testing.assert_close(sigmas[[0, -1]], torch.tensor([0.5, 80.0]))
    assert (sigmas.diff() > 0).all()
    assert NoiseSchedule(num_steps=1, sigma_max=9.0).sigmas().tolist() == pytest.approx([9.0])
    assert len(NoiseSchedule(num_steps=0).sigmas()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "num_steps must be an integer >= 0, got -1"),
        ({"num_clean": 1.5}, "num_clean must be an integer >= 0, got 1.5"),
        ({"sigma_min": 0.0}, "sigma_min must be a number > 0, got 0.0"),
        ({"sigma_max": 0.5}, "sigma_min must be at most sigma_max=0.5, got 1.0"),
        ({"rho": float("inf")}, "rho must be a number > 0, got inf"),
    ],
)
def test_bad_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**options)


def test_a_model_without_a_denoiser_is_refused(folder):
    plain = SpeculativeImagePipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"fine-tuned on noisy embeddings, with {FILE_NAME}"):
        plain("a", decoder="jacobi-denoise")


def test_the_folder_keeps_the_denoiser(pipe, tmp_path):
    pipe.denoiser.schedule = NoiseSchedule(num_steps=7, sigma_max=33.0)
    pipe.save_pretrained(tmp_path)
    loaded = SpeculativeImagePipeline.from_pretrained(tmp_path, dtype=torch.float64)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.denoiser.schedule == pipe.denoiser.schedule
    ours, theirs = pipe.denoiser.state_dict(), loaded.denoiser.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    options = {"decoder": "jacobi-denoise", "window": 16, "top_k": 4}
    again, before = make(loaded, **options), make(pipe, **options)
    assert torch.equal(again.tokens, before.tokens)
    assert again.stats.num_target_forwards == before.stats.num_target_forwards


def test_a_file_of_another_kind_is_refused(tmp_path):
    save_file({"mean_H": torch.zeros(3)}, tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match="holds no denoiser of mmspec"):
        Denoiser.load(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="holds no denoiser of mmspec"):
        Denoiser.load(tmp_path)


@pytest.mark.supports("trained weights", JANUS)
def test_the_bundled_model_denoises_and_stays_a_plain_janus():
    pipe = SpeculativeImagePipeline.from_pretrained("bundled:avatars-denoise")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.model).__name__ == "JanusForConditionalGeneration"
    options = {"window": 32, "guidance_scale": 1.0, "top_k": 20}
    prompt = ["a pixel avatar with red hair"]
    plain = make(pipe, prompt, decoder="sequential", **options | {"output_type": "np"})
    ours = make(pipe, prompt, decoder="jacobi-denoise", **options)
    assert torch.equal(ours.tokens, plain.tokens)
    assert ours.stats.num_target_forwards < 256 / 2
    # The codec came along unharmed: every pixel is a colour of the palette.
    table = json.loads((bundled_path("avatars") / "palette.json").read_text())
    colors = {tuple(bytes.fromhex(color)) for color in table["colors"]}
    pixels = (plain.images[0] * 255).round().astype(int).reshape(-1, 3)
    assert {tuple(pixel) for pixel in pixels.tolist()} <= colors
