"""Neurons are stored with the pivots of the output side first wherever experts have rows of their own, and nothing else changes."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_factors import layer_factors, model_factors, side_factors
from tiny_models import TINY, save_tiny, tiny_batch, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.find import expert_layers
from moesvd_core.architectures.layout import ExpertLayer, RowOrder
from moesvd_core.checkpoint import apply
from moesvd_core.checkpoint import export as exporting
from moesvd_core.checkpoint.apply import changed, compressed, factored_modules
from moesvd_core.checkpoint.export import export, export_streamed
from moesvd_core.checkpoint.factored import layer_spec, layer_tensors
from moesvd_core.checkpoint.neuron_order import neuron_order
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.experts import FactoredExperts, Gate, swiglu

torch.set_num_threads(1)
EXPERTS, HIDDEN, WIDTH = 8, 16, 12
GATES: dict[RowOrder, Gate] = {
    "concatenated": swiglu,
    "interleaved": lambda pre_PN: torch.sigmoid(pre_PN[:, ::2]) * pre_PN[:, 1::2],
    "plain": torch.relu,
}
OWN_ROWS = ["dense", "equal", "ragged", "many-ranks", "latent", "pivoted", "pivoted-full"]
FAMILIES = ["mixtral", "gpt_oss", "nemotron_h"]
"""Rows concatenated, interleaved with biases and transposed matrices, plain."""


def random_layer(rows: RowOrder, biased: bool, forms: tuple[str, str]) -> tuple[ExpertLayer, LayerFactors]:
    layer = ExpertLayer(0, "experts", EXPERTS, HIDDEN, WIDTH, 2, rows=rows, biased=biased)
    noise = torch.Generator().manual_seed(0)
    input_END, output_EDM = (torch.randn(EXPERTS, *shape, generator=noise) for shape in ((layer.input_rows, HIDDEN), (HIDDEN, WIDTH)))
    biases = [torch.randn(EXPERTS, length, generator=noise) if biased else None for length in (layer.input_rows, HIDDEN)]
    return layer, LayerFactors(0, side_factors(forms[0], input_END), side_factors(forms[1], output_EDM, 1), *biases)


def stored(layer: ExpertLayer, factors: LayerFactors, order_EM: torch.Tensor | None) -> FactoredExperts:
    made = FactoredExperts(layer_spec(layer, factors), GATES[layer.rows])
    made.load_state_dict(dict(layer_tensors(layer, factors, torch.float32, order_EM)))
    return made


def pivots_first(module: torch.nn.Module) -> bool:
    pivots = {name: pivot_GR for name, pivot_GR in module.named_buffers() if "pivot" in name}
    assert pivots
    return all(torch.equal(each, torch.arange(each.shape[1]).expand_as(each)) for each in pivots.values())


@pytest.mark.parametrize("output_form", ["pivoted", "pivoted-equal", "pivoted-full"])
@pytest.mark.parametrize("input_form", OWN_ROWS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", GATES)
def test_pivots_come_first_and_answers_stay(rows: RowOrder, biased: bool, input_form: str, output_form: str) -> None:
    layer, factors = random_layer(rows, biased, (input_form, output_form))
    counted, ordered = stored(layer, factors, None), stored(layer, factors, neuron_order(factors))
    assert pivots_first(ordered.output) and not pivots_first(counted.output)
    assert ordered.output._order() is None and counted.output._order() is not None
    hidden_TD, weight_T2 = torch.randn(40, HIDDEN), torch.rand(40, 2)
    index_T2 = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(40)])
    dense = factors.multiplied_out()
    expected_TD = torch.zeros_like(hidden_TD)
    for token, (x_D, chosen, weights) in enumerate(zip(hidden_TD, index_T2.tolist(), weight_T2, strict=True)):
        for expert, weight in zip(chosen, weights, strict=True):
            pre_1N = x_D[None] @ dense.input_END[expert].T + (dense.input_bias_EN[expert] if biased else 0)
            y_1D = GATES[rows](pre_1N) @ dense.output_EDM[expert].T + (dense.output_bias_ED[expert] if biased else 0)
            expected_TD[token] += weight * y_1D[0]
    for each in (counted, ordered):
        assert torch.allclose(each(hidden_TD, index_T2, weight_T2), expected_TD, rtol=1e-4, atol=1e-4), "where gradients are recorded"
        with torch.no_grad():
            assert torch.allclose(each(hidden_TD, index_T2, weight_T2), expected_TD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", GATES)
def test_rows_go_where_their_neuron_goes(rows: RowOrder) -> None:
    layer, factors = random_layer(rows, False, ("dense", "pivoted"))
    order_EM = neuron_order(factors)
    neuron_N = layer.neuron_of_row()
    for order_M, row_N in zip(order_EM, layer.rows_in_order(order_EM), strict=True):
        assert torch.equal(neuron_N[row_N], order_M[neuron_N])
        if rows != "plain":
            up_N = torch.arange(layer.input_rows) % 2 if rows == "interleaved" else torch.arange(layer.input_rows) // WIDTH
            assert torch.equal(up_N[row_N], up_N), "gates stay gates"


def test_experts_without_pivots_keep_their_order() -> None:
    _, factors = random_layer("concatenated", False, ("dense", "pivoted"))
    order_EM = neuron_order(factors)
    for expert, rank in enumerate(factors.output.own.ranks):
        assert torch.equal(order_EM[expert], torch.arange(WIDTH)) == (rank <= 0)


@pytest.mark.parametrize("forms", [*((each, "pivoted") for each in ("summed", "groups", "base-delta", "merged")), ("pivoted", "ragged")])
def test_nothing_moves_where_experts_share_rows_or_nothing_has_pivots(forms: tuple[str, str]) -> None:
    _, factors = random_layer("concatenated", False, forms)
    assert neuron_order(factors) is None


@pytest.mark.parametrize("name", TINY)
def test_every_family_answers_as_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY[name]()
    layers = model_factors(model, forms=(("latent", "pivoted"), ("pivoted", "pivoted-equal"), ("ragged", "pivoted-full")))
    ordered = compressed(model, layers)
    monkeypatch.setattr(apply, "neuron_order", lambda factors: None)
    counted = compressed(model, layers)
    assert all(pivots_first(module.output) for module in factored_modules(ordered).values())
    assert not any(pivots_first(module.output) for module in factored_modules(counted).values())
    with torch.no_grad():
        assert torch.allclose(ordered(**tiny_batch()).logits, counted(**tiny_batch()).logits, rtol=1e-5, atol=1e-5)


def test_whoever_listens_between_the_sides_finds_neurons_as_they_are_counted() -> None:
    model = TINY["mixtral"]()
    layer = expert_layers(model)[0]
    factors = layer_factors(layer, read_experts(model.get_submodule(layer.name), layer), "latent", "pivoted-equal")
    with changed(model, layer, factors) as module:
        assert torch.allclose(module.input.matrices(), factors.input.reconstruct(), atol=1e-6)
        assert torch.allclose(module.output.matrices(), factors.output.reconstruct(), atol=1e-6)


def factors_of(name: str) -> dict[int, LayerFactors]:
    layers = model_factors(TINY[name](), forms=(("pivoted", "pivoted-equal"), ("latent", "pivoted")))
    return {layer.index: factors for layer, factors in layers}


def streamed(name: str, folder: Path) -> Path:
    found, source = factors_of(name), save_tiny(name, folder / "source")
    return export_streamed(ModelFiles.open(source), partial(_of, found), folder / "export").path


def _of(found: dict[int, LayerFactors], layer: ExpertLayer) -> LayerFactors:
    return found[layer.index]


def logits(of: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return of(**tiny_batch()).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_exports_hold_pivots_first_and_those_of_before_load_and_answer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY[name]()
    in_memory = compressed(model, [(layer, factors_of(name)[layer.index]) for layer in expert_layers(model)])
    new = streamed(name, tmp_path / "new")
    again = export(in_memory, tiny_tokenizer(), tmp_path / "again").path
    for module in (exporting, apply):
        monkeypatch.setattr(module, "neuron_order", lambda factors: None)
    old = streamed(name, tmp_path / "old")
    expected = logits(in_memory)
    for folder, first in ((new, True), (again, True), (old, False)):
        tensors = load_file(folder / "model.safetensors")
        pivots = [tensor for key, tensor in tensors.items() if "output.pivot" in key]
        assert pivots
        assert all(torch.equal(each, torch.arange(each.shape[1]).expand_as(each)) for each in pivots) == first
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.allclose(logits(loaded), expected, rtol=1e-5, atol=1e-5)
        assert all((module.output._order() is None) == first for module in factored_modules(loaded).values())
