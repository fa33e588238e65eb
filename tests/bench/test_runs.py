"""Each benchmark runs on tiny models, ends with its JSON line, resumes, and tells the truth."""

import json

import pytest
import typer
from typer.testing import CliRunner

from mmspec.assets import bundled_names
from mmspec.bench import core, image, text, written
from mmspec.bench.image_setups import load_image
from mmspec.bench.measure import check_final_line
from mmspec.bench.setups import load_text

TEXT = {"model": "tiny", "kinds": "edit,chat", "prompts": 2, "max_new_tokens": 8, "repeats": 1}
TEXT |= {"dtype": "float64", "batch": "1,2", "temperature": "0,1"}
IMAGE = {"model": "tiny-image", "dtype": "float64", "batch": "2", "guidance": "1,3", "prompts": 3}
IMAGE |= {"window": "8,auto", "quality": 2, "repeats": 1}

needs_captions = pytest.mark.skipif(
    "avatars" not in bundled_names(), reason="the captions come with the avatars"
)
# transformers' own early exit warns about arguments that it passes itself.
pytestmark = pytest.mark.filterwarnings("default")


def test_text(tmp_path, capsys):
    line = text.run(**TEXT, out=tmp_path)
    printed = capsys.readouterr().out.splitlines()
    check_final_line(line)
    assert json.loads(printed[-1]) == line
    assert printed.index("Ceiling: what a forward costs") < printed.index(
        "float64, temperature 0, batch 1"
    )
    rows = {
        (r["temperature"], r["batch"], r["kind"], r["system"]): r
        for r in line["rows"]
        if r["type"] == "row"
    }
    assert {key[3] for key in rows if key[1] == 1} == set(text.SYSTEMS)
    assert not {key[3] for key in rows if key[1] == 2} & set(text.SINGLE_ROW)
    for (temperature, _, _, system), row in rows.items():
        assert row["tau"] >= 1
        if system in text.OURS:
            assert row["equal_plain"] == 1
            assert row["guarantee"] == "exact"
        if temperature == 0 and system != "hf_early_exit":
            assert row["equal_generate"] == 1
    assert rows[0.0, 1, "all", "generate"]["num_forwards"] == 4 * 8
    assert rows[0.0, 1, "all", "generate"]["tau"] == 1
    assert rows[0.0, 1, "all", "hf_early_exit"]["num_shallow_forwards"] > 0
    assert line["failures"] == []

    # The same command has nothing left to do, and another filter looks at its own samples.
    samples = (tmp_path / "text.jsonl").read_text()
    again = text.run(**TEXT | {"batch": "1", "temperature": "0"}, out=tmp_path, minutes=0)
    assert (tmp_path / "text.jsonl").read_text() == samples
    assert {r["batch"] for r in again["rows"]} == {1}
    assert again["commands"] == [line["command"]]
    assert again["left_out"] == []
    [report] = tmp_path.glob("text_*.md")
    assert f"- commit: {again['git_sha']}" in report.read_text()


def test_text_says_what_the_time_did_not_allow(tmp_path):
    line = text.run(**TEXT | {"batch": "1", "prompts": 1}, out=tmp_path, minutes=0)
    assert line["left_out"] == [
        f"float64 T={heat} batch 1: 2 of 2 inputs not measured" for heat in (0, 1)
    ]


def test_prompts_that_do_not_fill_a_batch_are_named(tmp_path):
    options = TEXT | {"batch": "2", "prompts": 3, "kinds": "chat", "temperature": "0"}
    line = text.run(**options, systems="generate", out=tmp_path)
    assert line["left_out"] == [
        "float64 T=0 batch 2: chat inputs that do not fill a batch: chat-03"
    ]


def test_an_exact_output_that_differs_fails_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(written, "num_equal", lambda rows, others: 0)
    options = TEXT | {"batch": "1", "prompts": 1, "kinds": "chat", "temperature": "0"}
    with pytest.raises(typer.Exit) as stopped:
        text.run(**options, systems="generate,plain", out=tmp_path, json_only=True)
    assert stopped.value.exit_code == 1
    [line] = capsys.readouterr().out.splitlines()
    assert "plain equals generate in 0.0 % of the outputs only" in json.loads(line)["failures"][0]


@needs_captions
def test_image(tmp_path, capsys):
    line = image.run(**IMAGE, decoders="sequential,exact,coupled,sjd", out=tmp_path)
    check_final_line(line)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    rows = {(r["guidance"], r["system"]): r for r in line["rows"] if r["type"] == "row"}
    assert rows[3.0, "generate"]["num_forwards_per_call"] == 64
    assert rows[3.0, "sequential"]["num_forwards_per_call"] == 64
    assert rows[3.0, "exact_w8"]["equal_sequential"] == 1
    assert rows[3.0, "sjd_w8"]["guarantee"] == "distribution"
    assert rows[3.0, "sequential"]["mean_width"] == 1
    assert 1 < rows[3.0, "exact_w8"]["mean_width"] <= 8
    assert rows[1.0, "exact_w8"]["yardstick"] is None
    assert "float64 T=1 guidance 3 batch 2: 1 captions that do not fill a batch" in line["left_out"]
    assert "quality: nothing says what pictures of tiny-image show" in line["left_out"]

    chosen = {(r["guidance"], r["decoder"]): r for r in line["rows"] if r["type"] == "chosen"}
    assert set(chosen) == {(g, d) for g in (1.0, 3.0) for d in ("exact", "coupled", "sjd")}
    assert chosen[3.0, "exact"]["best_fixed"] == "exact_w8"
    # One call of two captions, which found nothing that an earlier call had left.
    assert chosen[3.0, "exact"]["of_best_first_median"] == chosen[3.0, "exact"]["of_best_median"]
    assert chosen[3.0, "exact"]["of_best_later_median"] is None


@needs_captions
def test_images_per_minute_by_batch_and_the_bytes_of_each_system(tmp_path):
    options = IMAGE | {"guidance": "3", "batch": "1,2", "prompts": 2, "window": "8,32"}
    line = image.run(**options, decoders="sequential,exact", memory=True, out=tmp_path)
    [report] = tmp_path.glob("image_*.md")
    assert "## Images per minute, float64, guidance 3" in report.read_text()
    memory = {(r["batch"], r["system"]): r for r in line["rows"] if r["type"] == "memory"}
    assert set(memory) == {
        (size, system)
        for size in (1, 2)
        for system in ("generate", "generate_dynamic", "sequential", "exact_w8", "exact_w32")
    }
    for row in memory.values():
        peak, kept, cache = (row[f"{n}_mib_per_image"] for n in ("peak", "kept", "cache"))
        assert peak >= kept >= cache > 0
    for size in (1, 2):
        narrow, wide = memory[size, "exact_w8"], memory[size, "exact_w32"]
        assert wide["kept_mib_per_image"] > narrow["kept_mib_per_image"]
        assert wide["kept_mib_per_image"] > memory[size, "sequential"]["kept_mib_per_image"]


@needs_captions
def test_calls_of_more_images_than_a_batch(tmp_path):
    options = IMAGE | {"guidance": "3", "prompts": 6, "window": "8", "quality": 0}
    options |= {"decoders": "sequential,exact", "out": tmp_path}
    line = image.run(**options, images_per_call=5)
    rows = {r["system"]: r for r in line["rows"] if r["type"] == "row"}
    assert {row["num_images"] for row in rows.values()} == {5}
    assert rows["generate"]["num_forwards_per_call"] == 3 * 64
    assert rows["generate"]["tau"] == rows["sequential"]["tau"] == 1
    assert rows["exact_w8"]["equal_sequential"] == rows["exact_w8_refill"]["equal_sequential"] == 1
    assert (
        rows["exact_w8_refill"]["num_forwards_per_call"] < rows["exact_w8"]["num_forwards_per_call"]
    )
    assert "sequential_refill" not in rows
    [report] = tmp_path.glob("image_*.md")
    assert "guidance 3, batch 2, 5 images per call" in report.read_text()
    assert line["left_out"] == [
        "float64 T=1 guidance 3 batch 2, 5 images per call: 1 captions that do not fill a batch"
    ]
    with pytest.raises(ValueError, match=r"--images-per-call must be 0 or more than a batch, 2"):
        image.run(**options, images_per_call=2)


@needs_captions
def test_greedy_images_are_those_of_generate(tmp_path):
    options = IMAGE | {"guidance": "3", "batch": "1", "prompts": 1, "window": "8"}
    line = image.run(**options, temperature=0.0, decoders="sequential,exact", out=tmp_path)
    rows = [r for r in line["rows"] if r["type"] == "row"]
    assert [r["equal_generate"] for r in rows] == [1.0] * 4


@needs_captions
def test_quality_alone_takes_every_caption(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image, "QUALITY_BATCH", 2)
    options = IMAGE | {"prompts": 0, "quality": 3, "decoders": "exact", "window": "8"}
    options |= {"model": "bundled:avatars", "dtype": "float32"}
    line = image.run(**options, quality_generate=True, out=tmp_path)
    assert {(r["type"], r["system"], r["num_images"]) for r in line["rows"]} == {
        ("quality", system, 3) for system in ("generate", "generate_dynamic", "exact_w16")
    }
    assert {r["model"] for r in line["rows"]} == {"avatars"}
    assert line["left_out"] == []
    samples = (tmp_path / "image.jsonl").read_text()
    assert image.run(**options, out=tmp_path, minutes=0)["left_out"] == []
    assert (tmp_path / "image.jsonl").read_text() == samples


@needs_captions
def test_core(tmp_path, capsys):
    options = {"model": "tiny,tiny-image", "dtype": "float64", "batch": "2", "repeats": 2}
    line = core.run(**options, pairs=3, max_new_tokens=8, out=tmp_path, label="x")
    check_final_line(line)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    loops = [r for r in line["rows"] if r["type"] == "loop"]
    assert [r["equal_generate"] for r in loops] == [1.0, None]
    for row in loops:
        assert row["num_pairs"] == 3
        low, high = row["speedup_quartiles"]
        assert low <= row["speedup_median"] <= high
        assert 0 < row["plain_forward_ms"] < row["plain_total_ms"]
        assert 0 < row["generate_outside_ms"] < row["generate_total_ms"]
    for row in (r for r in line["rows"] if r["type"] == "phases"):
        assert 0 < row["outside_share"] < 1
        assert row["us_per_step"]["forward"] > row["us_per_step"]["record"] > 0
    assert line["left_out"] == []


@pytest.mark.parametrize("module", [core, text, image])
def test_a_command_line_mounts_the_function(module):
    app = typer.Typer()
    app.command()(module.run)
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "--minutes" in result.output


def test_unknown_names_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="known: edit, structured, code, chat"):
        text.run(**TEXT | {"kinds": "poems"}, out=tmp_path)
    with pytest.raises(ValueError, match="a window must be a number above 0 or 'auto', got 'wide'"):
        image.run(**IMAGE | {"window": "wide"}, out=tmp_path)
    with pytest.raises(ValueError, match="unknown entry 'fast'"):
        text.run(**TEXT, systems="fast", out=tmp_path)
    with pytest.raises(ValueError, match="known: smollm2, tiny"):
        load_text("huge", "float32")
    with pytest.raises(ValueError, match="known: avatars, "):
        load_image("huge", "float32")
