"""The one file of code that an export carries, so that it loads with `trust_remote_code=True` where nothing of this project is installed.

It is put together from the modules that the project itself runs (`_FACTORED`, and deepseek.py for that family): there is no second version
of anything. Those modules import torch, transformers and each other only.
"""

import ast
import inspect
from types import ModuleType

import transformers

from moesvd_core import batched, experts, factor_sides, grouped, kept_router, kernels, pivoted_side, rival_sides, sides, tiles
from moesvd_core.architectures import deepseek
from moesvd_core.checkpoint import plugin
from moesvd_core.errors import UnsupportedModelError

MODULE = "modeling_moesvd"
FILE = f"{MODULE}.py"
_FACTORED = (kernels, tiles, grouped, batched, sides, factor_sides, experts, pivoted_side, rival_sides, kept_router, plugin)
"""What loads factored experts, each after the ones that it imports."""

_HEAD = '''"""Loads this checkpoint with `trust_remote_code=True`, without the package that made it.

Copied by moesvd from its own source; Apache License 2.0.
"""
'''
_MODEL = '''

class {name}(transformers.{name}):
    """{name} of transformers; importing this file made transformers know the format of the experts."""
'''


def auto_map(architecture: str) -> dict[str, str]:
    """The entry of config.json that points transformers to the file."""
    mapped = {"AutoModelForCausalLM": f"{MODULE}.{architecture}"}
    return {"AutoConfig": f"{MODULE}.{deepseek.DeepseekConfig.__name__}", **mapped} if _ported(architecture) else mapped


def needs_code(architecture: str, factored: bool) -> bool:
    """Whether transformers alone cannot load an export of the model class."""
    return factored or _ported(architecture)


def shim_source(architecture: str, factored: bool = True) -> str:
    """Python source of the file for a model class ("MixtralForCausalLM"), with or without the format of factored experts.

    Raises:
        UnsupportedModelError: transformers has no such class, and neither have we.
    """
    modules = [*([deepseek] if _ported(architecture) else []), *(_FACTORED if factored else [])]
    if not _ported(architecture) and not hasattr(transformers, architecture):
        raise UnsupportedModelError(f"model class {architecture} is neither in transformers {transformers.__version__} nor ported here")
    imports: dict[str, None] = {"import transformers": None}
    bodies = []
    for module in modules:
        own, body = _split(module)
        imports |= dict.fromkeys(own)
        bodies.append(body)
    tail = "" if _ported(architecture) else _MODEL.format(name=architecture)
    return _HEAD + "\n" + "\n".join(imports) + "\n\n" + "\n\n\n".join(bodies) + "\n" + tail


def _ported(architecture: str) -> bool:
    return architecture == deepseek.DeepseekForCausalLM.__name__


def _split(module: ModuleType) -> tuple[list[str], str]:
    """A module's imports of others, and what follows its imports; our own errors become `ValueError`."""
    source = inspect.getsource(module)
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    body = "\n".join(source.splitlines()[max(node.end_lineno or 0 for node in nodes) :]).strip("\n")
    imports = []
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("moesvd_core"):
            imports.append(ast.unparse(node))
        elif node.module == "moesvd_core.errors":
            body = "\n".join(f"{name.name} = ValueError" for name in node.names) + "\n\n\n" + body
    return imports, body
