"""Every family's exports, loaded again in fresh processes: with the package, with the code in the export, with both, and with neither."""

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
from tiny_factors import model_factors
from tiny_models import TINY, save_tiny, tiny_batch
from torch import Tensor

from moesvd_core.architectures.disk_names import expert_tensor
from moesvd_core.architectures.families import family_of
from moesvd_core.architectures.files import ModelFiles
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.checkpoint.apply import compressed
from moesvd_core.checkpoint.export import export_streamed
from moesvd_core.decomposition.factors import LayerFactors

torch.set_num_threads(1)
KINDS = ("factored", "factored-fused", "dense")
STACKED = ("mixtral", "nemotron_h", "granitemoe")
EXPORTS = [*(f"{name}/{kind}" for name in TINY for kind in KINDS), *(f"{name}/dense-fused" for name in STACKED)]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAMILY/KIND made from FAMILY/source-KIND, the first of several routed layers left as it is; expected.safetensors."""
    root = tmp_path_factory.mktemp("exports")
    expected = {}
    for name in TINY:
        model = TINY[name]()
        layers = model_factors(model, leave=1) or model_factors(model)
        factors = {layer.index: found for layer, found in layers}
        with torch.no_grad():
            expected[name] = compressed(model, layers)(**tiny_batch()).logits
        for kind in (folder.split("/")[1] for folder in EXPORTS if folder.startswith(f"{name}/")):
            source = save_tiny(name, root / name / f"source-{kind}", fused=kind.endswith("fused"))
            path = root / name / kind
            made = export_streamed(ModelFiles.open(source), partial(chosen, factors), path, format=kind.removesuffix("-fused"))
            assert made.verification.logit_difference <= 1e-6
    save_file(expected, root / "expected.safetensors")
    return root


def chosen(factors: dict[int, LayerFactors], layer: ExpertLayer) -> LayerFactors | None:
    return factors.get(layer.index)


def answers(root: Path, way: str, folders: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Logits and errors of exports loaded in a process of its own."""
    batch, output = root / "batch.safetensors", root / f"{way}.safetensors"
    save_file(tiny_batch(), batch)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / f"modules-{way}"), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("reload.py")
    asked = json.dumps([str(output), *(str(root / folder) for folder in folders)])
    command = [sys.executable, script, way, batch]
    subprocess.run(command, check=True, env=environment, input=asked, text=True, capture_output=True, cwd=root)
    with safe_open(output, "pt") as stream:
        return load_file(output), dict(stream.metadata() or {})


def test_with_the_package_every_export_gives_the_expected_logits(exports: Path) -> None:
    logits, errors = answers(exports, "import", EXPORTS)
    assert not errors
    expected = load_file(exports / "expected.safetensors")
    for folder in EXPORTS:
        assert torch.allclose(logits[folder], expected[folder.split("/")[0]], atol=1e-5, rtol=1e-5), folder


def test_with_trust_alone_nothing_of_ours_need_be_installed(exports: Path) -> None:
    folders = [*(f"{name}/factored" for name in TINY), "deepseek/dense"]
    logits, errors = answers(exports, "trust", folders)
    assert not errors
    expected = load_file(exports / "expected.safetensors")
    for folder in folders:
        assert torch.allclose(logits[folder], expected[folder.split("/")[0]], atol=1e-5, rtol=1e-5), folder


def test_package_and_trust_together_do_not_disturb_each_other(exports: Path) -> None:
    folders = [f"{name}/factored" for name in ("mixtral", "deepseek", "gpt_oss")]
    logits, errors = answers(exports, "both", folders)
    assert not errors
    expected = load_file(exports / "expected.safetensors")
    for folder in folders:
        assert torch.allclose(logits[folder], expected[folder.split("/")[0]], atol=1e-5, rtol=1e-5), folder


def test_with_neither_factored_exports_fail_loudly_and_dense_ones_load(exports: Path) -> None:
    native = [name for name in TINY if name != "deepseek"]  # transformers does not know this one
    logits, errors = answers(exports, "neither", [folder for folder in EXPORTS if not folder.endswith("dense-fused")])
    assert errors.keys() == {f"{name}/{kind}" for name in TINY for kind in ("factored", "factored-fused")} | {"deepseek/dense"}
    for name in native:
        assert "mismatch" in errors[f"{name}/factored"]
        assert "mismatch" in errors[f"{name}/factored-fused"]
    expected = load_file(exports / "expected.safetensors")
    for name in native:
        assert torch.allclose(logits[f"{name}/dense"], expected[name], atol=1e-5, rtol=1e-5), name


@pytest.mark.parametrize("folder", EXPORTS)
def test_everything_but_the_experts_is_the_same_bit_for_bit(exports: Path, folder: str) -> None:
    name, kind = folder.split("/")
    source, made = (load_file(exports / name / each / "model.safetensors") for each in (f"source-{kind}", kind))
    family = family_of(TINY[name]().config)
    others = {key for key in source if not expert_tensor(key, family)}
    assert others
    if kind.startswith("dense"):
        assert {key: (tensor.dtype, tensor.shape) for key, tensor in made.items()} == {
            key: (tensor.dtype, tensor.shape) for key, tensor in source.items()
        }
    for key in others:
        assert made[key].dtype == source[key].dtype
        assert torch.equal(made[key], source[key]), key
    if kind.startswith("dense"):
        assert made.keys() == source.keys()
        assert all(made[key].shape == source[key].shape for key in source)
        assert any(not torch.equal(made[key], source[key]) for key in source)
    else:
        factored = {layer.index for layer, _ in (model_factors(TINY[name](), leave=1) or model_factors(TINY[name]()))}
        kept = {key for key in source.keys() - others if expert_tensor(key, family).layer not in factored}
        assert kept == {key for key in source.keys() - others if key in made and made[key].numel()}
        assert all(torch.equal(made[key], source[key]) for key in kept)
