"""The table of supported models says what the tests say now, and nothing else."""

import json

import diffusers
import pytest
import supported
import torch
import transformers
from saved import JANUS, save_janus
from supported import DATA, PAGE, ROOT, SupportPlugin, page_of

import mmspec.pipelines
from mmspec.support import support_data, support_table

pytest_plugins = ["pytester"]
ROWS = support_data()["rows"]


def by_feature(rows, files):
    """(Class, feature) -> tests, those of the files only."""
    found = {
        (row["class_name"], feature): [t for t in tests if t.partition("::")[0] in files]
        for row in rows
        for feature, tests in row["features"].items()
    }
    return {key: tests for key, tests in found.items() if tests}


def test_the_table_is_what_the_tests_say(request):
    plugin = request.config.pluginmanager.get_plugin("support")
    named = {test.partition("::")[0] for test in supported.named_tests(ROWS)}
    assert [file for file in sorted(named) if not (ROOT / file).exists()] == []
    if any("::" in argument for argument in request.config.args):
        pytest.skip("single tests were asked for; whole files are compared")
    message = "run `make support`"
    assert by_feature(ROWS, plugin.files) == by_feature(plugin.rows, plugin.files), message
    facts = [{**row, "features": None} for row in plugin.rows]
    assert [row for row in facts if row not in [{**r, "features": None} for r in ROWS]] == [], (
        message
    )


def test_the_page_is_made_from_the_table():
    assert PAGE.read_text(encoding="utf-8") == page_of(json.loads(DATA.read_text(encoding="utf-8")))


@pytest.mark.parametrize("row", support_table(), ids=lambda row: row.class_name)
def test_row_names_what_exists(row):
    assert hasattr(transformers, row.class_name) or hasattr(diffusers, row.class_name)
    assert (ROOT / "mmspec" / "adapters" / f"{row.adapter}.py").exists()
    assert row.pipeline in {"speculate", *mmspec.pipelines.PIPELINES}
    is_video = row.pipeline == "SpeculativeVideoPipeline"
    needed = {"target pipeline"} if is_video else {"greedy", "batches"}
    assert needed <= set(row.features)


def test_classes_are_listed_once():
    names = [row.class_name for row in support_table()]
    assert len(set(names)) == len(names)


MARKED = """
import pytest
from supported import Supported

A, B = (Supported(family=n, class_name=n, adapter="x", pipeline="y") for n in "AB")

@pytest.mark.supports("greedy", {"a": A, "b": B})
@pytest.mark.parametrize("name", ["a", "b", "other"])
def test_one(name):
    assert name != "RIGHT"

@pytest.mark.supports("sampled", A)
def test_two():
    pass

def test_three():
    assert False
"""


def written(pytester, monkeypatch, source):
    """Exit code, and the table that a run of some tests wrote."""
    for name in ("DATA", "PAGE"):
        monkeypatch.setattr(supported, name, pytester.path / name)
    pytester.makeini("[pytest]\nmarkers = supports")
    pytester.makepyfile(test_it=source)
    result = pytester.inline_run("-m", "supports", plugins=[SupportPlugin(writes=True)])
    path = pytester.path / "DATA"
    return result.ret, json.loads(path.read_text())["rows"] if path.exists() else None


def test_a_run_writes_what_passed(pytester, monkeypatch):
    code, rows = written(pytester, monkeypatch, MARKED)
    assert code == 0
    assert {row["family"]: row["features"] for row in rows} == {
        "A": {"greedy": ["test_it.py::test_one[a]"], "sampled": ["test_it.py::test_two"]},
        "B": {"greedy": ["test_it.py::test_one[b]"]},
    }
    assert "| B | `B` | `x` | `y` | exact | greedy |" in (pytester.path / "PAGE").read_text()


@pytest.mark.parametrize(
    "change", [("RIGHT", "b"), ("    pass", "    pytest.skip()"), ("sampled", "magic")]
)
def test_a_run_with_a_failure_a_skip_or_an_unknown_feature_writes_nothing(
    pytester, monkeypatch, change
):
    code, rows = written(pytester, monkeypatch, MARKED.replace(*change))
    assert code != 0
    assert rows is None


@pytest.mark.supports("sampled", JANUS)
def test_image_model_keeps_its_tokens(tmp_path):
    pipe = mmspec.pipelines.SpeculativeImagePipeline.from_pretrained(
        save_janus(tmp_path), dtype=torch.float64
    )
    pipe.set_progress_bar_config(disable=True)
    for temperature in (0.0, 1.0):
        tokens = {
            decoder: pipe(
                ["a red hair", "a pixel avatar with glasses and hair"],
                decoder=decoder,
                window=8,
                temperature=temperature,
                generator=[torch.Generator().manual_seed(s) for s in range(2)],
                output_type="tokens",
            ).tokens
            for decoder in ("sequential", "exact")
        }
        assert torch.equal(tokens["sequential"], tokens["exact"]), temperature
