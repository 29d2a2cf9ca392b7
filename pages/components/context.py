"""What every page is given: where runs, models and exports lie, and what the person who started the server allowed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moesvd_core.architectures.files import resolve_model
from moesvd_core.errors import InputError, RunError
from moesvd_core.runs.client import Client, RunStatus
from moesvd_core.runs.folder import RunFolder
from pages.components.session import ViewState
from pages.components.settings import Settings

DEMO_MODEL = "demo-moe"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w][\w.-]{0,95}")
_DEPTH = 3
"""How far below a declared folder models are looked for."""


@dataclass(frozen=True)
class PageLink:
    """One page of the navigation."""

    title: str
    path: str


@dataclass(frozen=True)
class Context:
    """Shared by all pages and sessions; holds nothing that changes.

    Attributes:
        settings: how the server was started.
        pages: the navigation, in order.
    """

    settings: Settings
    pages: tuple[PageLink, ...] = ()

    @cached_property
    def client(self) -> Client:
        """The way to runs and their workers."""
        return Client(self.settings.runs)

    def open(self, state: ViewState) -> RunFolder | None:
        """The run of a view, or None when it shows none.

        Raises:
            RunError: no such run.
        """
        if not state.run:
            return None
        if not (self.settings.runs / state.run).is_dir():
            raise RunError(f"run {state.run} is not here: it was deleted, or belongs to another machine")
        return self.client.open(state.run)

    def status(self, state: ViewState) -> RunStatus | None:
        """Where the run of a view stands, or None when it shows none.

        Raises:
            RunError: no such run.
        """
        run = self.open(state)
        return None if run is None else self.client.status(run)

    def facts(self, run: RunFolder) -> dict[str, Any] | None:
        """`ModelFacts.as_dict()` of the run's model, or None before its first job has looked at it."""
        source = run.read_json("source.json")
        return None if source is None else dict(source["facts"])

    def first_run(self) -> str:
        """The run to open when the address names none: the newest with a finished analysis, else the newest, else ""."""
        runs = [status for status in self.client.runs() if status.id]
        analysed = (status.id for status in runs if any(job.action == "analyze" and job.state == "finished" for job in status.jobs))
        return next(analysed, runs[0].id if runs else "")

    def models(self) -> list[str]:
        """Names of the models under the declared folders, the demo model first."""
        found = {self.model_name(str(path)) for root in self.settings.models for path in _model_folders(root, _DEPTH)}
        return sorted(found, key=lambda name: (Path(name).name != DEMO_MODEL, name))

    def find_model(self, text: str) -> str:
        """The model that a person named: a folder under a declared one, or a hub id. Nothing is fetched.

        Raises:
            InputError: neither; whether something lies elsewhere on the machine is not told.
        """
        name = text.strip()
        roots = self.settings.models
        if not name:
            raise InputError("no model is named: choose one of the list, or write a folder or a hub id (owner/name)")
        if "\0" not in name and len(name) < 4096:
            path = Path(name)
            for candidate in (path, *(root / path for root in roots), *(root for root in roots if root.name == name)):
                if any(candidate.resolve().is_relative_to(root.resolve()) for root in roots) and candidate.is_dir():
                    resolve_model(candidate, roots=roots, allow_remote_code=self.settings.remote_code)
                    return str(candidate)
        if _HUB_ID.fullmatch(name) and ".." not in name and "--" not in name and not Path(name).exists():
            return name
        allowed = ", ".join(str(root) for root in roots)
        raise InputError(f"{name[:200]!r} is neither a model folder under {allowed} nor a hub id (owner/name): check the spelling")

    def model_name(self, model: str) -> str:
        """A model's name for people, which `find_model` understands: without the folders that the machine keeps it in."""
        if not Path(model).exists():
            return Path(model).name if Path(model).is_absolute() else model
        place = Path(model).resolve()
        for root in self.settings.models:
            if place.is_relative_to(root.resolve()):
                inside = place.relative_to(root.resolve())
                return root.name if inside == Path() else str(inside)
        return place.name

    def require_run(self, state: ViewState) -> RunFolder:
        """The run of a view.

        Raises:
            RunError: there is none, or no such run.
        """
        run = self.open(state)
        if run is None:
            raise RunError("no run is chosen: analyse a model first, or choose a run on the Model page")
        return run


def _model_folders(root: Path, depth: int) -> Iterator[Path]:
    """Folders with a config.json and weights, at most `depth` levels down; links are not followed."""
    if (root / "config.json").is_file() and any(root.glob("*.safetensors")):
        yield root
    elif depth and root.is_dir():
        for path in sorted(root.iterdir()):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield from _model_folders(path, depth - 1)
