"""Make transformers know our checkpoints and the family that we port, without making `import moesvd_core` slow.

Both need transformers, which takes seconds and a third of a gigabyte to import; a worker that waits for its turn, or a command that lists
runs, needs neither. So each is registered at once when the part of transformers that asks for it is already there, and else at the moment
when that part is imported: in either order, `from_pretrained` finds it.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType

REGISTRARS: Mapping[str, str] = MappingProxyType({
    "transformers.modeling_utils": "moesvd_core.checkpoint.plugin",
    "transformers.models.auto.modeling_auto": "moesvd_core.architectures.deepseek",
})
"""Module whose import makes a registration necessary -> module of ours that registers itself when it is imported.

Nothing can be loaded before the former is imported, and neither is imported by what the latter imports itself.
"""


def register_when_needed() -> None:
    """Register what can be asked for already; the rest as soon as it can. Calling it again changes nothing."""
    for trigger, registrar in REGISTRARS.items():
        if trigger in sys.modules:
            importlib.import_module(registrar)
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(importlib.abc.MetaPathFinder):
    """Waits for the triggers to be imported."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name not in REGISTRARS or self._searching:
            return None
        self._searching = True  # whom we ask for the real place of the module asks us again
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, REGISTRARS[name])
        return spec


class _ThenRegister(importlib.abc.Loader):
    """Imports the trigger as its own loader would, then what registers itself."""

    def __init__(self, loader: importlib.abc.Loader, registrar: str) -> None:
        self._loader, self._registrar = loader, registrar

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # whoever asks later meets the real one
        self._loader.exec_module(module)
        importlib.import_module(self._registrar)
