"""Pruned experts are gone: the model answers as the one whose router and experts were cut, in every family."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_factors import kept_factors
from tiny_models import EXPERTS, TINY, save_tiny, tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.families import family_of
from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.find import expert_layers
from moesvd_core.checkpoint.apply import compressed, factored_modules, replaced
from moesvd_core.checkpoint.export import export, export_streamed
from moesvd_core.checkpoint.factored import layer_spec, layer_tensors
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.errors import InputError, UnsupportedModelError
from moesvd_core.kept_router import ROUTERS, release, restrict, router_of

torch.set_num_threads(1)
KEPT = (0, 2, 3)
GROUPED = ("deepseek_v3",)
"""Tiny models whose router looks for groups of experts first."""
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def pruned(model: PreTrainedModel, kept: tuple[int, ...] = KEPT) -> PreTrainedModel:
    factors = kept_everywhere(model, kept)
    return compressed(model, [(layer, factors[layer.index]) for layer in expert_layers(model)])


def kept_everywhere(model: PreTrainedModel, kept: tuple[int, ...] = KEPT) -> dict[int, LayerFactors]:
    layers = expert_layers(model)
    return {layer.index: kept_factors(layer, read_experts(model.get_submodule(layer.name), layer), kept) for layer in layers}


def cut(name: str, model: PreTrainedModel) -> PreTrainedModel:
    """A native model of three experts with the kept ones' rows of everything."""
    field = next(each for each in _COUNTS if each in model.config.to_dict() or hasattr(model.config, each))
    small = tiny_model(name, **{field: len(KEPT)})
    tensors = dict(small.state_dict())
    for key, value in model.state_dict().items():
        dim = next((d for d, (old, new) in enumerate(zip(value.shape, tensors[key].shape, strict=True)) if old != new), None)
        tensors[key] = value if dim is None else value.index_select(dim, torch.tensor(KEPT))
    small.load_state_dict(tensors)
    return small


@pytest.mark.parametrize("name", [name for name in TINY if name not in GROUPED])
def test_answers_as_the_model_whose_experts_and_router_were_cut(name: str) -> None:
    model = TINY[name]()
    with torch.no_grad():
        expected = cut(name, model)(**tiny_batch(rows=4)).logits
        answer = pruned(model)(**tiny_batch(rows=4)).logits
        original = model(**tiny_batch(rows=4)).logits
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(answer, original, atol=1e-3)


def test_groups_of_experts_keep_their_shape_and_never_offer_what_is_gone() -> None:
    model = TINY["deepseek_v3"]()
    layer = expert_layers(model)[0]
    block = model.get_submodule(layer.name.rpartition(".")[0])
    restrict(block, EXPERTS, KEPT, layer.active)
    _, _, index_Tk = router_of(block)(torch.randn(200, layer.hidden))
    assert set(index_Tk.flatten().tolist()) == {2, 3}  # the first group has one expert left, and two are needed of it


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("mixtral", (1,), "at least 2 experts must be kept, as many as answer each token, got 1"),
        ("deepseek_v3", (0, 2), r"1 of 2 groups of experts must always have 2 experts left, got \[1, 1\] a group"),
    ],
)
def test_too_few_experts_are_refused(name: str, kept: tuple[int, ...], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        pruned(TINY[name](), kept)


def test_groups_chosen_by_scores_that_cannot_be_ruled_out_are_refused() -> None:
    model = tiny_model("deepseek_v2", topk_method="group_limited_greedy", n_group=2, topk_group=1)
    with pytest.raises(UnsupportedModelError, match="DeepseekV2TopkRouter chooses among 2 groups"):
        pruned(model)


def test_a_block_without_a_router_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear must have a router named gate or router"):
        router_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", TINY)
def test_the_router_stands_beside_the_experts_in_every_family(name: str) -> None:
    model = TINY[name]()
    family, layer = family_of(model.config), expert_layers(model)[0]
    assert family.router.rpartition(".")[0] == family.experts.rpartition(".")[0]
    assert family.router.rpartition(".")[2] in ROUTERS
    block = layer.name.rpartition(".")[0]
    assert router_of(model.get_submodule(block)) is model.get_submodule(layer.name.removesuffix(family.experts) + family.router)


def test_the_router_itself_stays_as_it_was_and_may_be_let_go() -> None:
    model = TINY["mixtral"]()
    small = pruned(model)
    assert all(torch.equal(each, dict(model.named_parameters())[name]) for name, each in small.named_parameters() if "gate" in name)
    layer = expert_layers(model)[0]
    block = small.get_submodule(layer.name.rpartition(".")[0])
    x_TD = torch.randn(50, layer.hidden)
    logits_TE, _, index_Tk = block.gate(x_TD)
    assert logits_TE.shape == (50, EXPERTS) and logits_TE[:, 1].isinf().all()
    assert set(index_Tk.flatten().tolist()) == set(KEPT)
    release(block)
    again = model.get_submodule(layer.name.rpartition(".")[0])
    assert all(torch.equal(*pair) for pair in zip(block.gate(x_TD), again.gate(x_TD), strict=True))


def test_a_copy_moves_and_trains_with_its_own_router() -> None:
    small = pruned(TINY["mixtral"]())
    twin = copy.deepcopy(small)
    gates = [each.model.layers[0].mlp.gate for each in (small, twin)]
    with torch.no_grad():
        gates[1].weight.zero_()
    loss = small(**tiny_batch(), labels=tiny_batch()["input_ids"], output_router_logits=True).loss
    loss.backward()
    assert gates[0].weight.grad[list(KEPT)].abs().sum() > 0
    assert gates[1].weight.grad is None
    x_TD = torch.randn(4, 32)
    assert not torch.equal(gates[0](x_TD)[1], gates[1](x_TD)[1])


@pytest.mark.parametrize("name", TINY)
def test_comes_back_from_a_pickle_and_keeps_choosing_among_the_same(name: str) -> None:
    small = pruned(TINY[name]())
    with torch.no_grad():
        expected = small(**tiny_batch()).logits
        again = pickle.loads(pickle.dumps(small))  # noqa: S301
        assert torch.equal(again(**tiny_batch()).logits, expected)
        for module in (again.get_submodule(layer.name.rpartition(".")[0]) for layer in expert_layers(small)):
            for weight in router_of(module).parameters():
                weight.neg_()
        assert not torch.equal(again(**tiny_batch()).logits, expected), "the routers are the copy's own"
        assert torch.equal(small(**tiny_batch()).logits, expected)


@pytest.mark.parametrize("name", TINY)
def test_can_be_trained_after_an_answer_in_inference_mode(name: str) -> None:
    small = pruned(TINY[name]())
    with torch.inference_mode():
        small(**tiny_batch())
    small(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss.backward()
    for layer in expert_layers(small):
        assert any(weight.grad is not None for weight in router_of(small.get_submodule(layer.name.rpartition(".")[0])).parameters())


def test_while_replaced_only() -> None:
    model: Any = TINY["qwen3_moe"]()
    layer = expert_layers(model)[1]
    factors = kept_factors(layer, read_experts(model.get_submodule(layer.name), layer), KEPT)
    with torch.no_grad():
        before = model(**tiny_batch()).logits
        with replaced(model, layer_spec(layer, factors), layer_tensors(layer, factors, torch.float32)):
            within = model(**tiny_batch()).logits
        after = model(**tiny_batch()).logits
    assert torch.equal(before, after)
    assert not torch.allclose(before, within, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in TINY if name not in GROUPED])
def test_a_dense_export_is_the_native_model_with_fewer_experts(name: str, tmp_path: Path) -> None:
    model = TINY[name]()
    small = pruned(model)
    with torch.no_grad():
        expected = small(**tiny_batch()).logits
    factors = kept_everywhere(model)
    streamed = export_streamed(
        ModelFiles.open(save_tiny(name, tmp_path / "source")), lambda layer: factors[layer.index], tmp_path / "streamed", format="dense"
    )
    from_memory = export(small, tiny_tokenizer(), tmp_path / "memory", format="dense")
    for made in (streamed, from_memory):
        loaded, info = AutoModelForCausalLM.from_pretrained(made.path, output_loading_info=True)
        assert not any(info.values())
        assert not factored_modules(loaded)
        assert {layer.experts for layer in expert_layers(loaded)} == {len(KEPT)}
        with torch.no_grad():
            torch.testing.assert_close(loaded(**tiny_batch()).logits, expected, atol=1e-5, rtol=1e-5)
        removed = sum(layer.parameters for layer in expert_layers(model)) // EXPERTS
        assert made.counts.original_parameters == sum(each.numel() for each in model.parameters()) + _loose(model)
        assert made.counts.original_parameters - made.counts.parameters >= removed


def _loose(model: PreTrainedModel) -> int:
    """Entries of what a checkpoint stores beside parameters."""
    names = {name for name, _ in model.named_parameters()}
    return sum(tensor.numel() for name, tensor in model.state_dict().items() if name not in names)


@pytest.mark.parametrize("way", ["streamed", "memory"])
def test_layers_that_keep_different_numbers_cannot_be_dense(way: str, tmp_path: Path) -> None:
    model = TINY["mixtral"]()
    factors = kept_everywhere(model) | {1: kept_everywhere(model, (1, 2))[1]}
    with pytest.raises(InputError, match="where layers keep different numbers of experts, got dense with 2 to 3 kept"):
        if way == "memory":
            small = compressed(model, [(layer, factors[layer.index]) for layer in expert_layers(model)])
            export(small, tiny_tokenizer(), tmp_path / "out", format="dense")
        else:
            files = ModelFiles.open(save_tiny("mixtral", tmp_path / "source"))
            export_streamed(files, lambda layer: factors[layer.index], tmp_path / "out", format="dense")
    assert not (tmp_path / "out").exists()


def test_groups_of_experts_cannot_be_dense(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="router looks for groups of experts, got dense"):
        export(pruned(TINY["deepseek_v3"]()), tiny_tokenizer(), tmp_path / "out", format="dense")
