"""Factored experts against the same model with the multiplied-out matrices, in every family and structure."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from threading import Barrier
from time import sleep
from typing import Any

import pytest
import torch
from tiny_factors import INPUT_FORMS, OUTPUT_FORMS, layer_factors, model_factors, narrow_factors, side_factors
from tiny_models import TINY, tiny_batch, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesvd_core import experts, factor_sides, grouped, pivoted_side
from moesvd_core.architectures.experts_io import read_experts, write_experts
from moesvd_core.architectures.find import expert_layers
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.batched import Slots, slot_rows
from moesvd_core.checkpoint.apply import compressed, factored_modules, pack, replace_experts, unpack
from moesvd_core.checkpoint.neuron_order import neuron_order
from moesvd_core.decomposition.factors import BaseDeltaFactors, LayerFactors, PerExpertFactors
from moesvd_core.evaluation.speed import _flops, weight_bytes
from moesvd_core.experts import FactoredExperts
from moesvd_core.factor_sides import PerExpertSide, make_side
from moesvd_core.grouped import Pairs, Runs, add_up
from moesvd_core.sides import segments

torch.set_num_threads(1)


def multiplied_out(model: PreTrainedModel, layers: list[tuple[ExpertLayer, LayerFactors]]) -> PreTrainedModel:
    """The native model whose experts are what the factors stand for."""
    dense = copy.deepcopy(model)
    for layer, factors in layers:
        write_experts(dense.get_submodule(layer.name), layer, factors.multiplied_out())
    return dense


@pytest.mark.parametrize("name", TINY)
def test_answers_as_the_multiplied_out_experts_in_every_family(name: str) -> None:
    model = TINY[name]()
    layers = model_factors(model)
    with torch.no_grad():
        expected = multiplied_out(model, layers)(**tiny_batch()).logits
        answer = compressed(model, layers)(**tiny_batch()).logits
        original = model(**tiny_batch()).logits
    assert torch.allclose(answer, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(answer, original, atol=1e-2)


@pytest.mark.parametrize("name", TINY)
def test_what_rivals_store_answers_as_the_multiplied_out_experts_in_every_family(name: str) -> None:
    model = TINY[name]()
    for make in (partial(layer_factors, input_form="base-delta", output_form="merged"), narrow_factors):
        layers = [(layer, make(layer, read_experts(model.get_submodule(layer.name), layer))) for layer in expert_layers(model)]
        with torch.no_grad():
            expected = multiplied_out(model, layers)(**tiny_batch()).logits
            answer = compressed(model, layers)(**tiny_batch()).logits
        assert torch.allclose(answer, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("input_form", "output_form"), [*product(INPUT_FORMS, ["dense"]), *product(["latent"], OUTPUT_FORMS)])
@pytest.mark.parametrize(("count", "cached"), [(4, 0), (12, 1 << 20)])
def test_every_structure_equals_its_matrices(
    input_form: str, output_form: str, count: int, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "CACHED_NUMBERS", cached)
    model = tiny_model("mixtral", num_local_experts=count)
    layer = expert_layers(model)[0]
    factors = layer_factors(layer, read_experts(model.get_submodule(layer.name), layer), input_form, output_form)
    dense = multiplied_out(model, [(layer, factors)]).get_submodule(layer.name)
    factored = replace_experts(model, layer, factors)
    input_END, output_EDM = factors.input.reconstruct(), factors.output.reconstruct()
    if (order_EM := neuron_order(factors)) is not None:
        row_EN = layer.rows_in_order(order_EM)
        input_END = torch.stack([matrix_ND[row_N] for matrix_ND, row_N in zip(input_END, row_EN, strict=True)])
        output_EDM = torch.stack([matrix_DM[:, order_M] for matrix_DM, order_M in zip(output_EDM, order_EM, strict=True)])
    assert torch.allclose(factored.input.matrices(), input_END, atol=1e-6)
    assert torch.allclose(factored.output.matrices(), output_EDM, atol=1e-6)
    assert factors.parameters == sum(tensor.numel() for tensor in factored.state_dict().values())
    hidden_TD, index_Tk = torch.randn(50, layer.hidden), torch.stack([torch.randperm(count)[:2] for _ in range(50)])
    weight_Tk = torch.rand(50, 2)
    for tokens in (50, 1, 0):
        call = hidden_TD[:tokens], index_Tk[:tokens], weight_Tk[:tokens]
        with torch.no_grad():
            assert torch.allclose(factored(*call), dense(*call), atol=2e-5)
        if tokens:
            assert torch.allclose(factored(*call), dense(*call), atol=2e-5), "where gradients are recorded"


def rounded_layer(name: str = "mixtral", input_form: str = "latent", output_form: str = "basis", **sizes: int) -> FactoredExperts:
    """A layer's factored experts in bfloat16."""
    model = tiny_model(name, **sizes) if sizes else TINY[name]()
    layer = expert_layers(model)[0]
    factors = layer_factors(layer, read_experts(model.get_submodule(layer.name), layer), input_form, output_form)
    return replace_experts(model.to(torch.bfloat16), layer, factors)


def close(answer: torch.Tensor, expected: torch.Tensor, error: float = 1e-5) -> bool:
    """Whether answers differ by no more than so small a share."""
    return bool((answer.double() - expected.double()).norm() <= error * expected.double().norm())


WAYS = {
    "_answer_by_pair": {"FEW_MULTIPLICATIONS": 1 << 60},
    "_answer_in_slots": {"FEW_MULTIPLICATIONS": -1, "JOINED_PAIRS": 1 << 20, "PRODUCT_COST": 1 << 40},
    "_answer_in_turns": {"FEW_MULTIPLICATIONS": -1, "JOINED_PAIRS": -1},
}
"""How small experts answer, and what makes them choose it."""
SMALL_FORMS = [
    *product(INPUT_FORMS, ["basis"]), *product(["latent"], OUTPUT_FORMS),
    ("ragged", "ragged"), ("ragged", "equal"), ("pivoted", "pivoted-full"),
]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, by_torch: None) -> list[int]:
    """Fills up with one number for every answer that went the chosen way."""
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(experts, name, value)
    went, real = [], getattr(FactoredExperts, request.param)
    monkeypatch.setattr(FactoredExperts, request.param, lambda *call: went.append(1) or real(*call))
    return went


def calls_of(factored: FactoredExperts, *tokens: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, ...]]:
    """Hidden states and a router's choice for each number of tokens."""
    hidden, count = factored.expert_layer["hidden"], factored.num_experts
    if factored.expert_layer["routing"] == "scaled-inputs":
        return [((torch.randn(count, each, hidden) * (torch.rand(count, each, 1) < 0.5)).flatten(0, 1).to(dtype),) for each in tokens]
    chosen = [torch.stack([torch.randperm(count)[:2] for _ in range(each)]) for each in tokens]
    return [(torch.randn(len(index_Tk), hidden).to(dtype), index_Tk, torch.rand(len(index_Tk), 2)) for index_Tk in chosen]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "nemotron_h"])
@pytest.mark.parametrize("forms", [("latent", "basis"), ("ragged", "ragged"), ("ragged", "dense")])
def test_small_experts_of_every_family_answer_each_way_as_where_gradients_are_recorded(
    name: str, forms: tuple[str, str], way: list[int]
) -> None:
    """With biases, with scaled inputs, without a gate."""
    answers_that_way(name, forms, way)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "nemotron_h"])
@pytest.mark.parametrize("way", ["_answer_by_pair", "_answer_in_turns"], indirect=True)
def test_small_experts_without_identities_answer_each_way_but_all_at_once(name: str, way: list[int]) -> None:
    answers_that_way(name, ("pivoted", "pivoted-full"), way)


def answers_that_way(name: str, forms: tuple[str, str], way: list[int]) -> None:
    model = TINY[name]()
    layer = expert_layers(model)[0]
    factored = replace_experts(model, layer, layer_factors(layer, read_experts(model.get_submodule(layer.name), layer), *forms))
    calls = calls_of(factored, 1, 9, 70)
    expected = [factored(*call).detach() for call in calls]
    with torch.no_grad():
        for call, answer in zip(calls, expected, strict=True):
            assert torch.allclose(factored(*call), answer, atol=1e-5, rtol=1e-5)
    assert len(way) == len(calls)


@pytest.mark.parametrize(("input_form", "output_form"), SMALL_FORMS)
def test_every_structure_answers_each_way_within_its_rounding(input_form: str, output_form: str, way: list[int]) -> None:
    factored = rounded_layer("mixtral", input_form, output_form)
    exact = copy.deepcopy(factored).float()
    for call in calls_of(factored, 1, 3, 50, 300, dtype=torch.bfloat16):
        expected = exact(call[0].float(), *call[1:]).detach()
        with torch.no_grad():
            assert close(factored(*call), expected, 1.5e-2)


AUTOCAST_FORMS = [("latent", "basis"), ("ragged", "dense"), ("pivoted", "pivoted-full")]


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forms", AUTOCAST_FORMS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_autocast_changes_nothing_about_the_answers_of_small_experts(
    name: str, forms: tuple[str, str], given: torch.dtype, way: list[int]
) -> None:
    model = TINY[name]()
    layer = expert_layers(model)[0]
    factored = replace_experts(model, layer, layer_factors(layer, read_experts(model.get_submodule(layer.name), layer), *forms))
    for call in calls_of(factored, 1, 9, 70, dtype=given):
        with torch.no_grad():
            expected = factored(*call)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                answer = factored(*call)
        assert answer.dtype == given
        assert torch.equal(answer, expected)
    if "pivoted" not in forms:  # which are never filled up, so that they do not answer all at once
        assert way


def test_a_model_of_small_experts_goes_on_under_autocast_as_where_gradients_are_recorded() -> None:
    student = compressed(model := TINY["mixtral"](), model_factors(model))
    batch = tiny_batch(rows=8, length=40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = student(**batch).logits
        with torch.no_grad():
            answer = student(**batch).logits
    assert answer.dtype == expected.dtype
    assert close(answer, expected, 3e-2)


@pytest.mark.parametrize("forms", AUTOCAST_FORMS)
def test_routers_weights_may_stand_in_any_order_in_memory(forms: tuple[str, str], way: list[int]) -> None:
    factored = rounded_layer("mixtral", *forms).float()
    for hidden_TD, index_Tk, weight_Tk in calls_of(factored, 9, 70):
        with torch.no_grad():
            answer = factored(hidden_TD, index_Tk.t().contiguous().t(), weight_Tk.t().contiguous().t())
            assert torch.equal(answer, factored(hidden_TD, index_Tk, weight_Tk))


@pytest.mark.parametrize(
    "forms", [("latent", "basis"), ("ragged", "ragged"), ("ragged", "dense"), ("equal", "equal"), ("pivoted", "pivoted")]
)
@pytest.mark.parametrize("inference", [False, True])
def test_parameters_stay_what_they_were_when_small_experts_arrange_them(forms: tuple[str, str], inference: bool) -> None:
    factored = rounded_layer("mixtral", *forms).float()
    own = dict(factored.named_parameters())
    before = {name: tensor.clone() for name, tensor in factored.state_dict().items()}
    (call,) = calls_of(factored, 9)
    with torch.inference_mode(inference), torch.no_grad():
        answer = factored(*call)
    assert all(factored.get_parameter(name) is parameter for name, parameter in own.items())
    assert all(torch.equal(parameter, before[name]) for name, parameter in own.items())
    assert any(not parameter.is_contiguous() for parameter in own.values())
    recorded = factored(*call)
    recorded.square().sum().backward()
    assert close(recorded, answer)
    assert all(parameter.grad is not None for parameter in own.values())
    with torch.no_grad():
        for parameter in own.values():
            parameter.mul_(2)
        doubled = factored(*call)
        assert not close(doubled, answer)
        with torch.enable_grad():
            assert close(factored(*call), doubled)
        assert close(pickle.loads(pickle.dumps(factored.input))(call[0], Pairs(*call[1:], 4)), factored.input(call[0], Pairs(*call[1:], 4)))  # noqa: S301
        assert close(copy.deepcopy(factored)(*call), doubled)
        factored.load_state_dict(before)
        assert close(factored(*call), answer)
        factored.load_state_dict({name: tensor * (1 + tensor.is_floating_point()) for name, tensor in before.items()}, assign=True)
        assert close(factored(*call), doubled)
        assert close(factored.double()(call[0].double(), *call[1:]), doubled.double())


@pytest.mark.usefixtures("by_torch")
def test_threads_that_begin_at_the_same_time_arrange_small_experts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    factored = rounded_layer("mixtral", "ragged", "ragged")
    arranged, real, start = [], PerExpertSide._arrange, Barrier(4)

    def slowly(side: PerExpertSide) -> Any:
        arranged.append(side)
        sleep(0.02)
        return real(side)

    monkeypatch.setattr(PerExpertSide, "_arrange", slowly)
    (call,) = calls_of(factored, 9, dtype=torch.bfloat16)

    @torch.no_grad()
    def answer(_: int) -> torch.Tensor:
        start.wait()
        return factored(*call)

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(answer, range(4)))
    assert arranged == [factored.input, factored.output]
    assert all(torch.equal(each, answers[0]) for each in answers)


def test_what_small_experts_arranged_is_saved_as_it_was(tmp_path: Path) -> None:
    model = TINY["mixtral"]()
    student = compressed(model, model_factors(model))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with torch.no_grad():
        expected = student(**tiny_batch()).logits
        student.save_pretrained(tmp_path)
        assert torch.equal(student(**tiny_batch()).logits, expected)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(**tiny_batch()).logits, expected)
    assert any(not parameter.is_contiguous() for parameter in student.parameters())
    assert all(tensor.is_contiguous() and torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("cost", [0, 1 << 40], ids=["those asked", "all"])
def test_bfloat16_stays_within_its_rounding_either_way(cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "PRODUCT_COST", cost)
    rounded = rounded_layer()
    exact = copy.deepcopy(rounded).float()
    hidden_TD = torch.randn(10, rounded.expert_layer["hidden"]).bfloat16()
    index_Tk, weight_Tk = torch.stack([torch.randperm(4)[:2] for _ in range(10)]), torch.rand(10, 2)
    with torch.no_grad():
        expected = exact(hidden_TD.float(), index_Tk, weight_Tk)
        assert (rounded(hidden_TD, index_Tk, weight_Tk).float() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no kernels for bfloat16")
@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize(("input_form", "output_form"), [*product(INPUT_FORMS, ["basis"]), *product(["latent"], OUTPUT_FORMS)])
def test_packed_factors_give_the_same_answers_and_come_back_as_they_were(
    input_form: str, output_form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "SMALL_EXPERT", 0)
    monkeypatch.setattr(experts, "PRODUCT_COST", 0)
    factored = rounded_layer("mixtral", input_form, output_form)
    trains = output_form != "pruned"  # which gives no answer at all
    before = {name: tensor.clone() for name, tensor in factored.state_dict().items()}
    calls = [
        (torch.randn(tokens, factored.expert_layer["hidden"]).bfloat16(), torch.randint(4, (tokens, 2)), torch.rand(tokens, 2))
        for tokens in (1, 3, 50)
    ]
    with torch.no_grad():
        expected = [factored(*call) for call in calls]
        factored.pack()
        factored.pack()
        assert all(parameter.device.type == "meta" for parameter in factored.parameters() if parameter.ndim > 1 and parameter.numel())
        for call, answer in zip(calls, expected, strict=True):
            assert (factored(*call).float() - answer.float()).norm() <= 1e-2 * answer.float().norm()
    with pytest.raises(RuntimeError, match="unpack"):
        factored(*calls[0])
    factored.unpack()
    assert all(torch.equal(tensor, before[name]) for name, tensor in factored.state_dict().items())
    assert factored(*calls[-1]).requires_grad == trains


def test_only_bfloat16_can_be_packed_and_small_experts_are_left_alone() -> None:
    model = TINY["mixtral"]()
    student = compressed(model, model_factors(model))
    with pytest.raises(ValueError, match=r"got torch\.float32 on cpu"):
        pack(student)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no kernels for bfloat16")
@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("forms", [("many-ranks", "basis"), ("latent", "many-ranks"), ("many-ranks", "ragged")])
def test_small_factors_of_many_ranks_are_packed_side_by_side_and_come_back_as_they_were(forms: tuple[str, str], way: list[int]) -> None:
    factored = rounded_layer("mixtral", *forms, num_local_experts=12)
    before = {name: tensor.clone() for name, tensor in factored.state_dict().items()}
    calls = calls_of(factored, 1, 3, 50, 300, dtype=torch.bfloat16)
    exact = copy.deepcopy(factored).float()
    expected = [exact(call[0].float(), *call[1:]).detach() for call in calls]
    places = [parameter.data_ptr() for parameter in factored.parameters()]
    with torch.no_grad():
        factored(*calls[0])
        assert not way, "parameters cannot be views"
        assert [parameter.data_ptr() for parameter in factored.parameters()] == places, "nor is anything else arranged for nothing"
        factored.pack()
        factored.pack()
        assert factored.packed
        for call, answer in zip(calls, expected, strict=True):
            assert close(factored(*call), answer, 1.5e-2)
    assert way
    stored = sum(tensor.nbytes for tensor in before.values())
    assert weight_bytes(factored) >= stored
    with pytest.raises(RuntimeError, match="unpack"):
        factored(*calls[0])
    factored.unpack()
    assert all(torch.equal(tensor, before[name]) for name, tensor in factored.state_dict().items())
    assert factored(*calls[0]).requires_grad


@pytest.mark.parametrize(("experts_asked", "rows"), [([0, 1, 2, 3], 30), ([2, 3], 30), ([0, 1, 2, 3], 5), ([1, 3], 1)])
def test_every_pair_has_a_row_of_its_expert_or_one_of_the_rest(experts_asked: list[int], rows: int) -> None:
    choice_T2 = torch.stack([torch.randperm(len(experts_asked))[:2] for _ in range(30)])
    index_Tk = torch.tensor(experts_asked)[choice_T2]
    counts = index_Tk.flatten().bincount(minlength=4).tolist()
    slots = Slots(index_Tk, counts, rows)
    assert len(slots.token_X) == sum(max(0, count - rows) for count in counts)
    token_S = torch.cat([slots.token_EQ.flatten(), slots.token_X])
    rest = [expert for expert, start, end in slots.rest for _ in range(start, end)]
    expert_S = torch.tensor([*(place // rows for place in range(4 * rows)), *rest])
    assert len(set(slots.place_Tk.flatten().tolist())) == index_Tk.numel()
    assert torch.equal(expert_S[slots.place_Tk], index_Tk)
    assert torch.equal(token_S[slots.place_Tk], torch.arange(30)[:, None].expand(30, 2))
    y_SN, weight_Tk = torch.randn(len(token_S), 5), torch.rand(30, 2)
    assert torch.allclose(add_up(y_SN, slots.place_Tk, weight_Tk), (y_SN[slots.place_Tk] * weight_Tk[..., None]).sum(1))


def test_rows_together_are_as_many_as_take_least_time() -> None:
    assert slot_rows([8, 8, 8, 8], turn=10, unread=0) == 8
    assert slot_rows([100, 8, 8, 8], turn=10, unread=0) == 8, "one turn for the rest of the first"
    assert slot_rows([100, 8, 8, 8], turn=1000, unread=0) == 104, "where turns are dear"
    assert slot_rows([100, 8, 8, 8], turn=0, unread=0) == 0, "where they cost nothing"
    assert slot_rows([1, 1, 0, 0], turn=10, unread=100) == 0, "where nobody reads the others"


def test_long_runs_pass_in_parts() -> None:
    row_P = torch.randperm(2000)
    x_TC = torch.randn(2000, 3)
    seen = []

    def answer(expert: int, x_QC: torch.Tensor) -> torch.Tensor:
        seen.append(len(x_QC))
        return x_QC * (expert + 1)

    y_PN = grouped.in_turns(x_TC, row_P, [(0, 0, 1500), (2, 1500, 2000)], answer, 3)
    assert torch.equal(y_PN, torch.cat([x_TC[row_P[:1500]], x_TC[row_P[1500:]] * 3]))
    assert max(seen) <= 1.125 * grouped.CACHED_ROWS


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no kernels for bfloat16")
@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize(("forms", "most"), [((("latent", "ragged"), ("ragged", "basis")), 1.4), ((("pivoted", "pivoted-equal"),), 1.05)])
def test_a_packed_model_generates_what_it_did(forms: tuple[tuple[str, str], ...], most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["mixtral"]().to(torch.bfloat16)
    student = compressed(model, model_factors(model, forms=forms))
    monkeypatch.setattr(experts, "SMALL_EXPERT", 0)
    with torch.no_grad():
        expected = student(**tiny_batch()).logits
        plain, operations = weight_bytes(student), _flops(student, tiny_batch()["input_ids"])
        assert pack(student) == len(factored_modules(student))
        assert plain <= weight_bytes(student)
        assert operations <= _flops(student, tiny_batch()["input_ids"]) <= most * operations
        assert torch.allclose(student(**tiny_batch()).logits, expected, atol=2e-2)
        assert student.generate(**tiny_batch(), max_new_tokens=4, do_sample=False).shape[1] == tiny_batch()["input_ids"].shape[1] + 4
    unpack(student)
    student(**tiny_batch()).logits.sum().backward()


def test_what_a_part_takes_along_is_written_again_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "SMALL_ROWS", 40)
    runs = [(0, 0, 9), (2, 9, 109), (3, 109, 110), (5, 110, 150)]
    spans, rows = grouped.spans_of(runs)
    owner = [None] * rows
    for expert, start, stop in spans:
        assert stop - start <= grouped.usual(40)
        owner[start:stop] = [expert] * (stop - start)
    assert owner[:150] == [expert for expert, start, end in runs for _ in range(start, end)]


@pytest.mark.parametrize("count", [*range(1, 70), 500])
def test_a_run_takes_neighbours_along_up_to_a_usual_number(count: int) -> None:
    first, last = grouped._window(1000 - count, 1000, 1000)
    assert first <= 1000 - count
    assert last == 1000
    assert count <= last - first <= 1.25 * count
    assert grouped._window(0, count, 1000) == (0, last - first)
    assert grouped._window(0, count, count) == (0, count)
    assert len({grouped._window(0, each, 1000)[1] for each in range(17, 33)}) == 4
    assert len({grouped._window(0, each, 1000)[1] for each in range(33, 65)}) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("turned_rows", [False, True], ids=["rows", "rows turned"])
@pytest.mark.parametrize("shape", [(24, 96), (64, 64), (64, 96), (96, 24)], ids=str)
def test_a_matrix_is_multiplied_by_rows_where_that_spares_its_kernels_an_order(
    shape: tuple[int, int], turned_rows: bool, dtype: torch.dtype
) -> None:
    weight_NC = torch.randn(shape).to(dtype)
    wide, twice = shape[1] >= shape[0], shape[1] >= 2 * shape[0]
    for rows, turned in ((1, False), (7, False), (8, twice), (16, twice), (17, wide), (192, wide), (193, False)):
        x_QC = torch.randn(rows, shape[1]).to(dtype)
        x_QC = x_QC.t().contiguous().t() if turned_rows else x_QC
        answer_QN = grouped.times(x_QC, weight_NC)
        assert close(answer_QN, x_QC.float() @ weight_NC.float().T, 1e-2 if dtype == torch.bfloat16 else 1e-6)
        assert rows == 1 or answer_QN.t().is_contiguous() == (turned and dtype == torch.bfloat16)
    assert grouped.times(torch.randn(20, shape[1]).to(dtype), weight_NC.t().contiguous().t()).is_contiguous()


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "nemotron_h"])
def test_bfloat16_stays_within_its_rounding(name: str) -> None:
    model = TINY[name]()
    layers = model_factors(model)
    layer, factors = layers[0]
    module = replace_experts(model, layer, factors)
    rounded = replace_experts(TINY[name]().to(torch.bfloat16), layer, factors)
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    if layer.routing == "scaled-inputs":
        hidden = torch.randn(layer.experts, 10, layer.hidden) * (torch.arange(layer.experts)[:, None, None] < 2)
        call = (hidden.reshape(-1, layer.hidden),)
    else:
        call = (torch.randn(10, layer.hidden), torch.randint(layer.experts, (10, 1)), torch.ones(10, 1))
    short_call = [part.bfloat16() if part.is_floating_point() else part for part in call]
    with torch.no_grad():
        for own, short in zip(module.parameters(), rounded.parameters(), strict=True):
            own.copy_(short)
        exact, answer = module(*(part.float() if part.is_floating_point() else part for part in short_call)), rounded(*short_call)
    assert answer.dtype == torch.bfloat16
    assert (answer.float() - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_gradients_reach_every_factor_and_training_lowers_the_loss(name: str) -> None:
    model = TINY[name]()
    student = compressed(model, model_factors(model))
    batch = tiny_batch(rows=8, length=24)
    factors = [parameter for module in factored_modules(student).values() for parameter in module.parameters()]
    optimiser = torch.optim.SGD(factors, lr=0.5)
    losses = []
    for _ in range(3):
        loss = student(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in factors)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_gradients_equal_those_of_the_multiplied_out_experts() -> None:
    model = TINY["mixtral"]()
    layers = model_factors(model)
    pair = [compressed(model, layers), multiplied_out(model, layers)]
    embeddings = []
    for each in pair:
        embedded = each.get_input_embeddings()(tiny_batch()["input_ids"]).detach().requires_grad_()
        each(inputs_embeds=embedded).logits.square().sum().backward()
        embeddings.append(embedded.grad)
    assert torch.allclose(*embeddings, rtol=1e-4, atol=1e-5 * embeddings[0].abs().max().item())


@pytest.mark.parametrize("make", [partial(layer_factors, input_form="base-delta", output_form="merged"),
                                  partial(layer_factors, input_form="merged", output_form="base-delta"), narrow_factors,
                                  partial(layer_factors, input_form="pivoted", output_form="pivoted-equal")])
def test_so_do_those_of_what_rivals_store_and_every_tensor_gets_one(make: Callable[..., LayerFactors]) -> None:
    model = TINY["mixtral"]()
    layers = [(layer, make(layer, read_experts(model.get_submodule(layer.name), layer))) for layer in expert_layers(model)]
    student = compressed(model, layers)
    embeddings = []
    for each in (student, multiplied_out(model, layers)):
        embedded = each.get_input_embeddings()(tiny_batch(rows=8)["input_ids"]).detach().requires_grad_()
        each(inputs_embeds=embedded).logits.square().sum().backward()
        embeddings.append(embedded.grad)
    assert torch.allclose(*embeddings, rtol=1e-4, atol=1e-5 * embeddings[0].abs().max().item())
    for module in factored_modules(student).values():
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_many_rows_are_put_in_order_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    factored = rounded_layer("mixtral", "pivoted", "pivoted-equal")
    (call,) = calls_of(factored, 20, dtype=torch.bfloat16)
    expected = factored(*call)  # gradients are recorded, so by grouped products
    monkeypatch.setattr(pivoted_side, "GATHERED", 3 * factored.expert_layer["hidden"])
    assert torch.equal(factored(*call), expected)


@pytest.mark.parametrize("in_place", [True, False])
def test_pivots_that_were_replaced_are_followed(in_place: bool) -> None:
    model = tiny_model("mixtral")
    layer = expert_layers(model)[0]
    weights = read_experts(model.get_submodule(layer.name), layer)
    pair = []
    for seed in (0, 1):
        factors = LayerFactors(layer.index, *(side_factors("pivoted", each, seed) for each in (weights.input_END, weights.output_EDM)))
        pair.append(replace_experts(copy.deepcopy(model), layer, factors))
    first, second = pair
    (call,) = calls_of(first, 20)
    with torch.no_grad():
        assert not close(first(*call), second(*call))
        first.load_state_dict(second.state_dict(), assign=not in_place)
        assert not torch.equal(first.input.pivot_0, torch.arange(8).expand(1, -1))
        assert torch.equal(first(*call), second(*call))
        assert torch.equal(pickle.loads(pickle.dumps(first.input)).matrices(), second.input.matrices())  # noqa: S301


def test_indices_stay_integers_whatever_the_factors_are_cast_to() -> None:
    factored = rounded_layer("mixtral", "pivoted", "pivoted-equal").half().double().to(torch.bfloat16)
    assert {buffer.dtype for name, buffer in factored.named_buffers() if "pivot" in name} == {torch.int16}


def test_indices_take_as_many_bytes_as_numbers_and_reach_far_enough() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert pivoted_side.index_type(dtype).itemsize == dtype.itemsize
        index_R = torch.tensor([0, 32_767, 32_768, 65_535])
        assert torch.equal(pivoted_side.as_places(index_R.to(pivoted_side.index_type(dtype))), index_R)


def test_a_base_alone_is_one_matrix_for_all() -> None:
    model = TINY["mixtral"]()
    layer = expert_layers(model)[0]
    weights = read_experts(model.get_submodule(layer.name), layer)
    stored = weights.input_END, weights.output_EDM
    none = [PerExpertFactors((0,) * 4, tuple(each[:, :, :0]), tuple(each[:, :0]), {}) for each in stored]
    sides = [BaseDeltaFactors(each[0].clone(), own) for each, own in zip(stored, none, strict=True)]
    factors = LayerFactors(layer.index, *sides)
    dense = multiplied_out(model, [(layer, factors)]).get_submodule(layer.name)
    call = torch.randn(20, layer.hidden), torch.randint(4, (20, 2)), torch.rand(20, 2)
    with torch.no_grad():
        assert torch.allclose(replace_experts(model, layer, factors)(*call), dense(*call), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 70])
def test_experts_without_a_neuron_answer_nothing(tokens: int) -> None:
    factored = rounded_layer("mixtral")
    nothing = {"structure": "narrow", "size": 0, "blocks": 1}
    pruned = FactoredExperts(factored.spec | {"input": nothing, "output": nothing}, factored.gate)
    (call,) = calls_of(factored, tokens)
    with torch.no_grad():
        assert torch.equal(pruned(*call), torch.zeros_like(call[0]))


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_usual_gate_is_told_apart_from_families_own(name: str) -> None:
    model = TINY[name]()
    layer = expert_layers(model)[0]
    native = model.get_submodule(layer.name)
    gate = experts.gate_of(native, layer.rows)
    pre_PN = torch.randn(5, layer.input_rows)
    if name in ("gemma4_text", "gpt_oss", "nemotron_h"):
        assert gate is not experts.swiglu
    else:
        assert gate is experts.swiglu
        own = getattr(native, "_apply_gate", lambda pre: native.act_fn(pre.chunk(2, -1)[0]) * pre.chunk(2, -1)[1])
        assert torch.equal(gate(pre_PN), own(pre_PN))


def test_a_compressed_copy_shares_what_is_not_factored_and_leaves_the_model_alone() -> None:
    model = TINY["mixtral"]()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    copied = compressed(model, model_factors(model, leave=1))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert copied.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert list(factored_modules(copied)) == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    assert not factored_modules(model)
    assert getattr(model.config, "quantization_config", None) is None
    assert [layer.parameters for layer in expert_layers(copied)] == [layer.parameters for layer in expert_layers(model)]


def test_the_replaced_module_keeps_no_dense_weight_alive() -> None:
    model = TINY["gpt_oss"]()
    layer, factors = model_factors(model)[0]
    replace_experts(model, layer, factors)
    (shell,) = model.get_submodule(layer.name).gate.args
    assert not shell._parameters
    assert not shell._buffers


@pytest.mark.parametrize("ranks", [[3, 3, 3], [8, -1, 0, 5], list(range(40)), [2047, *range(9)]])
def test_slabs_hold_every_rank_once_and_nothing_else(ranks: list[int]) -> None:
    slabs = segments(ranks)
    assert len(slabs) <= 11
    for expert, rank in enumerate(ranks):
        assert sum(width for width, members in slabs if expert in members) == max(rank, 0)


def test_rows_of_no_group_are_neither_computed_nor_given_a_gradient() -> None:
    runs = Runs(torch.tensor([2, 0, 2, 1, 0]), 2)
    assert runs.row_Q.tolist() == [1, 4, 3]
    assert runs.end_G.tolist() == [2, 3]


@pytest.mark.parametrize("input_form", ["ragged", "many-ranks", "summed", "groups", "pivoted"])
def test_rows_that_gpus_leave_undefined_reach_neither_answers_nor_gradients(input_form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral", num_local_experts=12)
    layer = expert_layers(model)[0]
    weights = read_experts(model.get_submodule(layer.name), layer)
    factored = replace_experts(model, layer, layer_factors(layer, weights, input_form, "groups"))
    call = torch.randn(20, layer.hidden, requires_grad=True), torch.randint(12, (20, 2)), torch.rand(20, 2)
    expected = factored(*call)
    expected.square().sum().backward()
    gradient, call[0].grad = call[0].grad, None

    class Undefined(torch.autograd.Function):
        """As a GPU's kernel: rows behind the last run hold anything, in the answer and in its gradient."""

        @staticmethod
        def forward(ctx: Any, y_PN: torch.Tensor, end: int) -> torch.Tensor:
            ctx.end = end
            return torch.cat([y_PN[:end], torch.full_like(y_PN[end:], torch.nan)])

        @staticmethod
        def backward(ctx: Any, grad_PN: torch.Tensor) -> tuple[torch.Tensor, None]:
            assert not grad_PN[ctx.end :].any()
            return grad_PN, None

    class UndefinedGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_PC: torch.Tensor, end: int) -> torch.Tensor:
            ctx.end = end
            return x_PC.clone()

        @staticmethod
        def backward(ctx: Any, grad_PC: torch.Tensor) -> tuple[torch.Tensor, None]:
            return torch.cat([grad_PC[: ctx.end], torch.full_like(grad_PC[ctx.end :], torch.nan)]), None

    real = factor_sides.grouped_linear

    def as_on_a_gpu(x_PC: torch.Tensor, weight_GNC: torch.Tensor, end_G: torch.Tensor) -> torch.Tensor:
        end = int(end_G[-1])
        return Undefined.apply(real(UndefinedGradient.apply(x_PC, end), weight_GNC, end_G), end)

    monkeypatch.setattr(grouped, "keeps_tail", lambda group_P: True)
    for module in (factor_sides, pivoted_side):
        monkeypatch.setattr(module, "grouped_linear", as_on_a_gpu)
    answer = factored(*call)
    answer.square().sum().backward()
    assert torch.allclose(answer, expected, atol=1e-5)
    assert torch.allclose(call[0].grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "forms", [("latent", "basis"), ("ragged", "many-ranks"), ("summed", "equal"), ("groups", "dense"), ("pivoted", "pivoted-equal")]
)
def test_compiles_into_one_graph_for_any_number_of_tokens(forms: tuple[str, str]) -> None:
    model = tiny_model("mixtral", num_local_experts=12)
    layer = expert_layers(model)[0]
    factors = layer_factors(layer, read_experts(model.get_submodule(layer.name), layer), *forms)
    factored = replace_experts(model, layer, factors)
    torch._dynamo.reset()
    compiled = torch.compile(factored, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        call = torch.randn(tokens, layer.hidden), torch.randint(12, (tokens, 2)), torch.rand(tokens, 2)
        with torch.no_grad():
            assert torch.allclose(compiled(*call), factored(*call), atol=2e-5), "also once the other has arranged the parameters"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(("input_form", "output_form"), [*product(INPUT_FORMS, ["basis"]), *product(["latent"], OUTPUT_FORMS)])
def test_a_traced_graph_follows_the_router(input_form: str, output_form: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "SMALL_EXPERT", 1 << 20 if small else 0)
    factored = rounded_layer("mixtral", input_form, output_form, num_local_experts=12).float()
    traced_with, call = calls_of(factored, 9, 9)
    with torch.no_grad():
        factored(*traced_with)
        traced = torch.jit.trace(factored, traced_with, check_trace=False)
        assert torch.allclose(traced(*call), factored(*call), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize(("input_form", "output_form"), [*product(INPUT_FORMS, ["basis"]), *product(["latent"], OUTPUT_FORMS)])
def test_never_asks_what_a_tensor_holds_in_a_graph(name: str, input_form: str, output_form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without content stand for those of a GPU: whatever would make the host wait for it, and break a CUDA graph, is an error."""
    model = TINY[name]()
    layer = expert_layers(model)[0]
    factors = layer_factors(layer, read_experts(model.get_submodule(layer.name), layer), input_form, output_form)
    factored = replace_experts(model, layer, factors).to("meta", torch.bfloat16)
    for each in (experts, pivoted_side):
        monkeypatch.setattr(each, "in_graph", lambda: True)
    hidden = torch.empty(layer.experts * 10, layer.hidden, device="meta", dtype=torch.bfloat16)
    choice = torch.empty(len(hidden), 2, device="meta")
    call = (hidden,) if layer.routing == "scaled-inputs" else (hidden, choice.long(), choice)
    with torch.no_grad():
        assert factored(*call).shape == hidden.shape


def test_an_unknown_structure_says_that_the_checkpoint_is_newer() -> None:
    with pytest.raises(ValueError, match="'spline' is not known for this side: a newer version"):
        make_side({"structure": "spline"}, 4, 8, 8, True)


def test_factors_of_one_side_are_random_but_repeatable() -> None:
    weight_ENM = torch.zeros(4, 6, 5)
    assert torch.equal(side_factors("equal", weight_ENM).reconstruct(), side_factors("equal", weight_ENM).reconstruct())
