"""What a side's parameters are to others: packed, trained, replaced, pruned, pickled."""

import copy
import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_factors import INPUT_FORMS, OUTPUT_FORMS, layer_factors, model_factors
from tiny_models import TINY, tiny_batch, tiny_model, tiny_tokenizer
from torch.nn.utils import parameters_to_vector, parametrize, prune, vector_to_parameters
from transformers import PreTrainedModel

from moesvd_core import experts
from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.find import expert_layers
from moesvd_core.checkpoint.apply import compressed, factored_modules, pack, replace_experts, unpack
from moesvd_core.checkpoint.export import export
from moesvd_core.checkpoint.native import native_copy
from moesvd_core.errors import InputError
from moesvd_core.experts import FactoredExperts

torch.set_num_threads(1)
FORMS = [
    ("latent", "basis"), ("ragged", "ragged"), ("many-ranks", "dense"), ("pivoted", "pivoted"),
    ("base-delta", "merged"), ("groups", "summed"),
]

needs_packing = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no kernels for bfloat16"
)


def student_of(*forms: tuple[str, str], dtype: torch.dtype = torch.float32, name: str = "mixtral") -> PreTrainedModel:
    model = tiny_model(name, num_local_experts=12).to(dtype) if name == "mixtral" else TINY[name]()
    return compressed(model, model_factors(model, forms=forms))


def layer_of(*forms: str) -> FactoredExperts:
    model = TINY["mixtral"]()
    layer = expert_layers(model)[0]
    return replace_experts(model, layer, layer_factors(layer, read_experts(model.get_submodule(layer.name), layer), *forms))


def close(one: torch.Tensor, other: torch.Tensor, error: float = 1e-5) -> bool:
    """Whether answers differ by no more than so small a share."""
    return bool((one - other).norm() <= error * other.norm())


def call_of(tokens: int = 20) -> tuple[torch.Tensor, ...]:
    return torch.randn(tokens, 32), torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]), torch.rand(tokens, 2)


@torch.no_grad()
def answer(model: torch.nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model(**tiny_batch()).logits
    return logits


REFUSED: dict[str, Callable[[Any, Path], object]] = {
    "state_dict": lambda model, _: model.state_dict(),
    "load_state_dict": lambda model, _: factored(model).load_state_dict({}, strict=False),
    "load_state_dict, assigned": lambda model, _: factored(model).load_state_dict({}, strict=False, assign=True),
    "to": lambda model, _: model.to("cpu"),
    "double": lambda model, _: factored(model).double(),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.dumps(model),
    "torch.save": lambda model, folder: torch.save(model.state_dict(), folder / "state.pt"),
    "save_pretrained": lambda model, folder: model.save_pretrained(folder / "saved"),
    "export": lambda model, folder: export(model, tiny_tokenizer(), folder / "export"),
    "export, dense": lambda model, folder: export(model, tiny_tokenizer(), folder / "export", format="dense"),
    "native_copy": lambda model, _: native_copy(model),
    "input matrices": lambda model, _: factored(model).input.matrices(),
    "output matrices": lambda model, _: factored(model).output.matrices(),
}
"""What cannot be done to a packed model."""


def factored(model: PreTrainedModel) -> FactoredExperts:
    return next(iter(factored_modules(model).values()))


@needs_packing
@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("forms", [("latent", "basis"), ("many-ranks", "many-ranks"), ("pivoted", "pivoted")])
@pytest.mark.parametrize("action", REFUSED)
def test_whoever_saves_loads_moves_or_copies_packed_experts_is_told_to_unpack_them(
    action: str, forms: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "SMALL_EXPERT", 1 << 20 if forms[0] == "many-ranks" else 0)  # small ones are joined, others reordered
    student = student_of(forms, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    assert pack(student) == len(factored_modules(student))
    expected = answer(student)
    with pytest.raises(InputError, match=r"packed experts cannot be saved, loaded, moved, .* call unpack\(model\) first"):
        REFUSED[action](student, tmp_path)
    assert not (tmp_path / "export").exists()
    assert torch.equal(answer(student), expected)
    unpack(student)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    if not action.startswith(("load", "export")):  # nothing is loaded here; in bfloat16 random factors amplify what reloading rounds
        REFUSED[action](student, tmp_path)


@needs_packing
@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("forms", [("latent", "basis"), ("many-ranks", "many-ranks"), ("pivoted", "pivoted")])
def test_unpacked_in_inference_mode_they_can_still_be_trained(forms: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "SMALL_EXPERT", 1 << 20 if forms[0] == "many-ranks" else 0)
    student = student_of(forms, dtype=torch.bfloat16)
    with torch.inference_mode():
        pack(student)
        student(**tiny_batch())
        unpack(student)
    student(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in factored(student).parameters())


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        *(("mixtral", forms) for forms in [*product(INPUT_FORMS, ["basis"]), *product(["latent"], OUTPUT_FORMS)]),
        *((name, forms) for name in sorted(TINY) if name != "mixtral" for forms in [("ragged", "pivoted")]),
    ],
)
def test_comes_back_from_a_pickle_with_the_same_answers(name: str, forms: tuple[str, str]) -> None:
    student = student_of(forms, name=name)
    expected = answer(student)
    again = pickle.loads(pickle.dumps(student))  # noqa: S301
    assert torch.equal(answer(again), expected)
    again(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss.backward()


@pytest.mark.parametrize("forms", FORMS)
def test_other_parameters_may_take_their_places_for_a_call(forms: tuple[str, str]) -> None:
    student = student_of(forms)
    own = answer(student)
    other = {name: tensor * 1.5 for name, tensor in student.named_parameters()}
    twin = copy.deepcopy(student)
    with torch.no_grad():
        for name, tensor in twin.named_parameters():
            tensor.copy_(other[name])
        expected = answer(twin)
        assert close(torch.func.functional_call(student, other, (), tiny_batch()).logits, expected)
    recorded = torch.func.functional_call(student, other, (), tiny_batch()).logits
    assert close(recorded, expected)
    recorded.sum().backward()
    assert all(parameter.grad is not None for parameter in factored(student).parameters())
    assert close(answer(student), own)


class Halved(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("change", ["prune", "parametrize"])
def test_factors_may_be_pruned_and_parametrised(forms: tuple[str, str], answered: bool, change: str) -> None:
    own = layer_of(*forms)
    call = call_of()
    if answered:
        with torch.no_grad():
            own(*call)
    for side in (own.input, own.output):
        for name, parameter in list(side.named_parameters()):
            if change == "prune":
                prune.custom_from_mask(side, name, torch.rand(parameter.shape) < 0.5)
            elif parameter.is_floating_point():
                parametrize.register_parametrization(side, name, Halved())
    for _ in range(2):
        recorded = own(*call)
        with torch.no_grad():
            assert close(own(*call), recorded)
            for parameter in own.parameters():
                parameter.mul_(2)  # what is computed of it is out of date
            doubled = own(*call)
        assert not close(doubled, recorded, 0.5)
        assert close(own(*call), doubled)
    own.input.matrices()
    if change == "prune":
        for side in (own.input, own.output):
            for name in [each.removesuffix("_orig") for each, _ in side.named_parameters()]:
                prune.remove(side, name)
        expected = own(*call)
        with torch.no_grad():
            assert close(own(*call), expected)


@pytest.mark.parametrize("forms", FORMS)
def test_parameters_that_are_trained_have_memory_of_their_own_in_the_usual_order(forms: tuple[str, str]) -> None:
    own = layer_of(*forms)
    call = call_of()
    with torch.no_grad():
        expected = own(*call)
        arranged = [name for name, parameter in own.named_parameters() if not parameter.is_contiguous()]
        twin = copy.deepcopy(own)
    assert bool(arranged) == (forms[0] not in ("base-delta", "groups")), "else nothing is arranged"
    for each in (own, twin, pickle.loads(pickle.dumps(own))):  # noqa: S301
        assert close(each(*call), expected)
        assert all(parameter.is_contiguous() for parameter in each.parameters())
        vector_to_parameters(parameters_to_vector(each.parameters()) * 2, each.parameters())
        with torch.no_grad():
            doubled = each(*call)
        assert close(each(*call), doubled)
        assert not close(doubled, expected, 0.5)


def test_those_that_are_not_trained_stay_arranged_where_gradients_are_recorded() -> None:
    own = layer_of("ragged", "ragged").requires_grad_(False)
    call = call_of()
    with torch.no_grad():
        own(*call)
    places = [parameter.data_ptr() for parameter in own.parameters()]
    own(call[0].requires_grad_(), *call[1:]).sum().backward()
    assert [parameter.data_ptr() for parameter in own.parameters()] == places
    assert any(not parameter.is_contiguous() for parameter in own.parameters())


@pytest.mark.parametrize("forms", [("latent", "basis"), ("ragged", "ragged"), ("pivoted", "pivoted")])
@pytest.mark.parametrize("between", ["steps", "gradients and step"])
def test_optimisers_that_go_by_memory_are_not_misled_by_answers_between(forms: tuple[str, str], between: str) -> None:
    """`fused` counts on parameters, gradients and its sums being in one order, and says nothing where they are not."""
    student = student_of(forms)
    trained = []
    for fused, answers in ((False, False), (True, True)):
        each = copy.deepcopy(student)
        optimiser = torch.optim.AdamW(factored(each).parameters(), lr=1e-2, fused=fused)
        for _ in range(3):
            optimiser.zero_grad()
            each(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss.backward()
            if answers and between == "gradients and step":
                answer(each)
            optimiser.step()
            if answers and between == "steps":
                answer(each)
                optimiser.zero_grad()
                answer(each)
        trained.append(factored(each).state_dict())
    assert all(torch.allclose(tensor, trained[1][name], atol=1e-5) for name, tensor in trained[0].items())


def test_lbfgs_goes_on_after_an_answer() -> None:
    student = student_of(("latent", "ragged"), ("pivoted", "basis"))
    answer(student)
    trained = [parameter for module in factored_modules(student).values() for parameter in module.parameters()]
    optimiser = torch.optim.LBFGS(trained, max_iter=3)
    losses = []

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss: torch.Tensor = student(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(2):
        optimiser.step(closure)
        answer(student)
    assert losses[-1] < losses[0]
