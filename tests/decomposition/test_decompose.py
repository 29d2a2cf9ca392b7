"""One layer, one method: what is offered, what a plan gets, and what a file keeps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_layer import INDEX, TinyLayer, tiny_layer

from moesvd_core.decomposition import decompose as module
from moesvd_core.decomposition.decompose import Decomposition, decompose, is_outdated, load
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.decomposition.registry import METHODS, method
from moesvd_core.errors import InputError, RunError, StatisticsError
from moesvd_core.planning import COUPLED, DENSE, LayerPlan, SidePlan
from moesvd_core.tensor_files import load_tensors, save_tensors


@pytest.fixture(scope="module")
def tiny() -> TinyLayer:
    return tiny_layer(8, 10, 14)


def decomposed(tiny: TinyLayer, name: str) -> Decomposition:
    return decompose(tiny.weights, tiny.layer, tiny.statistics, method(name))


def layer_plan(input_side: tuple[str, tuple[int, ...]], output_side: tuple[str, tuple[int, ...]], layer: int = INDEX) -> LayerPlan:
    sides = [SidePlan(structure, ranks, 0, 0.0) for structure, ranks in (input_side, output_side)]  # type: ignore[arg-type]
    return LayerPlan(layer, True, "test", sides[0], sides[1], 0)


def tensors(factors: LayerFactors) -> torch.Tensor:
    return torch.cat([factors.input.reconstruct().flatten(), factors.output.reconstruct().flatten()])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_offers_a_curve_for_each_side_and_structure(tiny: TinyLayer, name: str) -> None:
    curves = decomposed(tiny, name).curves
    structures = [structure for structure in method(name).structures if structure != "base-delta" or not method(name).screen]
    wanted = [(side, structure) for side in ("input", "output") for structure in structures]
    assert [(curve.side, curve.structure) for curve in curves] == wanted
    for curve in curves:
        assert curve.layer == INDEX
        assert np.isfinite(curve.loss_SR).all() and (curve.loss_SR >= 0).all()
        assert (np.diff(curve.gain_SR, axis=1) <= 0).all()


def test_the_host_decomposes_what_is_no_number_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_layer(8, 10, 14)
    given = (tiny.weights, tiny.layer, tiny.statistics, method("latent"))
    host, own = decompose(*given), module._decomposed

    def broken(*given: object) -> Decomposition:
        if given[-1] == "cuda":
            raise StatisticsError("loss of its input side is not finite")
        return own(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_decomposed", broken)
    with pytest.warns(UserWarning, match=f"layer {INDEX} was decomposed on the host, which takes longer: on cuda, loss of its input side"):
        found = decompose(*given, device="cuda")
    assert all(np.array_equal(ours.loss_SR, theirs.loss_SR) for ours, theirs in zip(found.curves, host.curves, strict=True))
    tiny.statistics.slope_EN[0, 0] = torch.nan
    with pytest.raises(StatisticsError, match="slope_EN holds NaN or Inf"):
        decompose(*given, device="cuda")


@pytest.mark.parametrize("name", METHODS)
def test_a_file_gives_the_same_curves_and_factors_again(tiny: TinyLayer, name: str, tmp_path: Path) -> None:
    made = decomposed(tiny, name)
    made.save(tmp_path / "layer.safetensors")
    again = load(tmp_path / "layer.safetensors", tiny.weights, tiny.layer, tiny.statistics, method(name))
    structure = made.curves[-1].structure
    slots = made.curves[-1].slots
    first = (DENSE, 0, 0, DENSE, DENSE, 0, 0, 0) if structure == "kept-experts" else (2,) * slots
    plan = layer_plan((structure, first), (structure, first if structure in COUPLED else (3,) * slots))
    assert torch.equal(tensors(made.materialise(plan)), tensors(again.materialise(plan)))
    for before, after in zip(made.curves, again.curves, strict=True):
        for field in ("loss_SR", "gain_SR", "rank_cost_S", "rank_flops_S", "dense_cost_S", "load_S"):
            assert np.array_equal(getattr(before, field), getattr(after, field))


def test_a_base_is_screened_side_by_side(tmp_path: Path) -> None:
    """Experts alike in gate and up alone: a base for these, none for down; and a file gives the same again."""
    alike = tiny_layer(8, 10, 14)
    alike.weights.input_END[:] = alike.weights.input_END[:1] + 0.3 * alike.weights.input_END
    made = decomposed(alike, "auto")
    made.save(tmp_path / "layer.safetensors")
    again = load(tmp_path / "layer.safetensors", alike.weights, alike.layer, alike.statistics, method("auto"))
    for each in (made, again):
        assert [curve.side for curve in each.curves if curve.structure == "base-delta"] == ["input"]
    base = decomposed(alike, "auto").materialise(layer_plan(("base-delta", (2, DENSE, 0, 1, 1, 1, 1, 1)), ("latent", (3,))))
    assert torch.equal(base.input.reconstruct()[1], alike.weights.input_END[1])
    with pytest.raises(InputError, match="structure must be dense or one of"):
        made.materialise(layer_plan(("latent", (3,)), ("base-delta", (1,) * 8)))


def test_sides_may_take_different_structures(tiny: TinyLayer) -> None:
    made = decomposed(tiny, "auto")
    factors = made.materialise(layer_plan(("latent", (4,)), ("pivoted", (3,) * 7 + (DENSE,))))
    assert factors.parameters == 4 * (10 + 8 * 28) + 7 * (3 * (10 + 14 + 1) - 3**2) + 10 * 14


def test_a_dense_plan_is_the_original_with_its_biases(tiny: TinyLayer) -> None:
    tiny.weights.input_bias_EN = torch.zeros(8, 28)
    try:
        factors = decomposed(tiny, "fisher").materialise(layer_plan(("dense", (DENSE,) * 8), ("dense", (DENSE,) * 8)))
    finally:
        bias, tiny.weights.input_bias_EN = tiny.weights.input_bias_EN, None
    assert factors.input_bias_EN is bias
    assert factors.input.reconstruct() is tiny.weights.input_END


def test_plans_that_cannot_be_carried_out_are_refused(tiny: TinyLayer) -> None:
    made = decomposed(tiny, "fisher")
    dense = ("dense", (DENSE,) * 8)
    with pytest.raises(InputError, match=r"of layer 3, which was decomposed, got that of layer 4"):
        made.materialise(layer_plan(dense, dense, layer=4))
    with pytest.raises(InputError, match=r"dense or one of pivoted for fisher, got latent"):
        made.materialise(layer_plan(("latent", (2,)), dense))
    with pytest.raises(InputError, match=r"input ranks of layer 3 must be 8 numbers in \[-1, 10\], got \(2, 2\)"):
        made.materialise(layer_plan(("pivoted", (2, 2)), dense))
    with pytest.raises(InputError, match=r"output ranks of layer 3 must be 8 numbers in \[-1, 10\]"):
        made.materialise(layer_plan(dense, ("pivoted", (11,) * 8)))


@pytest.mark.parametrize("cut", [0, 7, 200])
def test_a_damaged_file_is_an_error_that_names_it(tiny: TinyLayer, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "layer.safetensors"
    decomposed(tiny, "svd").save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(RunError, match=r"layer\.safetensors is (missing|damaged)"):
        load(path, tiny.weights, tiny.layer, tiny.statistics, method("svd"))


def test_a_flipped_bit_is_an_error_that_names_the_file(tiny: TinyLayer, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    decomposed(tiny, "svd").save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-7] + bytes([data[-7] ^ 4]) + data[-6:])
    with pytest.raises(RunError, match=r"layer\.safetensors is damaged \(its content does not match its digest\): delete it"):
        load(path, tiny.weights, tiny.layer, tiny.statistics, method("svd"))


@pytest.mark.parametrize("digest", [True, False])
def test_a_file_of_an_earlier_version_is_outdated(tiny: TinyLayer, tmp_path: Path, digest: bool) -> None:
    path = tmp_path / "layer.safetensors"
    decomposed(tiny, "svd").save(path)
    assert not is_outdated(path)
    tensors, facts = load_tensors(path)
    earlier = {**facts, "format": "moesvd-decomposition-1"}
    save_tensors(path, tensors, earlier) if digest else save_file(tensors, path, earlier)
    assert is_outdated(path)


def test_what_is_no_file_of_any_version_is_not_outdated_but_damaged(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    assert not is_outdated(path)
    path.write_bytes(b"no tensors")
    assert not is_outdated(path)


def test_a_missing_file_is_an_error_that_names_it(tiny: TinyLayer, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"layer\.safetensors is missing"):
        load(tmp_path / "layer.safetensors", tiny.weights, tiny.layer, tiny.statistics, method("svd"))


def test_a_file_of_another_method_is_refused(tiny: TinyLayer, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    decomposed(tiny, "svd").save(path)
    with pytest.raises(RunError, match="decompose layer 3 again"):
        load(path, tiny.weights, tiny.layer, tiny.statistics, method("fisher"))


def test_a_file_without_all_its_tensors_is_refused(tiny: TinyLayer, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    decomposed(tiny, "svd").save(path)
    tensors, facts = load_tensors(path)
    save_tensors(path, {name: tensor for name, tensor in tensors.items() if not name.endswith("basis")}, facts)
    with pytest.raises(RunError, match="lacks 'basis'"):
        load(path, tiny.weights, tiny.layer, tiny.statistics, method("svd"))
