"""Where an output stands in a reference, and what is thought to follow."""

import pytest

from mmspec.drafters.alignment import Alignment, ReferenceText

TEXT = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen jugs, and "
    "then some more of the same sort.\nHow vexingly quick daft zebras jump over the fence today."
)


def follow(reference, output, num_characters=1):
    alignment = Alignment(ReferenceText(reference))
    alignment.extend(output)
    return alignment.continuations(num_characters)[0]


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 9, 17, 40, 80, 120])
def test_behind_a_prefix_comes_the_rest(cut):
    found = follow(TEXT, TEXT[:cut], 1000)
    assert found.text == TEXT[cut:]
    assert found.is_final
    assert found.match_length == min(cut, 32)


# Output so far -> what follows: the reference lacks, has too much, or has misread something.
RESYNCHRONISED = [
    ("# The quick", " brown"),
    ("The **quick** bro", "wn"),
    ("The quick red and brown", " fox"),
    ("The quick fox jumps", " over"),
    ("The quiek brovvn fox ju", "mps"),
    ("The quick brown f0x jumps", " over"),
    ("The quick brown fox, in a sentence of which the reference knows nothing, jumps", " over"),
    ("The quick brown fox jumps over the lazy dog. How vexingly", " quick"),
    ("How vexingly quick daft zebras jump over the", " fence"),
    ("over the fence today. The quick brown fox jumps over the", " lazy"),
    ("THE QUICK", " brown"),
    ("The quick brown fox jumps over the lazy dog.", " Pack"),
    ("The quick brown fox jumps over the lazy dog,", " Pack"),
    ("The quick brown fox jumps over the lazy dog. ", "Pack"),
]


@pytest.mark.parametrize(("output", "expected"), RESYNCHRONISED)
def test_the_pointer_finds_its_place_again(output, expected):
    assert follow(TEXT, output).text.startswith(expected)


def test_equal_words_are_told_apart_by_what_was_read_before():
    rows = "".join(f"row {number} is 0 0 0 and 0\n" for number in range(20))
    for number in (3, 7, 18):
        start = rows.index(f"row {number} ")
        alignment = Alignment(ReferenceText(rows))
        alignment.extend(rows[: start + 14])
        assert alignment.continuations(12)[0].text.startswith(rows[start + 14 :][:8])
        assert f"row {number + 1}" in alignment.continuations(14)[0].text


def test_what_stands_between_words_is_learned():
    table = "name\tage\nAnn\t31\nBob\t9\nEve\t47\nMax\t12\n"
    written = "| name | age |\n| --- | --- |\n| Ann | 31 |\n| Bob | 9 |\n"
    assert follow(table, written + "| Eve", 15).text == " | 47 |\n| Max | 12"
    reflowed = "one two\nthree four\nfive six\nseven eight"
    assert follow(reflowed, "one two three four five", 9).text == " six seven"


def test_letters_of_markup_are_none_of_the_text():
    alignment = Alignment(ReferenceText("alpha beta gamma delta epsilon"))
    for piece in ("alpha", "<loc_12>", "beta", "<td>", "gamma", "<brown_fox>"):
        alignment.extend(piece, is_markup=piece.startswith("<"))
    found = alignment.continuations(1)[0]
    assert found.text.endswith("delta")
    assert found.match_length == len("alpha beta gamma ")


def test_chances_are_those_of_the_words():
    reference = ReferenceText("good bad good", [(4, 0.9), (8, 0.2)], default=0.8)
    assert reference.confidences == [0.9, 0.2, 0.8]
    found = Alignment(reference).continuations(100)[0]
    assert [round(chance, 2) for _, chance in found.chances] == [1.0, 0.9, 1.0, 0.2, 1.0, 0.8, 1.0]
    assert found.chances[-1][0] == len(found.text)


@pytest.mark.parametrize("text", ["", " \n\t", "...", "\x00"])
def test_a_text_without_words_has_nothing_to_say(text):
    alignment = Alignment(ReferenceText(text))
    alignment.extend("some words, 3 of them")
    assert alignment.continuations(10)[0].text.strip() == text.strip(" \n\t")
