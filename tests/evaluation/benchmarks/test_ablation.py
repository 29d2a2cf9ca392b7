"""Leaving an ingredient out leaves out that one, and the table says what it costs."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny_models import EXPERTS, HIDDEN, WIDTH, save_tiny

from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.calibration.statistics import LayerStatistics
from moesvd_core.errors import InputError
from moesvd_core.evaluation.benchmarks import ablation, bench
from moesvd_core.evaluation.benchmarks.ablation import VARIANTS, AblationBenchmark
from moesvd_core.evaluation.benchmarks.figures import figures_of
from moesvd_core.evaluation.benchmarks.table import Table

torch.set_num_threads(1)
BLOCK = 8 * 4 * (HIDDEN + EXPERTS * 2 * WIDTH)
"""Bytes of the largest step that a plan can take: eight ranks of a layer's shared input basis, in float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("ablation") / "model", fused=False)


@pytest.fixture(scope="module")
def table(folder: Path) -> Table:
    calibration = Calibration(samples=6, length=32, batch=3)
    return AblationBenchmark(str(folder), calibration, windows=4, length=24, ratios=(0.3,), dtype=torch.float32).run()


def test_every_variant_is_another_model_of_the_same_size(table: Table) -> None:
    assert [row["variant"] for row in table.records] == [variant.name for variant in VARIANTS]
    sizes = [int(row["bytes"] or 0) for row in table.records]
    assert max(sizes) - min(sizes) <= BLOCK, "give or take a block of ranks, of which so small a model has few"
    losses = {row["variant"]: row["kl_mean"] for row in table.records}
    same = [name for name in losses if name != "auto" and losses[name] == losses["auto"]]
    same.remove("no common base")  # random experts have nothing in common
    assert same in ([], ["per-expert alone"], ["latent alone"]), "of the structures, one may win everywhere on so small a model"


def test_a_variant_is_held_against_the_one_that_lacks_nothing_else(table: Table) -> None:
    losses = {row["variant"]: float(row["delta_nll"] or 0) for row in table.records}
    for row in table.records:
        assert row["times its delta_nll"] == pytest.approx(losses[str(row["variant"])] / losses[str(row["beside"])])
    assert len(table.notes) == len(VARIANTS), "what it was measured on, and a sentence for each but the whole"


def test_what_a_variant_is_held_against_is_measured_with_it(folder: Path) -> None:
    settings = AblationBenchmark(str(folder), Calibration(samples=3, length=32), windows=2, length=24, ratios=(0.3,))
    made = AblationBenchmark(**{**vars(settings), "variants": ("uniform ranks, latent",)}).run()
    assert [row["variant"] for row in made.records] == ["auto", "latent alone", "uniform ranks, latent"]
    figure = figures_of("ablation", made)[0]
    assert figure.data[0]["y"] == ["uniform ranks, latent (beside latent alone)", "latent alone (beside auto)"]


def test_variants_that_do_not_touch_calibration_share_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated = []
    monkeypatch.setattr(bench, "calibrate", lambda *given, **more: calibrated.append(given[2]) or calibrate(*given, **more))
    variants = ("auto", "input metric", "no backward pass", "diagonal of the rows' Gram")
    AblationBenchmark(str(folder), Calibration(samples=3, length=32), windows=2, length=24, ratios=(0.3,), variants=variants).run()
    assert [each.gradient for each in calibrated] == [True, False]


def test_sums_that_variants_leave_out_are_there_to_be_left_out() -> None:
    names = {field.name for field in fields(LayerStatistics)}
    assert {name for variant in VARIANTS for name in variant.without} <= names
    known = {variant.name for variant in VARIANTS}
    assert {variant.beside for variant in VARIANTS} <= known


def test_what_lost_nothing_is_no_measure(folder: Path) -> None:
    settings = AblationBenchmark(str(folder), Calibration(samples=3, length=32), windows=2, length=24, ratios=(0.0,), variants=("auto",))
    (row,) = settings.run().records
    assert (row["delta_nll"], row["times its delta_nll"], row["times its kl_mean"]) == (0.0, None, None)


def test_refuses_variants_that_are_not_there(folder: Path) -> None:
    with pytest.raises(InputError, match=r"variant must be one of auto, .*input metric.*got 'luck'"):
        AblationBenchmark(str(folder), variants=("luck",))
    with pytest.raises(InputError, match=r"ratios must be numbers in \[0, 1\), .*got 1\.5"):
        AblationBenchmark(str(folder), ratios=(0.2, 1.5))
    with pytest.raises(InputError, match="seed must be a whole number of at least 0, got -1"):
        AblationBenchmark(str(folder), seeds=(-1,))
    assert ablation.WHOLE == VARIANTS[0].name
