"""The support table says nothing that is not tested."""

import ast
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from saved import save_janus

import mmspec.pipelines
from mmspec.support import SUPPORT

ROOT = Path(__file__).resolve().parents[1]


def literal_keys(tree, name):
    """Keys of a dictionary that a module assigns to a name."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return {ast.literal_eval(key) for key in node.value.keys}
    return set()


@pytest.mark.parametrize("row", SUPPORT, ids=lambda row: row.class_name)
def test_row_names_what_exists(row):
    assert hasattr(transformers, row.class_name) or hasattr(diffusers, row.class_name)
    assert (ROOT / "mmspec" / "adapters" / f"{row.adapter}.py").exists()
    assert row.pipeline in {"speculate", *mmspec.pipelines.PIPELINES}


@pytest.mark.parametrize("row", SUPPORT, ids=lambda row: row.class_name)
def test_row_names_a_test_that_covers_it(row):
    file, _, test = row.test.partition("::")
    name, _, parameters = test.rstrip("]").partition("[")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    if parameters:
        family, _, num_rows = parameters.rpartition("-")
        assert num_rows == "1"
        assert family in literal_keys(tree, "FAMILIES")


def test_classes_are_listed_once():
    names = [row.class_name for row in SUPPORT]
    assert len(set(names)) == len(names)


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
