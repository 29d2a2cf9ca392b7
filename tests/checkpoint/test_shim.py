"""The file of code in an export: whole, of our own source, and saved along by whoever saves the model again."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_factors import model_factors
from tiny_models import TINY, tiny_tokenizer

from moesvd_core.checkpoint.apply import compressed
from moesvd_core.checkpoint.export import export
from moesvd_core.checkpoint.shim import auto_map, shim_source
from moesvd_core.errors import UnsupportedModelError

_SAVE_AGAIN = """
import sys
sys.modules["moesvd_core"] = None
from transformers import AutoModelForCausalLM
first = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
first.save_pretrained(sys.argv[2])
again, info = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
ids = first.dummy_inputs["input_ids"]
assert (first(ids).logits - again(ids).logits).abs().max() < 1e-6
"""


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "DeepseekForCausalLM", "Llama4ForCausalLM"])
def test_imports_nothing_of_ours_and_defines_the_class_it_is_asked_for(architecture: str) -> None:
    tree = ast.parse(shim_source(architecture))
    spared = [node for node in tree.body if isinstance(node, ast.Try)]  # what only some machines have
    assert [ast.unparse(node.body) for node in spared] == ["import triton\nimport triton.language as tl"]
    for node in spared:
        node.body.clear()
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    # Of Python itself, and nothing that reaches out.
    standard = {"ast", "collections", "copy", "functools", "itertools", "threading", "types", "typing", "warnings"}
    assert {name.split(".")[0] for name in imported} <= standard | {"torch", "transformers"}
    defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    defined += [target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)]
    harmless = {"register", "UnsupportedModelError"}  # called before it is defined again; the same each time
    assert {name for name in defined if defined.count(name) > 1} <= harmless, "what comes later would be called in its place"
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert classes >= {architecture, "FactoredExperts", "MoesvdQuantizer", "Runs"}
    assert set(auto_map(architecture).values()) <= {f"modeling_moesvd.{name}" for name in classes}


def test_refuses_a_class_that_nobody_knows() -> None:
    with pytest.raises(UnsupportedModelError, match="UnheardOfForCausalLM is neither in transformers"):
        shim_source("UnheardOfForCausalLM")


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_a_model_loaded_by_trust_saves_its_code_along(name: str, tmp_path: Path) -> None:
    model = TINY[name]()
    made = export(compressed(model, model_factors(model, leave=1)), tiny_tokenizer(), tmp_path / "export").path
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _SAVE_AGAIN, made, tmp_path / "again"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "modeling_moesvd.py").read_text() == (made / "modeling_moesvd.py").read_text()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == [type(model).__name__]
