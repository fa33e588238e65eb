"""The bundled reader, its drafter and the captioner: they read what they claim to read."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from mmspec.assets import bundled_path
from mmspec.assets.captioner.scoring import stated_attributes
from mmspec.assets.pages.rendering import held_out_pages, render_page
from mmspec.assets.pages.scoring import edit_distance, error_rate
from mmspec.pipelines import SpeculativeDocumentPipeline, SpeculativeVLMPipeline

#: The card has 1.4 % on 200 clean pages; so few pages may be a little worse than that.
MAX_CLEAN_CER = 0.03
MAX_WORN_CER = 0.04
NUM_READ = 3


def chat(instruction):
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]}]


def load(name, **options):
    pipe = SpeculativeVLMPipeline.from_pretrained(f"bundled:{name}", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def samples(name):
    folder = bundled_path(name) / "samples"
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        with Image.open(folder / row["file"]) as image:
            row["image"] = image.convert("RGB")
    return rows


@pytest.fixture(scope="module")
def reader():
    return load("pages", dtype=torch.float32)


@pytest.fixture(scope="module")
def pages():
    return samples("pages")


@pytest.fixture(scope="module")
def drafted(reader, pages):
    drafter = AutoModelForImageTextToText.from_pretrained(
        bundled_path("pages-drafter"), dtype=torch.float32
    ).eval()
    spec = {"name": "model", "model": drafter, "visual_tokens": "all"}
    images = [[page["image"]] for page in pages[:NUM_READ]]
    prompts = [chat("Convert to Markdown.")] * NUM_READ
    return reader(prompts, images=images, max_new_tokens=480, temperature=0.0, drafter=spec)


def test_pages_are_read(drafted, pages):
    truth = [page["markdown"] for page in pages[:NUM_READ]]
    assert error_rate(drafted.texts, truth) <= MAX_CLEAN_CER


@torch.no_grad()
def test_drafted_tokens_are_those_of_generate(reader, drafted, pages):
    text = reader.processor.apply_chat_template(
        chat("Convert to Markdown."), add_generation_prompt=True, tokenize=False
    )
    images = [[page["image"]] for page in pages[:NUM_READ]]
    inputs = reader.processor(text=[text] * NUM_READ, images=images, return_tensors="pt")
    plain = reader.model.generate(**inputs, max_new_tokens=480, do_sample=False)
    for row, tokens in zip(plain[:, inputs["input_ids"].shape[1] :], drafted.tokens, strict=True):
        assert tokens.tolist() == row[: len(tokens)].tolist()
        assert (row[len(tokens) :] == reader.tokenizer.pad_token_id).all()


def test_a_worn_page_is_read(reader, pages):
    """Blurred by 0.6 pixels, with noise of 15 of 255; the card has 1.9 % on 200 of them."""
    page = next(page for page in pages if page["blur"] and page["noise"])
    out = reader(chat("Convert to Markdown."), images=page["image"], max_new_tokens=480)
    assert error_rate(out.texts, [page["markdown"]]) <= MAX_WORN_CER


def test_the_readers_and_the_captioner_are_small():
    folders = [bundled_path(name) for name in ("pages", "pages-drafter", "captioner")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20


def test_the_drafter_saves_forwards(drafted):
    stats = drafted.stats
    assert stats.num_accepted > 0
    assert stats.num_target_forwards < max(len(tokens) for tokens in drafted.tokens)


def test_sample_pages_are_the_recipe_s(pages):
    known = held_out_pages()
    assert len(known) == len({row["markdown"] for row in known}) == 200
    for page in pages:
        drawn = render_page(
            page["markdown"], seed=page["seed"], blur=page["blur"], noise=page["noise"]
        )
        assert drawn.tobytes() == page["image"].tobytes()
        assert {"kind": page["kind"], "markdown": page["markdown"]} in known


def test_a_bundled_drafter_is_loaded_by_its_name(drafted):
    pipe = load("pages", dtype=torch.float32, drafter="bundled:pages-drafter")
    page = samples("pages")[0]["image"]
    out = pipe(chat("Convert to Markdown."), images=page, max_new_tokens=480)
    assert out.tokens[0].tolist() == drafted.tokens[0].tolist()
    assert out.stats.tau > 3
    pipe.to(torch.float64)
    assert pipe.drafter["model"].dtype == pipe.dtype == torch.float64
    blind = {"name": "model", "model": "bundled:pages-drafter"}
    document = SpeculativeDocumentPipeline.from_pretrained("bundled:pages", drafter=blind)
    assert document.drafter["model"].config.text_config.num_hidden_layers == 3
    assert "visual_tokens" not in document.drafter
    with pytest.raises(ValueError, match=r"nothing bundled is called 'nope'; known: .*pages"):
        load("pages", drafter="bundled:nope")


def test_a_tenth_of_the_visual_tokens_drafts_nearly_as_well_as_all(drafted, pages):
    """Self-drafting with all of them is accepted wholly: 5 drafts of 5, but for the page's end."""
    drafter = {"name": "model", "visual_tokens": "self:0.1"}
    prompt, image = chat("Convert to Markdown."), pages[0]["image"]
    pipe = load("pages", dtype=torch.float32, drafter=drafter, schedule="fixed")
    out = pipe(prompt, images=image, max_new_tokens=480, width=6)
    assert out.tokens[0].tolist() == drafted.tokens[0].tolist()
    assert out.stats.num_units / out.stats.num_target_forwards > 0.95 * 5.8


@pytest.mark.parametrize(
    ("markdown", "reason"),
    [("a\n" * 15, "15 rows, got 16"), ("x" * 32, "31 columns, got 32"), ("é", "ASCII only")],
)
def test_a_text_that_does_not_fit_is_refused(markdown, reason):
    with pytest.raises(ValueError, match=reason):
        render_page(markdown)


@pytest.mark.parametrize(("read", "distance"), [("abc", 0), ("", 3), ("xabc", 1), ("acb", 2)])
def test_edit_distance_counts_edits(read, distance):
    assert edit_distance(read, "abc") == edit_distance("abc", read) == distance


def test_avatars_are_captioned():
    rows = samples("captioner")
    out = load("captioner", dtype=torch.float32)(
        [chat("describe")] * len(rows), images=[[row["image"]] for row in rows], temperature=0.0
    )
    right = [
        stated_attributes(text) == row["attributes"]
        for text, row in zip(out.texts, rows, strict=True)
    ]
    assert sum(right) / len(right) >= 0.9
    assert all(stated_attributes(row["caption"]) == row["attributes"] for row in rows)
