"""Work that cannot fit is refused before it begins, by its figures."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import save_tiny
from tiny_runs import CALIBRATION, RECIPE, TEXT, analysed_tiny_run, do, tiny_run

from moesvd_core.architectures.inspect import inspect
from moesvd_core.decomposition.registry import METHODS
from moesvd_core.errors import ResourceError
from moesvd_core.runs.estimate import Estimate, estimate, require
from moesvd_core.runs.folder import RunFolder

NOTHING = Estimate(memory=1, run_disk=1, export_disk=1, flops=1)


def test_more_text_needs_more_disk_and_an_export_needs_its_bytes(tmp_path: Path) -> None:
    facts = inspect(save_tiny("mixtral", tmp_path / "model")).as_dict()
    small, large = estimate(facts, CALIBRATION), estimate(facts, replace(CALIBRATION, samples=60))
    assert large.run_disk > small.run_disk and large.flops == 10 * small.flops
    alone = estimate(facts, replace(CALIBRATION, drawn_labels=0))
    assert small.flops * 3 == alone.flops * 5, "a layer is run twice, and passed backwards once for each label"
    assert small.run_disk > alone.run_disk and small.memory > alone.memory
    halved = estimate(facts, replace(CALIBRATION, gradient_samples=CALIBRATION.samples // 2))
    assert halved.flops * 5 == small.flops * 3, "the other windows go forward once"
    assert alone.run_disk < halved.run_disk < small.run_disk and halved.memory == small.memory
    assert small.export_disk == 0
    assert estimate(facts, CALIBRATION, "factored").export_disk >= facts["bytes"]
    assert estimate(facts, CALIBRATION, "factored").run_disk == small.run_disk
    fitted = estimate(facts, CALIBRATION, "factored", fitted=True).run_disk - small.run_disk
    assert fitted > 4 * facts["expert_parameters"] // 2, "fitted factors are kept beside those that were sliced"
    assert all(value >= 0 for value in asdict(small).values())


@pytest.mark.parametrize("methods", [["auto"], list(METHODS)], ids=len)
def test_the_estimate_covers_what_a_run_writes(methods: list[str], tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    needed = estimate(inspect(tmp_path / "model-mixtral").as_dict(), CALIBRATION, methods=methods)
    assert do(run, "analyze", methods=methods, text=TEXT).state == "finished"
    files = list(run.path.rglob("*.safetensors"))
    headers = sum(int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in files)  # as large as what they describe, in tiny files
    written = sum(file.stat().st_size for file in files) - headers
    assert written <= needed.run_disk < 4 * written


def test_what_does_not_fit_is_refused_by_its_figures(tmp_path: Path) -> None:
    require(NOTHING, tmp_path, tmp_path / "out")
    with pytest.raises(ResourceError, match=r"not enough memory: about 1048576.00 GiB are needed and .* are free"):
        require(replace(NOTHING, memory=2**50), tmp_path, None)
    with pytest.raises(ResourceError, match=r"not enough disk at .*: about 1048576.00 GiB are needed"):
        require(replace(NOTHING, run_disk=2**50), tmp_path, None)
    with pytest.raises(ResourceError, match="not enough disk"):
        require(replace(NOTHING, export_disk=2**50), tmp_path, tmp_path / "not" / "there" / "yet")


def test_a_job_that_does_not_fit_fails_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    stages: list[str] = []
    job = do(tiny_run(tmp_path / "run"), "plan", lambda progress: stages.append(progress.stage), recipe=RECIPE)
    assert (job.state, job.error_kind) == ("failed", "ResourceError")
    assert set(stages) == {"inspect"}


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    torch.set_num_threads(1)
    return analysed_tiny_run(tmp_path_factory.mktemp("estimate") / "run")


@pytest.mark.parametrize("form", ["factored", "dense"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_an_export_is_what_its_plan_leaves_and_one_file_of_it_more(
    form: str, dtype: str | None, analysed: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = analysed.read_json("source.json")["facts"]
    job = do(analysed, "export", recipe=RECIPE, output=str(tmp_path / "out"), format=form, dtype=dtype)
    stored = job.result["bytes"]
    asked = {"ratio": RECIPE["ratio"], "dtype": dtype}
    monkeypatch.setattr("moesvd_core.runs.estimate.SHARD_SIZE", 1000)
    assert stored <= estimate(facts, CALIBRATION, form, **asked).export_disk - 1000 < 1.05 * stored
    monkeypatch.setattr("moesvd_core.runs.estimate.SHARD_SIZE", 10**12)
    assert 2 * stored <= estimate(facts, CALIBRATION, form, **asked).export_disk < 2.1 * stored


def test_a_model_of_half_numbers_is_twice_as_large_in_whole_ones() -> None:
    facts = {
        "bytes": 2_000_100, "parameters": 1_000_000, "expert_parameters": 900_000, "active_parameters": 300_000, "dtype": "bfloat16",
        "moe_layers": 2, "layers": 2, "experts": 4, "hidden": 8, "width": 8, "active": 2, "context_length": 64,
    }
    own, whole = (estimate(facts, CALIBRATION, "factored", ratio=0.25, dtype=dtype).export_disk for dtype in (None, "float32"))
    assert own == 2 * 1_500_100 and whole == 2 * 3_000_100
    eighths = {**facts, "dtype": "float8_e4m3fn", "bytes": 1_000_000}
    assert estimate(eighths, CALIBRATION, "dense", dtype="bfloat16").export_disk == 2 * 2_000_000


def test_what_a_run_has_is_not_demanded_again(analysed: RunFolder) -> None:
    facts = analysed.read_json("source.json")["facts"]
    new = estimate(facts, CALIBRATION)
    assert new.run_disk > 0 == estimate(facts, CALIBRATION, run=analysed.path).run_disk
    other = estimate(facts, CALIBRATION, methods=["svd"], run=analysed.path).run_disk
    assert other == estimate(facts, CALIBRATION, methods=["auto", "svd"]).run_disk - new.run_disk > 0
    measured = estimate(facts, CALIBRATION, tokens=100, run=analysed.path).run_disk
    assert measured == 2 * 100 * facts["hidden"] * 4, "last hidden states of the original and of what is made of it"


def test_memory_is_demanded_for_what_is_yet_to_be_done(analysed: RunFolder, tmp_path: Path) -> None:
    facts = analysed.read_json("source.json")["facts"]
    looked_at, written, calibrated = (
        estimate(facts, CALIBRATION, methods=methods, run=run).memory
        for methods, run in (((), None), (("auto",), analysed.path), (("auto",), None))
    )
    assert looked_at < written < calibrated
    decomposed = estimate(facts, CALIBRATION, methods=["svd"], run=analysed.path).memory
    fitted = estimate(facts, CALIBRATION, fitted=True, run=analysed.path).memory
    assert written < decomposed == fitted < calibrated, "without the gradients of a batch"


def test_a_model_that_cannot_be_calibrated_here_can_still_be_compared_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path / "run")
    facts = inspect(tmp_path / "model-mixtral").as_dict()
    needed, more = (estimate(facts, CALIBRATION, methods=methods).memory for methods in ((), ("auto",)))
    monkeypatch.setattr("moesvd_core.runs.estimate.free_memory", lambda: (needed + more) // 2)
    assert do(run, "evaluate", text=TEXT).state == "finished"
    assert do(run, "similarity", experts=2).state == "finished"
    assert do(run, "plan", recipe=RECIPE).error_kind == "ResourceError"


def test_a_calibration_or_decomposition_that_is_half_done_is_demanded_by_what_is_missing(analysed: RunFolder, tmp_path: Path) -> None:
    facts = analysed.read_json("source.json")["facts"]
    run = Path(shutil.copytree(analysed.path, tmp_path / "run"))
    layers = sorted((run / "factors").rglob("layer-*.safetensors"))
    layers[0].unlink()
    missing = estimate(facts, CALIBRATION, run=run).run_disk
    assert 0 < layers[1].stat().st_size < missing < estimate(facts, CALIBRATION).run_disk
    (run / "statistics" / "statistics.json").unlink()
    calibrated = sum(file.stat().st_size for file in (run / "statistics").rglob("*.safetensors"))
    twice = estimate(facts, CALIBRATION, methods=["auto", "svd"]).run_disk
    decomposed = twice - estimate(facts, CALIBRATION, methods=["svd"]).run_disk
    calibration = estimate(facts, CALIBRATION).run_disk - decomposed
    assert estimate(facts, CALIBRATION, run=run).run_disk == missing + calibration - calibrated


def disk(free: int) -> SimpleNamespace:
    return SimpleNamespace(free=free, total=0)


def test_earlier_exports_make_no_room_for_the_next_one(analysed: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.open(Path(shutil.copytree(analysed.path, tmp_path / "run")))
    (run.path / "exports" / "earlier").mkdir()
    with (run.path / "exports" / "earlier" / "model.safetensors").open("wb") as file:
        file.truncate(2**30)  # a hole
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk(1000))
    job = do(run, "export", recipe=RECIPE, output=str(run.path / "exports" / "next"))
    assert (job.state, job.error_kind) == ("failed", "ResourceError")
    assert "not enough disk" in job.error


def test_a_finished_run_exports_where_only_the_export_fits(analysed: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = analysed.read_json("source.json")["facts"]
    calibration = replace(CALIBRATION, samples=10**6)  # hidden states that nothing could hold
    needed = estimate(facts, calibration, "factored", ratio=0.2, run=analysed.path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk(needed.export_disk))
    require(needed, analysed.path, tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk(needed.export_disk - 1))
    with pytest.raises(ResourceError, match="not enough disk"):
        require(needed, analysed.path, tmp_path / "out")
