"""Work that cannot fit is refused before it begins, by its figures."""

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import save_tiny
from tiny_runs import CALIBRATION, RECIPE, TEXT, do, tiny_run

from moesvd_core.architectures.inspect import inspect
from moesvd_core.decomposition.registry import METHODS
from moesvd_core.errors import ResourceError
from moesvd_core.runs.estimate import Estimate, estimate, require

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
