"""Comparisons of experts in a run: made once a layer, continued after a kill, refused when damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from analysed_run import analysed_run
from run_helpers import new_run
from tiny_runs import do, tiny_run

from moesvd_core.errors import RunError
from moesvd_core.progress import Progress
from moesvd_core.runs import similarity
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.similarity import read_layer, read_summary
from moesvd_core.similarity import AXES, Sampling, compare


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    torch.set_num_threads(1)
    return analysed_run(tmp_path_factory.mktemp("runs"))


def test_pages_find_every_layer_with_its_controls(run: RunFolder) -> None:
    rows = read_summary(run)
    assert rows is not None
    assert [row["layer"] for row in rows] == [0, 1, 2]
    layer = read_layer(run, 1)
    assert layer is not None
    for side, shape in (("input", (48, 32)), ("output", (32, 24))):
        assert set(layer[side]) == {"experts", "shuffled", "random"}
        for found in layer[side].values():
            assert (found.rows, found.columns) == shape
            assert len(found.experts) == 3
        for axis in AXES:
            mean = rows[1][side]["experts"]["axes"][axis]["biased"]["mean"][0]
            assert mean == pytest.approx(layer[side]["experts"].axis(axis).biased_GP[0].mean(), abs=2e-5)
    assert layer["input"]["experts"].experts == Sampling(experts=3).draw(layer["input"]["experts"].total)


def test_a_run_that_was_not_compared_has_nothing_to_show(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert read_summary(run) is None
    assert read_layer(run, 0) is None


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, part = tiny_run(tmp_path / "whole"), tiny_run(tmp_path / "part")
    assert do(whole, "similarity").state == "finished"
    compared: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.stage == "similarity":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(part, "similarity", stop)
    assert read_summary(part) is None
    kept = (part.path / "evaluations" / "similarity.layer-000.json").read_bytes()
    own = similarity._compared

    def noted(run: RunFolder, stream: Any, layer: Any, sampling: Sampling) -> Any:
        compared.append(layer.index)
        return own(run, stream, layer, sampling)

    monkeypatch.setattr(similarity, "_compared", noted)
    assert do(part, "similarity").state == "finished"
    assert compared == [1, 2]
    for file in (whole.path / "evaluations").glob("similarity*"):
        assert (part.path / "evaluations" / file.name).read_bytes() == file.read_bytes()
    assert (part.path / "evaluations" / "similarity.layer-000.json").read_bytes() == kept
    assert do(part, "similarity", experts=2).state == "finished"
    assert compared == [1, 2, 0, 1, 2]
    assert len(read_layer(part, 0)["input"]["experts"].experts) == 2


def test_every_rank_that_experts_reach_has_a_control_of_its_own(tmp_path: Path) -> None:
    run, device = new_run(tmp_path), torch.device("cpu")
    matrix_ERC = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0))
    low_ERC = matrix_ERC.clone()
    low_ERC[:, :, 5:] = 0
    for each_ERC, file in ((matrix_ERC, "input-12x8x3.seed-0"), (low_ERC, "input-12x8x3.rank-5.seed-0")):
        own = compare(each_ERC, "input")["experts"]
        assert similarity._kept_random(run, own, Sampling()) is None
        assert similarity._random(run, own, Sampling(), device).ranks == own.ranks
        assert (run.path / "evaluations" / f"similarity.random.{file}.json").exists()


def test_means_beside_a_control_of_other_ranks_are_asked_for_again(tmp_path: Path) -> None:
    run = analysed_run(tmp_path)
    file = run.path / "evaluations" / "similarity.json"
    data = json.loads(file.read_text())
    data["layers"][1]["output"]["experts"]["ranks"] = [1, 2, 3]
    file.write_text(json.dumps(data))
    assert read_summary(run) is None


def test_the_demo_run_is_still_read() -> None:
    demo = RunFolder.open(Path(__file__).parents[2] / "assets" / "demo-run")
    rows = read_summary(demo)
    assert rows is not None
    for row in rows:
        layer = read_layer(demo, row["layer"])
        assert layer is not None
        assert all(layer[side]["random"].ranks == layer[side]["experts"].ranks for side in similarity.SIDES)


def test_bad_arguments_end_the_job_with_a_sentence(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    assert "at least 2, got 1" in do(run, "similarity", experts=1).error
    assert "no argument 'pairs': it has experts, seed" in do(run, "similarity", pairs=3).error


def test_a_damaged_comparison_is_named(run: RunFolder, tmp_path: Path) -> None:
    copy = analysed_run(tmp_path)
    folder = copy.path / "evaluations"
    data = json.loads((folder / "similarity.layer-001.json").read_text())
    del data["input"]["experts"]["ranks"]
    (folder / "similarity.layer-001.json").write_text(json.dumps(data))
    with pytest.raises(RunError, match=r"similarity.layer-001.json is damaged"):
        read_layer(copy, 1)
    next(folder.glob("similarity.random.output*")).unlink()
    assert read_layer(copy, 2) is None
