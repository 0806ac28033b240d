"""The source of every sample depends on the quotas, the seed and the sample's number alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel_megatron.config import UserError
from keel_megatron.data.blend import BLOCK, Blend, quotas, shares

WEIGHTS = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.01, 1.0), min_size=1, max_size=8)


@settings(deadline=None)
@given(WEIGHTS)
def test_quotas_are_the_weights_to_a_thousandth(weights: dict[str, float]) -> None:
    found = quotas(weights)
    assert sum(found.values()) == BLOCK
    total = sum(weights.values())
    for name, weight in weights.items():
        assert abs(found[name] / BLOCK - weight / total) < 1 / BLOCK
    assert quotas({name: 7 * weight for name, weight in weights.items()}) == found


def test_a_weight_too_small_for_a_sample_is_refused_with_the_least_that_is_enough() -> None:
    with pytest.raises(UserError, match=r"weight of b, 1e-05, .* of at least 0\.001") as caught:
        quotas({"a": 1.0, "b": 1e-5})
    assert str(caught.value).startswith("data.sources: ")
    assert quotas({"a": 1.0, "b": 1 / 999}) == {"a": 999, "b": 1}


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 2**40), st.lists(st.integers(0, 10 * BLOCK), max_size=20))
def test_a_sample_is_found_without_those_before_it(
    weights: dict[str, float], seed: int, samples: list[int]
) -> None:
    """Against counting from sample 0 on."""
    quota = list(quotas(weights).values())
    counting, counts, expected = Blend(quota, seed), Counter[int](), {}
    for sample in range(max(samples, default=0) + 1):
        source, _before = counting[sample]
        expected[sample] = (source, counts[source])
        counts[source] += 1
    there, back = Blend(quota, seed), Blend(quota, seed)
    assert sum(there.counts(len(expected))) == len(expected)
    assert there.counts(len(expected)) == [counts[source] for source in range(len(quota))]
    assert [there[sample] for sample in samples] == [expected[sample] for sample in samples]
    assert [back[s] for s in samples[::-1]] == [expected[s] for s in samples[::-1]]


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 100))
def test_every_block_has_its_quotas(weights: dict[str, float], block: int) -> None:
    quota = list(quotas(weights).values())
    blend = Blend(quota, 3)
    found = Counter(blend[block * BLOCK + place][0] for place in range(BLOCK))
    assert [found[source] for source in range(len(quota))] == quota


def test_the_order_depends_on_seed_and_block() -> None:
    def order(seed: int, block: int) -> list[int]:
        blend = Blend([700, 300], seed)
        return [blend[block * BLOCK + place][0] for place in range(BLOCK)]

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len(set(map(tuple, orders))) == 4
    # No source waits long: quotas are mixed within the block.
    assert all(45 < sum(found[:250]) < 105 for found in orders)


def test_one_source_is_left_in_its_order() -> None:
    blend = Blend([BLOCK], 5)
    assert [blend[sample] for sample in (0, 7, 12345)] == [(0, 0), (0, 7), (0, 12345)]


def test_shares_as_text() -> None:
    assert shares({"web": 700, "books": 300}, BLOCK) == "web 70.0%, books 30.0%"
