"""Arguments that all pipelines share are refused with the rule and the value got."""

import re

import pytest

from mmspec.pipelines.base import as_list, check_guidance, check_positive, check_window


def test_good_values_pass():
    assert as_list("a") == as_list(["a"]) == as_list(iter(["a"])) == ["a"]
    check_positive("count", 1)
    for window in (None, 1, 128):
        check_window(window)
    for scale in (0, 1, 3.5):
        check_guidance(scale)


@pytest.mark.parametrize("prompt", [5, None, [], [""], " ", ["a", 5], [["a"]], {"a": 1}.values()])
def test_what_is_no_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="got "):
        as_list(prompt)


@pytest.mark.parametrize("value", [0, -1, 1.5, "1", True, None])
def test_what_is_no_count_is_refused(value):
    rule = f"count must be an integer >= 1, got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=rule):
        check_positive("count", value)


@pytest.mark.parametrize("value", [0, 129, "8", True, 8.0, [8]])
def test_what_is_no_window_is_refused(value):
    rule = f"window must be None or between 1 and 128, got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=rule):
        check_window(value)


@pytest.mark.parametrize("value", [-1, "a", None, float("nan"), float("inf"), True, [3.0]])
def test_what_is_no_guidance_scale_is_refused(value):
    rule = f"guidance_scale must be a finite number >= 0, got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=rule):
        check_guidance(value)
