"""The whole way for every family and every method: files, calibration, plan, factors, export, and another process that loads the result.

That other process is one for all cases; it has never seen the models that the exports come from.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import TINY, save_tiny, tiny_batch, tiny_tokenizer
from torch import Tensor

from moesvd_core.architectures.disk_names import expert_tensor
from moesvd_core.architectures.families import family_of
from moesvd_core.architectures.layout import ExpertLayer
from moesvd_core.architectures.streaming import LayerStream
from moesvd_core.calibration import Calibration, calibrate
from moesvd_core.checkpoint.apply import compressed
from moesvd_core.checkpoint.export import export_streamed
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.decomposition.registry import METHODS
from moesvd_core.pipeline import Pipeline
from moesvd_core.planning import Plan, Recipe

torch.set_num_threads(1)
SHARE = 0.6
"""Of the largest ratio that a method reaches on a model: something is left to answer with."""
FORMS = {"per-expert": False, "fused": True}
Reload = Callable[[list[Path]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def reload(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reload]:
    """Gives the logits of exports, by FOLDER/NAME, as a process of its own finds them after `import moesvd_core`."""
    root = tmp_path_factory.mktemp("reload")
    batch, output, said = root / "batch.safetensors", root / "logits.safetensors", root / "said.txt"
    save_file(tiny_batch(), batch)
    script = Path(__file__).parent / "checkpoint" / "reload.py"
    with said.open("w") as errors, subprocess.Popen(
        [sys.executable, script, "import", batch], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=root,
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(folders: list[Path]) -> dict[str, Tensor]:
            print(json.dumps([str(output), *map(str, folders)]), file=process.stdin, flush=True)
            assert process.stdout.readline() == "done\n", said.read_text()
            with safe_open(output, "pt") as answers:
                assert not answers.metadata()
            return load_file(output)

        yield ask
        process.stdin.close()


def factors_of(pipeline: Pipeline, plan: Plan, layer: ExpertLayer) -> LayerFactors | None:
    with pipeline.stream.layer(layer.index):
        return pipeline.factors(plan, layer.index)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TINY)
def test_every_method_survives_the_whole_way(name: str, form: str, reload: Reload, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and runs away from the wolf " * 40, encoding="utf-8")
    source = save_tiny(name, tmp_path / "source", fused=FORMS[form])
    stream = LayerStream(source)
    statistics = calibrate(stream, tiny_tokenizer(), Calibration(dataset=str(text), samples=2, length=12))
    pipeline, whole = Pipeline(stream, statistics), TINY[name]()
    expected = {}
    for method in METHODS:
        reach = pipeline.max_ratio(Recipe(method=method))
        plan = pipeline.plan(Recipe(method=method, ratio=SHARE * reach))
        assert plan.ratio >= SHARE * reach
        found = [(layer, factors_of(pipeline, plan, layer)) for layer in stream.expert_layers]
        assert any(factors for _, factors in found)
        with torch.no_grad():
            expected[method] = compressed(whole, [(layer, factors) for layer, factors in found if factors])(**tiny_batch()).logits
        made = export_streamed(stream, partial(factors_of, pipeline, plan), tmp_path / "made" / method)
        assert (made.counts.parameters, made.counts.bytes) == (plan.parameters, plan.bytes)
        only_experts_differ(source, made.path, name)
    logits = reload([tmp_path / "made" / method for method in expected])
    assert expected.keys() == METHODS.keys()
    for method in expected:
        assert torch.allclose(logits[f"made/{method}"], expected[method], atol=1e-5, rtol=1e-5), method


def only_experts_differ(source: Path, made: Path, name: str) -> None:
    """Embeddings, attention, dense layers, shared experts and routers are the same bit for bit."""
    before, after = (load_file(folder / "model.safetensors") for folder in (source, made))
    family = family_of(TINY[name]().config)
    others = [key for key in before if not expert_tensor(key, family)]
    assert others
    for key in others:
        assert after[key].dtype == before[key].dtype and torch.equal(after[key], before[key]), f"{made.name}: {key}"
