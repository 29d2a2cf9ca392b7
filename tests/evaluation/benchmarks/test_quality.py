"""The table compares what it says it compares: same text, counted bytes, the original beside every method."""

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from moesvd_core.calibration import Calibration
from moesvd_core.errors import InputError
from moesvd_core.evaluation.benchmarks.quality import QualityBenchmark
from moesvd_core.evaluation.benchmarks.table import Table

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("quality") / "model", fused=False)


def bench(folder: Path, **settings: object) -> Table:
    calibration = Calibration(samples=6, length=32, batch=3)
    return QualityBenchmark(str(folder), calibration=calibration, windows=4, length=24, **settings).run()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def table(folder: Path) -> Table:
    return bench(folder, ratios=(0.2, 0.3), methods=("auto", "svd", "svd-llm", "moe-svd-refit"))


def test_every_method_at_every_ratio_stands_beside_the_original(table: Table) -> None:
    original, *compressed = table.records
    assert (original["method"], original["ratio"], original["delta_nll"]) == ("original", None, None)
    assert [(row["method"], row["asked"]) for row in compressed] == [
        (name, ratio) for ratio in (0.2, 0.3) for name in ("auto", "svd", "svd-llm", "moe-svd-refit")
    ]


def test_bytes_follow_the_ratio_and_losses_the_perplexities(table: Table) -> None:
    original, *compressed = table.records
    for row in compressed:
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        assert numbers["ratio"] >= numbers["asked"]
        assert numbers["bytes"] == pytest.approx((1 - numbers["ratio"]) * float(original["bytes"] or 0), abs=4)
        ratio = numbers["perplexity"] / float(original["perplexity"] or 0)
        assert torch.log(torch.tensor(ratio)).item() == pytest.approx(numbers["delta_nll"], abs=1e-5)
        assert numbers["kl_mean"] > 0


def test_the_verdict_names_the_best_published_method_with_at_least_as_many_bytes(table: Table) -> None:
    verdicts = [note for note in table.notes if " times as much" in note]
    assert [note[:6] for note in verdicts] == ["at 20%", "at 30%"]
    compressed = [row for row in table.records if row["asked"] == 0.2 and row["method"] != "auto"]
    best = min(compressed, key=lambda row: float(row["delta_nll"] or 0))
    assert f"best published method ({best['method']})" in verdicts[0]
    assert f"{best['bytes']:,}" in verdicts[0]
    auto_bytes = int(verdicts[0].split(" with ")[1].split(" bytes")[0].replace(",", ""))
    assert auto_bytes <= int(best["bytes"] or 0)


def test_a_ratio_out_of_reach_is_a_row_not_an_end(folder: Path) -> None:
    table = bench(folder, ratios=(0.9,), methods=("svd",))
    assert table.records[1]["perplexity"] is None
    assert any("ratio must be in" in note for note in table.notes)


def test_refuses_names_that_are_not_there(folder: Path) -> None:
    with pytest.raises(InputError, match=r"method must be one of auto.*got 'best'"):
        QualityBenchmark(str(folder), methods=("best",))
    with pytest.raises(InputError, match="at least one ratio"):
        QualityBenchmark(str(folder), ratios=())
