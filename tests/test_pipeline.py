"""What a pipeline keeps in its folder, and when it makes that again."""

from pathlib import Path

import torch
from tiny_pipeline import calibrated

from moesvd_core.decomposition.decompose import FORMAT
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import Recipe
from moesvd_core.tensor_files import facts_in, load_tensors, save_tensors


def test_a_decomposition_of_an_earlier_version_is_made_again(tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    pipeline = calibrated(tmp_path, samples=4, keep=keep)
    plan = pipeline.plan(Recipe("latent", 0.3))
    with pipeline.stream.layer(0):
        wanted = pipeline.factors(plan, 0)
    file = next(keep.glob("factors/*latent*/layer-000.safetensors"))
    tensors, facts = load_tensors(file)
    earlier = {name: tensor for name, tensor in tensors.items() if "dual" not in name}
    save_tensors(file, earlier, {**facts, "format": "moesvd-decomposition-1"})
    again = Pipeline(pipeline.stream, pipeline.statistics, keep)
    with again.stream.layer(0):
        made = again.factors(plan, 0)
    assert wanted is not None and made is not None
    assert torch.equal(wanted.input.reconstruct(), made.input.reconstruct())
    assert facts_in(file)["format"] == FORMAT
