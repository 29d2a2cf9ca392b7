"""Experts that grew out of one: `auto` stores what they have in common once, and what each has of its own beside it, from plan to file."""

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny, tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from moesvd_core.architectures.find import expert_layers
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.streaming import LayerStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.checkpoint.export import export_streamed
from moesvd_core.decomposition.factors import BaseDeltaFactors, LayerFactors
from moesvd_core.decomposition.registry import METHODS, method
from moesvd_core.errors import InputError
from moesvd_core.pipeline import Pipeline, method_of, single_structures
from moesvd_core.planning import Recipe

RATIO = 0.4
OWN = 0.2
"""What every weight has of its own, beside the first expert's."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def upcycled(folder: Path) -> Path:
    """A tiny Mixtral whose experts are its first one, and a little of their own."""
    model = tiny_model("mixtral")
    with torch.no_grad():
        for layer in expert_layers(model):
            for weight_ENM in model.get_submodule(layer.name).parameters():
                weight_ENM.copy_(weight_ENM[:1] + OWN * weight_ENM)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def calibrated(source: Path, keep: Path) -> Pipeline:
    stream = LayerStream(source)
    return Pipeline(stream, calibrate(stream, tiny_tokenizer(), Calibration(samples=40, length=24, batch=8)), keep)


def test_auto_takes_a_base_where_experts_have_much_in_common_and_exports_it(tmp_path: Path) -> None:
    pipeline = calibrated(upcycled(tmp_path / "model"), tmp_path / "run")
    plan = pipeline.plan(Recipe(method="auto", ratio=RATIO, compensate=True))
    sides = [side for layer in plan.layers for side in (layer.input, layer.output)]
    assert all(side.structure == "base-delta" for side in sides)
    assert len({rank for side in sides for rank in side.ranks}) > 1, "each expert has a rank of its own"
    for rival in ("fisher", "latent"):
        assert plan.predicted_loss < 0.5 * pipeline.plan(Recipe(method=rival, ratio=RATIO)).predicted_loss
    pipeline.compensate(plan)

    def factors(layer: ExpertLayer) -> LayerFactors | None:
        return pipeline.factors(plan, layer.index)

    for layer in pipeline.layers.values():
        with pipeline.stream.layer(layer.index):
            made = factors(layer)
            assert made is not None and isinstance(made.output, BaseDeltaFactors)
            planned = next(each for each in plan.layers if each.layer == layer.index)
            assert (made.input.parameters, made.output.parameters) == (planned.input.parameters, planned.output.parameters)
    written = export_streamed(pipeline.stream, factors, tmp_path / "out")
    assert written.counts.parameters == plan.parameters
    batch, logits = tiny_batch(), []
    for path in ("model", "out"):
        with torch.no_grad():
            logits.append(AutoModelForCausalLM.from_pretrained(tmp_path / path, dtype=torch.float32)(**batch).logits)
    uniform = (logits[0] - logits[0].mean()).norm()
    assert (logits[0] - logits[1]).norm() < 0.2 * uniform


def test_where_they_have_nothing_in_common_no_base_is_made_and_none_is_looked_for_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = calibrated(save_tiny("mixtral", tmp_path / "model"), tmp_path / "run")
    curves = pipeline.curves(METHODS["auto"])
    assert {curve.structure for curve in curves} == {"pivoted", "latent"}
    again = Pipeline(pipeline.stream, pipeline.statistics, tmp_path / "run")
    monkeypatch.setattr(LayerStream, "layer", None)  # no layer is loaded
    assert len(again.curves(METHODS["auto"])) == len(curves)


def test_a_base_alone_is_asked_of_the_method_that_always_makes_one() -> None:
    with pytest.raises(InputError, match=r"base-delta is one of several for auto, .* name method d2-moe with metric output"):
        method_of(Recipe("auto", structure="base-delta", allocation="uniform"))
    made = method_of(Recipe("d2-moe", metric="output"))
    assert (made.metric, made.structures, made.screen) == ("output", ("base-delta",), False)


def test_the_screen_is_of_the_base_alone() -> None:
    assert [(each.structures, each.screen) for each in single_structures(method("auto"))] == [
        (("pivoted",), False), (("latent",), False), (("base-delta",), True),
    ]
    assert not method("d2-moe").screen
