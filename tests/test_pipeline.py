"""What a pipeline keeps in its folder or in memory, what it reads for it, and when it makes that again."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_pipeline import StoppedError, calibrated
from torch import nn

from moesvd_core.architectures.streaming import LayerStream, MemoryStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.calibration.statistics import LayerFolder
from moesvd_core.curve_files import load_curves
from moesvd_core.decomposition.decompose import FORMAT, Decomposition, PackedDecomposition
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import Plan, Recipe
from moesvd_core.progress import Progress
from moesvd_core.tensor_files import facts_in, load_tensors, save_tensors


def test_a_decomposition_of_an_earlier_version_is_made_again(tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    pipeline = calibrated(tmp_path, samples=4, keep=keep)
    plan = pipeline.plan(Recipe("latent", 0.3))
    with pipeline.stream.layer(0):
        wanted = pipeline.factors(plan, 0)
    file = next(keep.glob("factors/*latent*/layer-000.safetensors"))
    tensors, facts = load_tensors(file)
    earlier = {name: tensor for name, tensor in tensors.items() if "dual" not in name}
    save_tensors(file, earlier, {**facts, "format": "moesvd-decomposition-1"})
    again = Pipeline(pipeline.stream, pipeline.statistics, keep)
    with again.stream.layer(0):
        made = again.factors(plan, 0)
    assert wanted is not None and made is not None
    assert torch.equal(wanted.input.reconstruct(), made.input.reconstruct())
    assert facts_in(file)["format"] == FORMAT


def test_curves_are_written_anew_with_their_factors_and_where_they_are_of_an_earlier_version(tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    pipeline = calibrated(tmp_path, samples=4, keep=keep)
    plan = pipeline.plan(Recipe("latent", 0.3))
    factors, curves = (next(keep.glob(f"{station}/*latent*/layer-000.safetensors")) for station in ("factors", "curves"))
    wanted = curves.read_bytes()
    tensors, facts = load_tensors(curves)
    other = {name: tensor + 1 if "loss" in name else tensor for name, tensor in tensors.items()}
    for form, again in ((facts["format"], False), ("moesvd-curves-0", True)):
        save_tensors(curves, other, {**facts, "format": form})
        assert (load_curves(curves) is None) == again
        if not again:  # it is of today's form: what shows that it is old is that its factors are
            made, about = load_tensors(factors)
            save_tensors(factors, made, {**about, "format": "moesvd-decomposition-1"})
        once_more = Pipeline(pipeline.stream, pipeline.statistics, keep)
        with once_more.stream.layer(0):
            once_more.factors(plan, 0)
        assert curves.read_bytes() == wanted
    save_tensors(curves, other, {**facts, "format": "moesvd-curves-0"})
    assert Pipeline(pipeline.stream, pipeline.statistics, keep).plan(Recipe("latent", 0.3)) == plan
    assert curves.read_bytes() == wanted


@pytest.mark.parametrize("kept", [True, False], ids=["in a folder", "in memory"])
def test_a_layer_and_its_statistics_are_read_once_for_all_structures(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = calibrated(tmp_path, samples=4).stream
    statistics = calibrate(stream, tiny_tokenizer(), Calibration(samples=4, length=24), folder=tmp_path / "statistics")
    pipeline = Pipeline(stream, statistics, tmp_path / "kept" if kept else None)
    pipeline.sensitivities  # noqa: B018 - reads them for itself
    read: Counter[str] = Counter()
    layer, get = LayerStream.layer, LayerFolder.__getitem__

    @contextmanager
    def counted(self: LayerStream, index: int) -> Iterator[nn.Module]:
        read[f"layer {index}"] += 1
        with layer(self, index) as module:
            yield module

    def counted_get(self: LayerFolder, index: int) -> Any:
        read[f"statistics {index}"] += 1
        return get(self, index)

    monkeypatch.setattr(LayerStream, "layer", counted)
    monkeypatch.setattr(LayerFolder, "__getitem__", counted_get)
    pipeline.plan(Recipe("auto", 0.2))
    assert set(read.values()) == {1}
    assert len(read) == 6


def all_factors(pipeline: Pipeline, plan: Plan) -> Iterator[LayerFactors]:
    """Those of every layer that has some."""
    for index in pipeline.layers:
        with pipeline.stream.layer(index):
            if (factors := pipeline.factors(plan, index)) is not None:
                yield factors


def test_of_a_model_that_is_read_in_turn_no_weights_stay_in_memory_and_factors_are_the_same(tmp_path: Path) -> None:
    streamed = calibrated(tmp_path, samples=8)
    loaded = Pipeline(MemoryStream(tiny_model("mixtral")), streamed.statistics)
    for method in ("auto", "moe-svd-refit", "neuron-pruning", "expert-pruning", "expert-merging", "d2-moe"):
        plan = streamed.plan(Recipe(method, 0.2))
        assert plan == loaded.plan(Recipe(method, 0.2))
        for mine, other in zip(all_factors(streamed, plan), all_factors(loaded, plan), strict=True):
            assert torch.equal(mine.input.reconstruct(), other.input.reconstruct())
            assert torch.equal(mine.output.reconstruct(), other.output.reconstruct())
    assert {type(kept) for kept in streamed.cache.values()} == {PackedDecomposition}
    assert {type(kept) for kept in loaded.cache.values()} == {Decomposition}


@pytest.mark.parametrize("recipe", [
    Recipe("svd-llm", 0.1, structure="kept-experts", metric="saliency"),
    Recipe("expert-pruning", 0.1, structure="per-expert", metric="input"),
    Recipe("auto", 0.1, structure="merged-experts", metric="plain", allocation="uniform"),
])  # fmt: skip
def test_what_can_be_planned_can_be_factored(recipe: Recipe, tmp_path: Path) -> None:
    pipeline = calibrated(tmp_path, samples=8)
    assert list(all_factors(pipeline, pipeline.plan(recipe)))


def test_hidden_states_of_a_compensation_that_was_given_up_go_with_the_next_one(tmp_path: Path) -> None:
    pipeline = calibrated(tmp_path, samples=8, keep=tmp_path / "kept")
    given_up, finished = (pipeline.plan(Recipe("latent", ratio, compensate=True)) for ratio in (0.2, 0.3))
    work = tmp_path / "kept" / "work"

    def stop(progress: Progress) -> None:
        if progress.stage == "compensate":
            raise StoppedError

    with pytest.raises(StoppedError):
        pipeline.compensate(given_up, stop)
    left = list(work.iterdir())
    assert len(left) == 1
    pipeline.compensate(finished)
    assert not list(work.iterdir())
    pipeline.compensate(given_up)  # starts from the text again, and keeps the layer that it had
    left[0].mkdir()  # as if it had ended right behind its last layer
    pipeline.compensate(given_up)
    assert not list(work.iterdir())
