"""Routers that look for groups of experts first: what a method says it reaches is what such a model still runs with."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_batch, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from moesvd_core.architectures.streaming import MemoryStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.checkpoint.apply import compressed
from moesvd_core.errors import InputError
from moesvd_core.kept_router import enough_left
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import Plan, Recipe

torch.set_num_threads(1)
FAMILIES = {
    "deepseek_v3": "n_routed_experts", "glm4_moe": "n_routed_experts", "dots1": "n_routed_experts", "solar_open": "n_routed_experts",
    "nemotron_h": "n_routed_experts", "exaone_moe": "num_experts",
}
"""Those whose routers choose among groups by a bias, with the field that says how many experts there are."""
METHODS = ("expert-pruning", "expert-pruning-frequency")


def calibrated(model: PreTrainedModel, folder: Path) -> Pipeline:
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and runs away from the wolf " * 40, encoding="utf-8")
    stream = MemoryStream(model)
    return Pipeline(stream, calibrate(stream, tiny_tokenizer(), Calibration(dataset=str(text), samples=2, length=12)))


def run_with(pipeline: Pipeline, plan: Plan) -> torch.Tensor:
    layers = pipeline.stream.expert_layers
    factors = [(layer, found) for layer in layers if (found := pipeline.factors(plan, layer.index)) is not None]
    with torch.no_grad():
        return compressed(pipeline.stream.model, factors)(**tiny_batch()).logits


@pytest.mark.parametrize("shape", [(4, 2, 1), (8, 4, 2), (12, 3, 1)])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_ratio_up_to_the_largest_runs(name: str, shape: tuple[int, int, int], tmp_path: Path) -> None:
    experts, groups, chosen = shape
    model = tiny_model(name, **{FAMILIES[name]: experts}, n_group=groups, topk_group=chosen)
    pipeline = calibrated(model, tmp_path)
    assert {(layer.groups, layer.chosen_groups) for layer in pipeline.stream.expert_layers} == {(groups, chosen)}
    for method in METHODS:
        most = pipeline.max_ratio(Recipe(method=method))
        assert most > 0
        for part in (0.25, 0.5, 0.75, 1.0):
            assert run_with(pipeline, pipeline.plan(Recipe(method=method, ratio=part * most))).isfinite().all()
        with pytest.raises(InputError, match=rf"ratio must be in \[0, {int(1e4 * most) / 1e4:g}\] for {method} on this model"):
            pipeline.plan(Recipe(method=method, ratio=most + 0.001))


def test_a_router_that_cannot_rule_experts_out_lets_none_go(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v2", topk_method="group_limited_greedy", n_group=2, topk_group=1)
    pipeline = calibrated(model, tmp_path)
    assert pipeline.max_ratio(Recipe(method="expert-pruning")) == 0
    with pytest.raises(InputError, match=r"ratio must be in \[0, 0\] for expert-pruning .* got 0.1: .* choose another method"):
        pipeline.plan(Recipe(method="expert-pruning", ratio=0.1))
    assert pipeline.max_ratio(Recipe(method="neuron-pruning")) > 0.1


def test_one_expert_more_may_be_one_too_many() -> None:
    assert enough_left([1, 4, 5, 6, 7], experts=8, groups=2, chosen=1, active=3)  # of the first group none can be taken
    assert not enough_left([0, 1, 4, 5, 6, 7], experts=8, groups=2, chosen=1, active=3)
    assert enough_left([0, 1, 2], experts=8, groups=1, chosen=1, active=3)
