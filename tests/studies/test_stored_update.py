"""What a bf16 stream keeps of an update, beside numbers of independent simulations."""

from __future__ import annotations

import numpy as np
import pytest

from keel_megatron.studies.stored_update import kept_update


@pytest.mark.parametrize(
    ("alpha", "std", "lowest", "highest"),
    [
        (32, 1.0, 0.99, 1.0),
        (32, 0.1, 0.8, 0.9),
        (64, 1.0, 0.985, 0.995),
        (64, 0.1, 0.63, 0.76),
        (128, 1.0, 0.96, 0.98),
        (128, 0.1, 0.45, 0.6),
        (1024, 1.0, 0.5, 0.65),
        (1024, 0.1, 0.1, 0.25),
    ],
)
def test_cosines_are_those_of_other_simulations(
    alpha: float, std: float, lowest: float, highest: float
) -> None:
    assert lowest <= kept_update("bf16", alpha, std, tokens=64).cosine <= highest


def test_a_bf16_stream_against_numpy() -> None:
    """The same quantities from fp64 and rounding by whole numbers."""
    rng, alpha, std = np.random.default_rng(0), 256, 1.0

    def rounded(x):
        unit = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
        return np.rint(x / unit) * unit

    def normed(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True))

    x = rounded(normed(rng.standard_normal((256, 1024))))
    exact = normed(alpha * x + std * rng.standard_normal(x.shape))
    found, wanted = rounded(exact) - x, exact - x
    cosine = (found * wanted).sum(-1) / np.sqrt((found**2).sum(-1) * (wanted**2).sum(-1))
    kept = kept_update("bf16", alpha, std)
    assert kept.cosine == pytest.approx(cosine.mean(), abs=0.005)
    assert kept.unchanged == pytest.approx((found == 0).mean(), abs=0.005)
    assert kept.along == pytest.approx((found * wanted).sum() / (wanted**2).sum(), abs=0.01)


def test_norm_weights_off_1_turn_the_loss_into_noise() -> None:
    kept = kept_update("bf16", 1024, 0.1, weight_std=0.05, tokens=64)
    assert kept.along == pytest.approx(1.0, abs=0.1)
    assert kept.cosine < 0.25


def test_stochastic_rounding_keeps_the_mean_of_an_update_that_nearest_loses() -> None:
    nearest, random = (
        kept_update(mode, 1024, 0.1, tokens=64) for mode in ("bf16", "bf16_stochastic")
    )
    assert nearest.along < 0.1
    assert random.along == pytest.approx(1.0, abs=0.1)


def test_an_fp32_stream_keeps_everything() -> None:
    assert kept_update("fp32", 1024, 0.1, tokens=4).cosine == pytest.approx(1.0)
