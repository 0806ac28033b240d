"""State as JSON: it comes back as it was, and nothing else does."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keel_megatron.checkpoint.json_codec import from_json, to_json


def through_text(value: Any) -> Any:
    return from_json(json.loads(json.dumps(to_json(value))))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(), inner)
        | st.dictionaries(st.integers(), inner)
        | st.lists(inner).map(tuple)
    ),
    max_leaves=20,
)


@given(TREES)
def test_trees_come_back(value: Any) -> None:
    back = through_text(value)
    assert back == value
    assert repr(back) == repr(value)  # 1, 1.0 and True are equal, and -0.0 is 0.0


def test_every_generator_comes_back() -> None:
    random.seed(1)
    python = through_text(random.getstate())
    expected = random.random()
    random.setstate(python)
    assert random.random() == expected

    np.random.seed(1)
    np.random.normal()
    numpy = through_text(np.random.get_state(legacy=False))
    drawn = np.random.normal(size=3)
    np.random.set_state(numpy)
    assert (np.random.normal(size=3) == drawn).all()

    cpu = through_text({"a": torch.get_rng_state()})["a"]
    assert torch.equal(cpu, torch.get_rng_state())


def test_numbers_of_numpy_and_nan() -> None:
    assert through_text(np.float64(1 / 3)) == 1 / 3
    assert math.isnan(through_text(float("nan")))
    assert through_text(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("value", [object(), {1, 2}, print, np.array([print])])
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        to_json({"inner": [value]})


@pytest.mark.parametrize(
    "value",
    [
        {"$tensor": ["object", [1], "AAAA"]},
        {"$tensor": ["uint8", [5], "AAAA"]},
        {"$tensor": ["uint8", [3], "not base64"]},
        {"$array": ["object", [1], "AAAAAAAAAAA="]},
        {"$array": ["O", [1], "AAAAAAAAAAA="]},
        {"$tuple": 3},
        {"$pairs": [[[], 1]]},
    ],
)
def test_what_it_did_not_write_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not a valid"):
        from_json({"inner": [value]})
