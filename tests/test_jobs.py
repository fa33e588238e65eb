import json
import re

import pytest

from mmspec.jobs import read_items
from mmspec.jobs.requests import read_requests
from mmspec.jobs.text import answered_ids

SETTINGS = {"model": "m", "seed": 0}


def test_items_of_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two words \n")
    items = read_items(path)
    assert [(i.id, i.index, i.prompt) for i in items] == [("1", 0, "one"), ("3", 1, "two words")]


def test_items_of_a_jsonl_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "hello"}]
    lines = [{"id": "a", "prompt": "x", "max_new_tokens": 3}, {"messages": chat}]
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second = read_items(path)
    assert (first.id, first.prompt, first.max_new_tokens) == ("a", "x", 3)
    assert (second.id, second.prompt, second.max_new_tokens) == ("2", chat, None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "has no prompts"),
        ('{"prompt": "a"', "line 1: not JSON"),
        ("[1]", "line 1: must be a JSON object"),
        ('{"prompt": ""}', "line 1: needs a non-empty"),
        ('{"prompt": "a", "max_new_tokens": "3"}', "line 1: 'max_new_tokens' must be null or an"),
        ('{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}', "the id '1' comes twice"),
    ],
)
def test_unusable_files_are_refused_with_the_line(tmp_path, content, reason):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        read_items(path)


def test_requests_of_images_take_what_they_do_not_say_from_the_options(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "x", "seed": 7, "negative_prompt": "", "height": None}, {"prompt": "y"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    shared = {"negative_prompt": "lowres", "height": 32, "width": 64, "seed": 1}
    own, rest = read_requests(path, shared)
    assert (own.seed, own.negative_prompt, own.size) == (7, "", (None, 64))
    assert (rest.seed, rest.negative_prompt, rest.size) == (1, "lowres", (32, 64))
    assert rest.where == f"{path}, line 2"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "negativ_prompt": "b"}', "line 2: field 'negativ_prompt'; known: prompt"),
        ('{"prompt": " "}', "line 2: 'prompt' must be a non-empty string, got ' '"),
        ('{"seed": 3}', "line 2 must be an object with a 'prompt'"),
        ('{"prompt": "a", "seed": 1.5}', "line 2: 'seed' must be an integer, got 1.5"),
        ('{"prompt": "a", "height": 0}', "line 2: 'height' must be null or an integer >= 1, got 0"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "field 'messages'"),
    ],
)
def test_unusable_requests_of_images_are_refused_with_the_line(tmp_path, line, reason):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "good"}\n' + line)
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_requests(path, {})


def test_a_half_written_last_line_is_cut_off(tmp_path):
    path = tmp_path / "out.jsonl"
    whole = json.dumps({"id": "é", "settings": SETTINGS}, ensure_ascii=False) + "\n"
    # The kill came in the middle of a character of two bytes.
    path.write_bytes((whole + '{"id": "é').encode()[:-1])
    assert answered_ids(path, SETTINGS) == {"é"}
    assert path.read_text(encoding="utf-8") == whole
    assert answered_ids(tmp_path / "none.jsonl", SETTINGS) == set()


def test_other_settings_are_refused_and_nothing_is_touched(tmp_path):
    path = tmp_path / "out.jsonl"
    content = json.dumps({"id": "a", "settings": SETTINGS | {"seed": 1}}) + '\n{"id'
    path.write_text(content)
    with pytest.raises(ValueError, match="line 1 was made with other settings"):
        answered_ids(path, SETTINGS)
    assert path.read_text() == content
