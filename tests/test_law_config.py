"""What is not a law is refused with the rule and the value, whatever type it has."""

import re

import pytest
import torch

from mmspec.law_config import AllowedTokens, LawConfig
from mmspec.sampling import build_law

NAN, INF = float("nan"), float("inf")
REFUSED = {
    "temperature": [-0.1, NAN, INF, 10**400, None, "1", True, [1.0], 1j],
    "top_k": [0, -1, 2.0, "3", True, [3]],
    "top_p": [0.0, 1.1, NAN, "a", True, [0.5]],
    "min_p": [-0.1, 1.5, NAN, [], "a", False],
    "repetition_penalty": [0.0, -1.0, INF, NAN, None, "x", True],
    "presence_penalty": [NAN, -INF, None, "x", False],
    "bad_words": [5, None, "word", ["word"], ((),), ((3, -1),), ((1.5,),), ((True,),), (3,), {1}],
    "allowed": [3, (True, False)],
    "min_new_tokens": [-1, "2", 2.0, None, True],
    "eos_token_ids": [3, None, "3", (-1,), (1.5,), (True,), ((1,),)],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values]
)
def test_a_wrong_value_is_refused_by_name_rule_and_value(field, value):
    rule = rf"^{field} must be .+, got {re.escape(repr(value))}$"
    with pytest.raises(ValueError, match=rule):
        LawConfig(**{field: value})


def test_every_field_has_a_rule():
    assert list(REFUSED) == list(LawConfig.__dataclass_fields__)


def test_integers_and_lists_do_as_well_as_floats_and_tuples():
    config = LawConfig(
        temperature=2,
        top_k=3,
        top_p=1,
        min_p=1,
        repetition_penalty=2,
        presence_penalty=1,
        bad_words=[[1, 2], (3,)],
        eos_token_ids=[0],
        min_new_tokens=1,
    )
    assert len(build_law(config).stages) == 7


def test_a_class_that_forbids_everything_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        AllowedTokens(
            class_of_position_T=torch.zeros(3, dtype=torch.long),
            masks_CV=torch.tensor([[True, True], [False, False]]),
        )
