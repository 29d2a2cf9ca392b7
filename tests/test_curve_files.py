"""Curves come back from disk as they were, and damage is told."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from moesvd_core.curve_files import are_current, load_curves, save_curves
from moesvd_core.errors import RunError
from moesvd_core.planning import SideCurve
from moesvd_core.tensor_files import load_tensors, save_tensors

DEMO = Path(__file__).parents[1] / "assets" / "demo-run"


def curve(layer: int) -> SideCurve:
    costs = {"rank_cost_S": np.array([7, 7]), "dense_cost_S": np.array([40, 40])}
    flops = {"load_S": np.ones(2), "rank_flops_S": np.full(2, 7.0), "dense_flops_S": np.full(2, 40.0)}
    return SideCurve(layer, "input", "per-expert", np.array([[3.0, 1.0, 0.0]] * 2), np.array([[2.0, 1.0]] * 2), **costs, **flops)


def test_curves_come_back_as_they_were(tmp_path: Path) -> None:
    save_curves(tmp_path / "a.safetensors", [curve(3), curve(4)])
    loaded = load_curves(tmp_path / "a.safetensors")
    assert loaded is not None
    for mine, theirs in zip([curve(3), curve(4)], loaded, strict=True):
        assert (mine.layer, mine.side, mine.structure) == (theirs.layer, theirs.side, theirs.structure)
        for name in ("loss_SR", "gain_SR", "rank_cost_S", "dense_cost_S", "load_S", "rank_flops_S", "dense_flops_S"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))


def test_a_flipped_bit_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_curves(file, [curve(3)])
    data = file.read_bytes()
    file.write_bytes(data[:-7] + bytes([data[-7] ^ 4]) + data[-6:])
    with pytest.raises(RunError, match=r"a\.safetensors is damaged \(its content does not match its digest\): delete it"):
        load_curves(file)


def test_files_of_an_earlier_version_have_no_digest_and_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_curves(file, [curve(3)])
    with safe_open(file, "pt") as stored:
        facts = json.loads(stored.metadata()["moesvd"])["facts"]
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    save_file(tensors, file, facts)
    loaded = load_curves(file)
    assert loaded is not None
    np.testing.assert_array_equal(loaded[0].loss_SR, curve(3).loss_SR)
    assert load_curves(next(DEMO.glob("curves/*/layer-000.safetensors")))  # the shipped run is of one


def test_a_file_in_another_form_is_no_curve(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_curves(file, [curve(3)])
    assert are_current(file)
    tensors, facts = load_tensors(file)
    save_tensors(file, tensors, {**facts, "format": "moesvd-curves-0"})
    assert not are_current(file)
    assert load_curves(file) is None
    assert all(are_current(shipped) for shipped in DEMO.glob("curves/*/*.safetensors"))


def test_no_file_is_no_curve_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    assert load_curves(tmp_path / "a.safetensors") is None
    save_curves(tmp_path / "a.safetensors", [curve(3)])
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(RunError, match=r"a\.safetensors is damaged"):
        load_curves(tmp_path / "a.safetensors")
