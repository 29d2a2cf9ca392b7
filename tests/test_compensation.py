"""Compensation on whole models: it mends what earlier layers changed, resumes where it was, and changes nothing that it must not."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY
from tiny_pipeline import calibrated, compensated_with_stops
from transformers import AutoModelForCausalLM

from moesvd_core import compensation
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.streaming import DecoderStream, LayerStream
from moesvd_core.calibration import Statistics
from moesvd_core.checkpoint.apply import factored_modules
from moesvd_core.checkpoint.export import export_streamed
from moesvd_core.compensation import batches_of
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.decomposition.registry import METHODS
from moesvd_core.errors import RunError, StatisticsError
from moesvd_core.evaluation.hidden import final_hidden
from moesvd_core.experts import FactoredExperts
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import Plan, Recipe
from moesvd_core.progress import Progress

RECIPE = Recipe(method="auto", ratio=0.3, compensate=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def as_they_slide(pipeline: Pipeline) -> Pipeline:
    """The same with shared bases that are not refined."""
    return Pipeline(
        pipeline.stream, pipeline.statistics, methods={name: replace(each, alternate=False) for name, each in METHODS.items()}
    )


def fitted(pipeline: Pipeline, plan: Plan) -> Iterator[tuple[int, torch.Tensor]]:
    """Output matrices of every compressed layer."""
    for index in pipeline.layers:
        with pipeline.stream.layer(index):
            factors = pipeline.factors(plan, index)
            if factors is not None:
                yield index, factors.output.reconstruct()


def distance(pipeline: Pipeline, plan: Plan, stream: DecoderStream) -> float:
    """How far the last hidden states of the calibration text are from the original's."""
    windows = torch.cat(batches_of(pipeline.statistics.window_NL))
    off = final_hidden(pipeline.compressed(plan), windows).hidden_NLd - final_hidden(stream, windows).hidden_NLd
    return float(off.float().square().mean())


def test_what_leaves_the_last_layer_is_closer_to_the_original(tmp_path: Path) -> None:
    pipeline = as_they_slide(calibrated(tmp_path))  # what refined bases lessen is the loss, not this distance
    sliced, plan = pipeline.plan(Recipe(method="auto", ratio=0.3)), pipeline.plan(RECIPE)
    assert [layer.as_dict() for layer in sliced.layers] == [layer.as_dict() for layer in plan.layers]
    pipeline.compensate(plan)
    assert distance(pipeline, plan, pipeline.stream) < 0.95 * distance(pipeline, sliced, pipeline.stream)


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_can_be_compensated(name: str, tmp_path: Path) -> None:
    pipeline = calibrated(tmp_path, name, samples=8)
    reach = pipeline.max_ratio(RECIPE)
    plan = pipeline.plan(Recipe(method="fisher", ratio=0.5 * reach, compensate=True))
    original = {key: tensor.clone() for key, tensor in pipeline.stream.model.state_dict().items() if not tensor.is_meta}
    pipeline.compensate(plan)
    made = dict(fitted(pipeline, plan))
    assert made
    assert all(matrices.isfinite().all() for matrices in made.values())
    assert all(torch.equal(tensor, original[key]) for key, tensor in pipeline.stream.model.state_dict().items() if key in original)


@pytest.mark.parametrize("recipe", [RECIPE, Recipe(method="moe-svd", ratio=0.2, refit_router=True)])
@pytest.mark.parametrize("stream", ["original", "compressed"])
def test_names_the_stream_whose_hidden_states_are_not_finite(
    stream: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As float16 overflows leave them; not even one factor may be made from them."""
    pipeline = calibrated(tmp_path, samples=8)
    plan = pipeline.plan(recipe)
    plain, first = LayerStream.run_layer, pipeline.layers[min(pipeline.layers)]

    def run_layer(given: LayerStream, index: int, hidden: torch.Tensor, call: Any) -> torch.Tensor:
        after = plain(given, index, hidden, call)
        changed = isinstance(given.model.get_submodule(first.name), FactoredExperts)
        if index == first.index and changed == (stream == "compressed"):
            after[0, 5, 3] = torch.inf
        return after

    monkeypatch.setattr(LayerStream, "run_layer", run_layer)
    with pytest.raises(StatisticsError, match=f"layer 0: the hidden states of the {stream} stream after it are NaN or infinite"):
        pipeline.compensate(plan)


def test_names_the_expert_whose_answers_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = calibrated(tmp_path, samples=8)
    plan = pipeline.plan(RECIPE)
    pairs = compensation._pairs

    def far_off(*given: Any) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The original's inputs of an expert that it did not ask itself."""
        for expert, rows, p, x in pairs(*given):
            yield expert, rows, p, x * 1e38 if expert == 2 else x

    monkeypatch.setattr(compensation, "_pairs", far_off)
    with pytest.raises(StatisticsError, match="layer 0: the answers that expert 2 is to be fitted to are NaN or infinite"):
        pipeline.compensate(plan)


def inputs(pipeline: Pipeline, plan: Plan) -> dict[int, torch.Tensor]:
    """Input matrices of every compressed layer."""
    made = {}
    for index in pipeline.layers:
        with pipeline.stream.layer(index):
            factors = pipeline.factors(plan, index)
            if factors is not None:
                made[index] = factors.input.reconstruct()
    return made


def test_shared_bases_are_refined_and_exported(tmp_path: Path) -> None:
    pipeline = calibrated(tmp_path)
    recipe = Recipe(method="latent", ratio=0.3)
    sliced, plan = (pipeline.plan(replace(recipe, compensate=fit)) for fit in (False, True))
    pipeline.compensate(plan)
    unrefined = as_they_slide(pipeline)
    unrefined.compensate(plan)
    before, after = inputs(pipeline, sliced), inputs(pipeline, plan)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[index], after[index]) for index in before)
    kept = inputs(unrefined, plan)
    assert all(torch.equal(before[index], kept[index]) for index in before), "without it input sides stay as they are"

    def factors(layer: ExpertLayer) -> LayerFactors | None:
        return pipeline.factors(plan, layer.index)

    export_streamed(pipeline.stream, factors, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for module in factored_modules(model).values():
        index = module.expert_layer["index"]
        torch.testing.assert_close(module.input.matrices(), after[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["auto", "latent"])
def test_an_interrupted_compensation_goes_on_to_the_same_result(method: str, tmp_path: Path) -> None:
    whole = calibrated(tmp_path / "a", keep=tmp_path / "whole")
    plan = whole.plan(replace(RECIPE, method=method))
    whole.compensate(plan)
    expected = dict(fitted(whole, plan))

    pipeline = Pipeline(whole.stream, whole.statistics, tmp_path / "stopped")
    layers = compensated_with_stops(pipeline, plan)
    assert layers == [f"layer {index}" for index in range(len(layers))]  # none twice
    found = dict(fitted(pipeline, plan))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[index], expected[index]) for index in found)
    read, wanted = inputs(pipeline, plan), inputs(whole, plan)
    assert all(torch.equal(read[index], wanted[index]) for index in wanted)
    assert not list((tmp_path / "stopped" / "work").iterdir())
    again: list[Progress] = []
    pipeline.compensate(plan, again.append)
    assert not again


def test_a_plan_that_was_not_compensated_yet_says_so(tmp_path: Path) -> None:
    pipeline = calibrated(tmp_path, samples=4)
    plan = pipeline.plan(RECIPE)
    with pytest.raises(RunError, match=r"layer \d+ of the plan is not fitted yet: call `compensate` first"):
        list(fitted(pipeline, plan))


def test_statistics_keep_the_text_that_compensation_reads(tmp_path: Path) -> None:
    pipeline = calibrated(tmp_path, samples=4)
    pipeline.statistics.save(tmp_path / "kept")
    loaded = Statistics.load(tmp_path / "kept")
    assert torch.equal(loaded.window_NL, pipeline.statistics.window_NL)
    (tmp_path / "kept" / "windows.safetensors").unlink()
    old = Pipeline(pipeline.stream, Statistics.load(tmp_path / "kept"))
    with pytest.raises(StatisticsError, match="calibrate again"):
        old.compensate(old.plan(RECIPE))
