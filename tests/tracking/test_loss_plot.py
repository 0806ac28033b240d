"""The picture of a run."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from keel_megatron.config import UserError
from keel_megatron.tracking.loss_plot import plot_loss, smoothed
from keel_megatron.tracking.metrics import MetricsFile
from keel_megatron.tracking.records import ValidationRecord
from tests.tracking.samples import record


def write_run(folder: Path, losses: list[float], norm: float = 0.5) -> None:
    folder.mkdir()
    with MetricsFile(folder / "metrics.jsonl") as metrics:
        for step, loss in enumerate(losses, start=1):
            metrics.write(record(step, loss, grad_norm=norm))
        metrics.write(ValidationRecord(len(losses), losses[-1], 0, 512 * len(losses)))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *arguments: object, **options: object) -> None:
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_the_curves_are_the_records(tmp_path: Path, drawn: list[Figure]) -> None:
    losses = [8.0 - step / 50 for step in range(200)]
    write_run(tmp_path / "demo", losses)
    out = tmp_path / "loss.png"
    plot_loss(tmp_path / "demo", out, 6.236)
    assert imread(out).std() > 0.05, "not a blank picture"
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["loss.png"]
    top, bottom = drawn[0].axes
    each_step, mean, validation, entropy = top.lines
    assert list(each_step.get_ydata()) == losses
    assert each_step.get_xdata()[-1] == pytest.approx(200 * 0.512)
    assert bottom.get_xlabel() == "thousand tokens"
    assert mean.get_ydata() == pytest.approx(losses, abs=0.06)
    assert list(validation.get_ydata()) == losses[-1:]
    assert set(entropy.get_ydata()) == {6.236}
    words = {text.get_text() for text in top.texts}
    assert words == {
        "unigram entropy 6.236",
        "200 steps,  validation loss 4.020,  2.22 nats below the unigram entropy",
    }
    assert bottom.get_yscale() == "log"
    assert set(bottom.lines[0].get_ydata()) == {0.5}


@pytest.mark.parametrize(
    ("losses", "norm"),
    [([7.0], 0.0), ([7.0, math.nan], math.inf), ([7.0] * 60 + [math.nan] * 30, 1.0)],
)
def test_a_short_or_diverged_run_is_drawn_too(
    tmp_path: Path, losses: list[float], norm: float
) -> None:
    write_run(tmp_path / "odd", losses, norm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_loss(tmp_path / "odd", tmp_path / "loss.png", None)
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_no_steps_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl has no steps to draw"):
        plot_loss(tmp_path, tmp_path / "loss.png", None)


def test_the_mean_neither_lags_nor_hides_what_is_not_finite() -> None:
    ramp = [float(value) for value in range(100)]
    assert smoothed(ramp)[:98] == pytest.approx(ramp[:98])
    assert smoothed(ramp)[99] == pytest.approx(98.0)  # it looks back two
    means = smoothed([1.0, math.nan, 3.0, math.inf])
    assert [math.isfinite(mean) for mean in means] == [True, False, True, False]


@pytest.mark.security
def test_a_picture_follows_no_link(tmp_path: Path) -> None:
    run, thesis = tmp_path / "run", tmp_path / "thesis.txt"
    write_run(run, [3.0, 2.5])
    thesis.write_text("precious")
    for name in ("loss.png", "loss.png.partial"):
        (run / name).symlink_to(thesis)
    plot_loss(run, run / "loss.png", None)
    assert thesis.read_text() == "precious"
    assert (run / "loss.png").is_file()
    assert not (run / "loss.png").is_symlink()


@pytest.mark.security
def test_a_runs_name_is_no_formula(tmp_path: Path) -> None:
    run = tmp_path / r"a$\frac{$"
    write_run(run, [3.0, 2.5])
    plot_loss(run, tmp_path / "loss.png", None)
    assert (tmp_path / "loss.png").is_file()
