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

NEEDS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "moesvd_core.checkpoint.plugin": ("transformers.modeling_utils",),
    "moesvd_core.architectures.deepseek": (
        "transformers.models.auto.modeling_auto",
        "transformers.modeling_layers",
        "transformers.models.llama.modeling_llama",
        "transformers.models.deepseek_v2.modeling_deepseek_v2",
    ),
})
"""Module of ours that registers itself when it is imported -> modules of transformers that it builds on.

Nothing can be loaded before the first of them is imported, which is when the registration becomes due. Some of them import each other; so
it waits while any of them is in the middle of being imported.
"""


def register_when_needed() -> None:
    """Register what can be asked for already; the rest as soon as it can. Calling it again changes nothing."""
    watcher = next((finder for finder in sys.meta_path if isinstance(finder, _Watcher)), None)
    if watcher is None:
        watcher = _Watcher()
        sys.meta_path.insert(0, watcher)
    watcher.register_what_is_due()


class _Watcher(importlib.abc.MetaPathFinder):
    """Watches the needed modules being imported."""

    def __init__(self) -> None:
        self._needed = {name for names in NEEDS.values() for name in names}
        self._importing: set[str] = set()
        self._searching = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        """The module's own place, with a loader that tells us when it is imported."""
        if name not in self._needed or self._searching:
            return None
        self._searching = True  # whom we ask for the real place of the module asks us again
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Watched(spec.loader, self)
        return spec

    def begin(self, name: str) -> None:
        """A needed module begins to be imported."""
        self._importing.add(name)

    def end(self, name: str) -> None:
        """It has been imported, or could not be."""
        self._importing.discard(name)

    def register_what_is_due(self) -> None:
        """Import every module of ours whose time has come."""
        for registrar, needed in NEEDS.items():
            if registrar not in sys.modules and needed[0] in sys.modules and not self._importing.intersection(needed):
                importlib.import_module(registrar)


class _Watched(importlib.abc.Loader):
    """Imports a module as its own loader would, and tells the watcher."""

    def __init__(self, loader: importlib.abc.Loader, watcher: _Watcher) -> None:
        self._loader, self._watcher = loader, watcher

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """What the real loader makes."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the real loader, then whatever has been waiting for it."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # whoever asks later meets the real one
        self._watcher.begin(module.__name__)
        try:
            self._loader.exec_module(module)
        finally:
            self._watcher.end(module.__name__)
        self._watcher.register_what_is_due()
