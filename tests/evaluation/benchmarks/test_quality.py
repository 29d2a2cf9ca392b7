"""The table compares what it says it compares: same text, counted bytes, the original beside every method."""

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from moesvd_core.calibration import Calibration
from moesvd_core.errors import InputError
from moesvd_core.evaluation.benchmarks import bench as bench_module
from moesvd_core.evaluation.benchmarks.quality import QualityBenchmark
from moesvd_core.evaluation.benchmarks.table import Table
from moesvd_core.evaluation.hidden import final_hidden
from moesvd_core.progress import Progress

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
    heads = [f"at {percent}%, {figure}" for percent in (20, 30) for figure in ("log-perplexity", "KL")]
    assert [note.split(":")[0] for note in verdicts] == heads
    compressed = [row for row in table.records if row["asked"] == 0.2 and row["method"] != "auto"]
    for figure, verdict in zip(("delta_nll", "kl_mean"), verdicts, strict=False):
        best = min(compressed, key=lambda row: float(row[figure] or 0))
        assert f"the best published low-rank method ({best['method']})" in verdict
        assert f"{best['bytes']:,}" in verdict
        auto_bytes = int(verdict.split(" with ")[1].split(" bytes")[0].replace(",", ""))
        assert auto_bytes <= int(best["bytes"] or 0)


def test_the_verdict_says_whether_anything_loses_less(table: Table) -> None:
    for note in [note for note in table.notes if note.startswith("at 30%")]:
        figure = "kl_mean" if "KL" in note else "delta_nll"
        losses = {str(row["method"]): float(row[figure] or 0) for row in table.records if row["asked"] == 0.3}
        better = [name for name in losses if losses[name] < losses["auto"]]
        assert note.endswith("first of all 4") == (not better)
        assert all(f"{name} (" in note.split("behind")[1] for name in better)


def test_several_calibrations_give_a_mean_and_a_spread(folder: Path) -> None:
    table = bench(folder, ratios=(0.3,), methods=("svd-llm", "svd"), seeds=(0, 1))
    trained, plain = table.records[1:]
    each = [row for row in table.details["seeds"].records if row["method"] == "svd-llm"]
    assert [row["seed"] for row in each] == [0, 1]
    losses = [float(row["delta_nll"] or 0) for row in each]
    assert trained["delta_nll"] == pytest.approx(sum(losses) / 2)
    assert trained["delta_nll_spread"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    (verdict,) = [note for note in bench(folder, ratios=(0.3,), methods=("auto", "svd"), seeds=(0, 1)).notes if "log-perplexity" in note]
    assert "(svd)" in verdict and " ± 0.0000 with " in verdict
    assert plain["delta_nll_spread"] == 0, "looks at no text, so calibration cannot move it"
    assert "seeds 0, 1" in table.notes[0]


def test_measuring_again_at_a_rivals_bytes_is_told(folder: Path) -> None:
    """It takes as long as the measurements before, which end at all of theirs."""
    told: list[Progress] = []
    settings = QualityBenchmark(
        str(folder), calibration=Calibration(samples=6, length=32, batch=3), windows=2, length=24, ratios=(0.2, 0.3),
        methods=("auto", "svd"),
    )
    table = settings.run(told.append)
    compared = [progress for progress in told if progress.stage == "compare"]
    rows = {(row["method"], row["asked"]): int(row["bytes"] or 0) for row in table.records[1:]}
    again = [ratio for ratio in (0.2, 0.3) if rows["auto", ratio] > rows["svd", ratio]]
    assert again
    for ratio in again:
        assert any(f"auto again, at the bytes of svd at {ratio:.0%}, seed 0" in progress.message for progress in compared)
    assert (compared[-1].done, compared[-1].total) == (2, 2)


def test_an_interrupted_run_goes_on_without_measuring_anything_twice(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench(folder, ratios=(0.3,), methods=("svd-llm",), work=tmp_path)
    measured = []
    monkeypatch.setattr(bench_module, "final_hidden", lambda *given, **more: measured.append(0) or final_hidden(*given, **more))
    second = bench(folder, ratios=(0.3,), methods=("svd-llm", "svd"), work=tmp_path)
    assert second.records[:2] == first.records
    assert len(measured) == 2, "the original, and the method that is new"


def test_figures_of_another_engine_are_not_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench(folder, ratios=(0.3,), methods=("svd",), work=tmp_path)
    monkeypatch.setattr(bench_module, "engine_digest", lambda: "changed")
    bench(folder, ratios=(0.3,), methods=("svd",), work=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_ratio_out_of_reach_is_a_row_not_an_end(folder: Path) -> None:
    table = bench(folder, ratios=(0.9,), methods=("svd",))
    assert table.records[1]["perplexity"] is None
    assert any("ratio must be in" in note for note in table.notes)


def test_a_ratio_of_nothing_has_no_verdict(folder: Path) -> None:
    table = bench(folder, ratios=(0.0,), methods=("auto", "svd"))
    assert [row["delta_nll"] for row in table.records[1:]] == [0.0, 0.0]
    assert not [note for note in table.notes if "times as much" in note]


def test_windows_that_the_model_cannot_read_are_refused_before_the_original_is_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "final_hidden", lambda *_, **__: pytest.fail("the original was run"))
    with pytest.raises(InputError, match=r"length must be in \[2, 64\] tokens for this model, got 100"):
        QualityBenchmark(str(folder), calibration=Calibration(samples=2, length=100), windows=2, length=24).run()


def test_refuses_names_that_are_not_there(folder: Path) -> None:
    with pytest.raises(InputError, match=r"method must be one of auto.*got 'best'"):
        QualityBenchmark(str(folder), methods=("best",))
    with pytest.raises(InputError, match="at least one ratio"):
        QualityBenchmark(str(folder), ratios=())
    with pytest.raises(InputError, match="seeds must differ, got 1, 1"):
        QualityBenchmark(str(folder), seeds=(1, 1))
    with pytest.raises(InputError, match="seed must be a whole number of at least 0, got -1"):
        QualityBenchmark(str(folder), seeds=(0, -1))
