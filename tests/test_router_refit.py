"""Refitted routers on whole models: they choose more like the original's, go into every export, and are off unless asked for."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TINY, tiny_batch
from tiny_pipeline import calibrated, compensated_with_stops
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesvd_core import api
from moesvd_core.architectures.disk_names import expert_tensor
from moesvd_core.architectures.families import family_of
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.router import router_input, router_step
from moesvd_core.architectures.streaming import DecoderStream, MemoryStream
from moesvd_core.checkpoint.apply import compressed
from moesvd_core.checkpoint.export import export, export_streamed
from moesvd_core.compensation import batches_of
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.errors import RunError, UnsupportedModelError
from moesvd_core.fitted import is_refitted
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import LayerPlan, Plan, Recipe, SidePlan
from moesvd_core.progress import Progress

RECIPE = Recipe(method="auto", ratio=0.3, refit_router=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def factors_of(pipeline: Pipeline, plan: Plan, layer: ExpertLayer) -> LayerFactors | None:
    with pipeline.stream.layer(layer.index):
        return pipeline.factors(plan, layer.index)


def routers(pipeline: Pipeline, plan: Plan) -> dict[int, Tensor]:
    """Matrices of the routers that were refitted."""
    made = {index: factors_of(pipeline, plan, layer) for index, layer in pipeline.layers.items()}
    return {index: each.router_EF for index, each in made.items() if each is not None and each.router_EF is not None}


@torch.no_grad()
def logits(stream: DecoderStream, pipeline: Pipeline) -> Iterator[tuple[int, Tensor]]:
    """What every router makes of the calibration text, by layer."""
    ids_NL = torch.cat(batches_of(pipeline.statistics.window_NL))
    hidden_NLD, calls = stream.embed({"input_ids": ids_NL})
    for index, call in enumerate(calls):
        with stream.layer(index):
            if index in pipeline.layers:
                step = router_step(stream.model, pipeline.layers[index])
                yield index, router_input(step, partial(stream.run_layer, index, hidden_NLD, call)) @ step.weight.T
            hidden_NLD = stream.run_layer(index, hidden_NLD, call)


@pytest.mark.parametrize("compensate", [False, True])
def test_logits_come_closer_to_the_original_s(compensate: bool, tmp_path: Path) -> None:
    pipeline = calibrated(tmp_path)
    plain, refitted = (pipeline.plan(replace(RECIPE, compensate=compensate, refit_router=chosen)) for chosen in (False, True))
    assert (plain.layers, plain.parameters, plain.bytes) == (refitted.layers, refitted.parameters, refitted.bytes)
    for plan in (plain, refitted):
        pipeline.compensate(plan)
    assert routers(pipeline, plain) == {}
    assert sorted(routers(pipeline, refitted)) == [1, 2], "not the first, whose input is the original's"
    wanted, off = dict(logits(pipeline.stream, pipeline)), {}
    for name, plan in (("plain", plain), ("refitted", refitted)):
        off[name] = {index: float((each - wanted[index]).square().mean()) for index, each in logits(pipeline.compressed(plan), pipeline)}
    assert off["refitted"][0] == off["plain"][0] == 0
    assert all(off["refitted"][index] < 0.97 * off["plain"][index] for index in (1, 2)), off


def test_experts_are_fitted_to_the_tokens_that_refitted_routers_send(tmp_path: Path) -> None:
    pipeline = calibrated(tmp_path)
    plans = [pipeline.plan(replace(RECIPE, compensate=True, refit_router=chosen)) for chosen in (False, True)]
    for plan in plans:
        pipeline.compensate(plan)
    first, second = ({index: factors_of(pipeline, plan, layer) for index, layer in pipeline.layers.items()} for plan in plans)
    assert torch.equal(first[0].output.reconstruct(), second[0].output.reconstruct())
    assert not torch.equal(first[1].output.reconstruct(), second[1].output.reconstruct())


def one_layer_cut(plan: Plan, index: int) -> Plan:
    """The plan with all other layers left dense."""
    dense = SidePlan("dense", (), 0, 0.0)
    layers = [layer if layer.layer == index else LayerPlan(layer.layer, False, "", dense, dense, 1) for layer in plan.layers]
    return replace(plan, layers=tuple(layers))


@pytest.mark.parametrize("keep", [False, True])
def test_layers_whose_experts_stay_are_refitted_behind_the_first_that_changes(keep: bool, tmp_path: Path) -> None:
    pipeline = calibrated(tmp_path, keep=tmp_path / "kept" if keep else None)
    plan = one_layer_cut(pipeline.plan(RECIPE), 1)
    assert [is_refitted(plan, index) for index in (0, 1, 2)] == [False, False, True]
    with pytest.raises(RunError, match="layer 2 of the plan is not fitted yet: call `compensate` first"):
        routers(pipeline, plan)
    pipeline.compensate(plan)
    assert list(routers(pipeline, plan)) == [2]
    whole = TINY["mixtral"]()
    found = [(layer, made) for layer in pipeline.layers.values() if (made := factors_of(pipeline, plan, layer)) is not None]
    assert [layer.index for layer, _ in found] == [1, 2]
    with torch.no_grad():
        expected = compressed(whole, found)(**tiny_batch()).logits
    made = export_streamed(pipeline.stream, partial(factors_of, pipeline, plan), tmp_path / "out")
    assert (made.counts.factored_layers, made.counts.refitted_routers) == (1, 1)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(**tiny_batch()).logits
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_is_written_and_loads_with_its_refitted_routers(name: str, tmp_path: Path) -> None:
    pipeline = calibrated(tmp_path, name, samples=8)
    recipe = Recipe(method="fisher", structure="per-expert", ratio=0.5 * pipeline.max_ratio(RECIPE), refit_router=True)
    plan = pipeline.plan(recipe)
    pipeline.compensate(plan)
    changed = routers(pipeline, plan)
    assert changed
    whole = TINY[name]()
    found = [(layer, made) for layer in pipeline.layers.values() if (made := factors_of(pipeline, plan, layer)) is not None]
    model = compressed(whole, found)
    with torch.no_grad():
        expected = model(**tiny_batch()).logits
    before, family = load_file(tmp_path / name / "model.safetensors"), family_of(whole.config)
    names = {pipeline.stream.key_of(router_step(whole, pipeline.layers[index]).name) for index in changed}
    for form in ("factored", "dense"):
        made = export_streamed(pipeline.stream, partial(factors_of, pipeline, plan), tmp_path / form, format=form)
        assert made.counts.refitted_routers == len(changed)
        loaded = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**tiny_batch()).logits, expected, atol=1e-5, rtol=1e-5)
        for index, router_EF in changed.items():
            assert torch.equal(router_step(loaded, pipeline.layers[index]).weight, router_EF)
            assert not torch.equal(router_step(whole, pipeline.layers[index]).weight, router_EF), "the original keeps its own"
        after = load_file(made.path / "model.safetensors")
        assert {key for key in before if not expert_tensor(key, family) and not torch.equal(before[key], after[key])} == names
        assert all(after[key].dtype == before[key].dtype for key in names)


@pytest.mark.parametrize("method", ["expert-pruning", "neuron-pruning", "expert-merging", "moe-svd"])
@pytest.mark.parametrize("form", ["factored", "dense"])
def test_rivals_can_be_refitted_too(method: str, form: str, tmp_path: Path) -> None:
    """Where experts were pruned, the refitted router chooses among those that are left."""
    pipeline = calibrated(tmp_path)
    share = 1.0 if method == "expert-pruning" else 0.4  # dense exports need as many experts everywhere
    plan = pipeline.plan(Recipe(method=method, ratio=share * pipeline.max_ratio(Recipe(method=method)), refit_router=True))
    pipeline.compensate(plan)
    assert sorted(routers(pipeline, plan))[-1:] == [2]
    found = [(layer, made) for layer in pipeline.layers.values() if (made := factors_of(pipeline, plan, layer)) is not None]
    with torch.no_grad():
        expected = compressed(TINY["mixtral"](), found)(**tiny_batch()).logits
    made = export_streamed(pipeline.stream, partial(factors_of, pipeline, plan), tmp_path / "out", format=form)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)(**tiny_batch()).logits
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_router_is_written_in_the_number_format_of_the_others(dtype: torch.dtype, tmp_path: Path) -> None:
    pipeline = calibrated(tmp_path)
    plan = pipeline.plan(RECIPE)
    pipeline.compensate(plan)
    made = export_streamed(pipeline.stream.files, partial(factors_of, pipeline, plan), tmp_path / "out", dtype=dtype)
    written = load_file(made.path / "model.safetensors")["model.layers.1.block_sparse_moe.gate.weight"]
    assert torch.equal(written, routers(pipeline, plan)[1].to(dtype))


@pytest.mark.parametrize("form", ["factored", "dense"])
def test_a_model_in_memory_is_written_with_them_and_says_so(form: str, tmp_path: Path) -> None:
    whole = TINY["mixtral"]()
    pipeline = calibrated(tmp_path)
    plan = pipeline.plan(RECIPE)
    made = export(api.compress(whole, pipeline.statistics, plan), None, tmp_path / "out", format=form)
    assert made.counts.refitted_routers == 2
    card = (made.path / "README.md").read_text("utf-8")
    assert "2 routers were refitted to what the layers before them have changed; all other routers, shared experts" in card
    loaded = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32).eval()
    if form == "factored":
        assert loaded.config.quantization_config.refitted_routers == [1, 2]
        assert export(loaded, None, tmp_path / "again").counts.refitted_routers == 2
    layer = MemoryStream(whole).expert_layers[1]
    assert not torch.equal(router_step(loaded, layer).weight, router_step(whole, layer).weight)


def test_routers_that_stay_are_the_original_s_on_the_card(tmp_path: Path) -> None:
    pipeline = calibrated(tmp_path, samples=4)
    plan = pipeline.plan(replace(RECIPE, refit_router=False))
    made = export_streamed(pipeline.stream, partial(factors_of, pipeline, plan), tmp_path / "out")
    assert made.counts.refitted_routers == 0
    card = (made.path / "README.md").read_text("utf-8")
    assert "(factored format); routers, shared experts, attention and everything else are those of the original, bit for bit." in card


@pytest.mark.parametrize("compensate", [False, True])
def test_an_interrupted_refit_goes_on_to_the_same_result(compensate: bool, tmp_path: Path) -> None:
    whole = calibrated(tmp_path / "a", keep=tmp_path / "whole")
    plan = whole.plan(replace(RECIPE, compensate=compensate))
    whole.compensate(plan)
    expected = routers(whole, plan)
    pipeline = Pipeline(whole.stream, whole.statistics, tmp_path / "stopped")
    layers = compensated_with_stops(pipeline, plan)
    assert layers == [f"layer {index}" for index in range(3)]  # none twice
    for found in (routers(pipeline, plan), routers(Pipeline(whole.stream, whole.statistics, tmp_path / "stopped"), plan)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[index], expected[index]) for index in expected)
    again: list[Progress] = []
    pipeline.compensate(plan, again.append)
    assert not again


def test_a_damaged_router_is_noticed(tmp_path: Path) -> None:
    pipeline = calibrated(tmp_path / "a", keep=tmp_path / "kept")
    plan = pipeline.plan(RECIPE)
    pipeline.compensate(plan)
    file = next((tmp_path / "kept" / "factors").glob("compensated-*/layer-002.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-7] + bytes([content[-7] ^ 4]) + content[-6:])
    with pytest.raises(RunError, match=r"layer-002\.safetensors is damaged \(its content does not match its digest\): delete it"):
        routers(pipeline, plan)


def test_a_router_that_cannot_be_refitted_is_told(tmp_path: Path) -> None:
    pipeline = calibrated(tmp_path, samples=4)
    plan = pipeline.plan(RECIPE)
    pipeline.stream.model.get_submodule("model.layers.1.mlp.gate").other = torch.nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(UnsupportedModelError, match="to be refitted, got 2: leave refit_router out"):
        pipeline.compensate(plan)
