"""Exports of what rivals store, and of factors without identities, of every family, loaded in fresh processes: with the package, and with
the code in the export alone."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_factors import kept_factors, layer_factors, narrow_factors
from tiny_models import TINY, save_tiny, tiny_batch
from transformers import PreTrainedModel

from moesvd_core.architectures.experts_io import read_experts
from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.find import expert_layers
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.checkpoint.apply import compressed
from moesvd_core.checkpoint.export import export_streamed
from moesvd_core.decomposition.factors import LayerFactors

torch.set_num_threads(1)
MAKERS = {
    "pruned": (partial(kept_factors, kept=(0, 2, 3)), partial(layer_factors, input_form="base-delta", output_form="merged")),
    "narrow": (narrow_factors, partial(layer_factors, input_form="merged", output_form="base-delta")),
    "pivoted": (
        partial(layer_factors, input_form="pivoted", output_form="pivoted-equal"),
        partial(layer_factors, input_form="pivoted-full", output_form="pivoted"),
    ),
}
"""What the routed layers of an export are made into, in turns."""


def made(model: PreTrainedModel, kind: str) -> dict[int, tuple[ExpertLayer, LayerFactors]]:
    return {
        layer.index: (layer, MAKERS[kind][place % 2](layer, read_experts(model.get_submodule(layer.name), layer)))
        for place, layer in enumerate(expert_layers(model))
    }


def factors_of(found: dict[int, tuple[ExpertLayer, LayerFactors]], layer: ExpertLayer) -> LayerFactors:
    return found[layer.index][1]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAMILY/KIND for every family and kind, and the logits that they must give."""
    root = tmp_path_factory.mktemp("rivals")
    expected = {}
    for name in TINY:
        model, source = TINY[name](), save_tiny(name, root / name / "source")
        for kind in MAKERS:
            found = made(model, kind)
            with torch.no_grad():
                expected[f"{name}/{kind}"] = compressed(model, found.values())(**tiny_batch()).logits
            written = export_streamed(ModelFiles.open(source), partial(factors_of, found), root / name / kind)
            stored = sum(factors.parameters for _, factors in found.values())
            native = sum(layer.parameters for layer, _ in found.values())
            assert written.counts.original_parameters - written.counts.parameters == native - stored
    save_file(expected, root / "expected.safetensors")
    return root


@pytest.mark.parametrize("way", ["import", "trust"])
def test_every_export_gives_the_expected_logits(exports: Path, way: str) -> None:
    batch, output = exports / "batch.safetensors", exports / f"{way}.safetensors"
    save_file(tiny_batch(), batch)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(exports / f"modules-{way}"), "OMP_NUM_THREADS": "1"}
    folders = [f"{name}/{kind}" for name in TINY for kind in MAKERS]
    script = Path(__file__).with_name("reload.py")
    asked = json.dumps([str(output), *(str(exports / each) for each in folders)])
    command = [sys.executable, script, way, batch]
    subprocess.run(command, check=True, env=environment, input=asked, text=True, capture_output=True, cwd=exports)
    with safe_open(output, "pt") as stream:
        assert not stream.metadata()
    logits, expected = load_file(output), load_file(exports / "expected.safetensors")
    for folder in folders:
        assert torch.allclose(logits[folder], expected[folder], atol=1e-5, rtol=1e-5), folder


@pytest.mark.parametrize("kind", ["narrow", "pivoted"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_a_dense_export_holds_what_the_factors_stand_for(name: str, kind: str, tmp_path: Path) -> None:
    model, source = TINY[name](), save_tiny(name, tmp_path / "source")
    found = made(model, kind)
    written = export_streamed(ModelFiles.open(source), partial(factors_of, found), tmp_path / "dense", format="dense")
    assert written.verification.logit_difference is not None and written.verification.logit_difference <= 1e-6
    assert written.counts.parameters == written.counts.original_parameters
