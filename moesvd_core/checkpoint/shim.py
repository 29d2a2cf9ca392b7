"""The one file of code that an export carries, so that it loads with `trust_remote_code=True` where nothing of this project is installed.

It is put together from the modules that the project itself runs (`_FACTORED`, and deepseek.py for that family): there is no second version
of anything. Those modules import torch, transformers and each other only.
"""

import ast
import inspect
from types import ModuleType

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from moesvd_core import batched, cpu_tiles, experts, factor_sides, grouped, kept_router, kernels, pivoted_side, rival_sides, sides, tiles
from moesvd_core.architectures import deepseek
from moesvd_core.checkpoint import plugin
from moesvd_core.errors import UnsupportedModelError

MODULE = "modeling_moesvd"
FILE = f"{MODULE}.py"
_FACTORED = (kernels, cpu_tiles, tiles, grouped, batched, sides, factor_sides, experts, pivoted_side, rival_sides, kept_router, plugin)
"""What loads factored experts, each after the ones that it imports."""

_HEAD = '''"""Loads this checkpoint with `trust_remote_code=True`, without the package that made it.

Copied by moesvd from its own source; Apache License 2.0.
"""
'''
_MODEL = '''

class {name}(transformers.{name}):
    """{name} of transformers; importing this file made transformers know the format of the experts."""

    @classmethod
    def is_custom_code(cls):
        return False  # tensors have the names of transformers' own class, and are renamed as that one's
'''
_NO_LIBRARY = '''def cpu_library():
    """The package compiles functions for CPUs; what is downloaded does without a compiler."""


'''
_LANGUAGE_MODEL = '''
    @classmethod
    def from_pretrained(cls, *args, config=None, **kwargs):
        return super().from_pretrained(*args, config=config and language_config(config), **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        return super()._from_config(language_config(config), **kwargs)
'''
"""What a class needs besides when it is given the configuration of a whole model that it is a part of."""


def whole_class(architecture: str, declared: str | None) -> str | None:
    """The class that reads images beside text, of which `architecture` is at most the language model; None where there is none.

    Args:
        declared: the class that config.json names.
    """
    known = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    return next((name for name in (declared, architecture) if name in known), None)


def auto_map(architecture: str, declared: str | None = None) -> dict[str, str]:
    """The entry of config.json that points transformers to the file; `declared` as in `whole_class`."""
    mapped = {"AutoModelForCausalLM": f"{MODULE}.{architecture}"}
    whole = whole_class(architecture, declared)
    if whole:
        mapped |= dict.fromkeys(("AutoModelForImageTextToText", "AutoModelForMultimodalLM"), f"{MODULE}.{whole}")
    return {"AutoConfig": f"{MODULE}.{deepseek.DeepseekConfig.__name__}", **mapped} if _ported(architecture) else mapped


def needs_code(architecture: str, factored: bool) -> bool:
    """Whether transformers alone cannot load an export of the model class."""
    return factored or _ported(architecture)


def shim_source(architecture: str, factored: bool = True, declared: str | None = None) -> str:
    """Python source of the file for a model class ("MixtralForCausalLM"), with or without the format of factored experts.

    Args:
        declared: as in `whole_class`.

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
    whole = whole_class(architecture, declared)
    tail = "" if _ported(architecture) else _MODEL.format(name=architecture)
    if whole not in (None, architecture):
        tail += _LANGUAGE_MODEL + _MODEL.format(name=whole)
    return _HEAD + "\n" + "\n".join(imports) + "\n\n" + "\n\n\n".join(bodies) + "\n" + tail


def _ported(architecture: str) -> bool:
    return architecture == deepseek.DeepseekForCausalLM.__name__


def _split(module: ModuleType) -> tuple[list[str], str]:
    """A module's imports of others, and what follows its imports; our own errors become `ValueError`, and nothing calls a compiler."""
    source = inspect.getsource(module)
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    body = "\n".join(source.splitlines()[max(node.end_lineno or 0 for node in nodes) :]).strip("\n")
    imports = []
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("moesvd_core"):
            imports.append(ast.unparse(node))
        elif node.module == "moesvd_core.errors":
            body = "\n".join(f"{name.name} = ValueError" for name in node.names) + "\n\n\n" + body
        elif node.module == "moesvd_core.cpu_kernels":
            body = _NO_LIBRARY + body
    return imports, body
