"""What every page is given: where runs and models lie, and what the person who started the server allowed."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moesvd_core.errors import RunError
from moesvd_core.live import LiveModel, LiveModels
from moesvd_core.runs.client import Client, RunStatus
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.pushes import Pushes
from pages.components import places, public_demo
from pages.components.session import ViewState
from pages.components.settings import Settings
from pages.components.visitor import visitor


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
        """The way to runs and their workers, on behalf of whoever's event is being handled."""
        return (public_demo.Viewer if self.settings.public_demo else Client)(
            self.settings.runs, who=visitor, remote_code=self.settings.remote_code
        )

    @cached_property
    def live(self) -> LiveModels:
        """The model that answers at once: at most one in memory, shared by all pages and visitors."""
        return LiveModels()

    def live_model(self, run: RunFolder) -> LiveModel:
        """The run's model in memory.

        Raises:
            InputError, ResourceError: as `LiveModels.of`.
            RunError: the same, or the model's code is not allowed here.
        """
        run.require_code_allowed(self.settings.remote_code)
        return self.live.of(run)

    @cached_property
    def pushes(self) -> Pushes:
        """What this server sends to the hub."""
        return Pushes()

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

    def layers(self, state: ViewState) -> list[int]:
        """Layers with experts of the model of a view; none for a view without a run, or before its first job has looked at the model.

        Raises:
            RunError: no such run.
        """
        run = self.open(state)
        facts = None if run is None else self.facts(run)
        return [] if facts is None else [int(layer["index"]) for layer in facts["expert_layers"]]

    def first_run(self) -> str:
        """The run to open when the address names none: the newest with a finished analysis, else the newest, else ""."""
        runs = [status for status in self.client.runs() if status.id]
        return next((status.id for status in runs if status.analysed), runs[0].id if runs else "")

    def models(self) -> list[str]:
        """Names of the models under the declared folders, the demo model first."""
        return places.model_names(self.settings.models)

    def find_model(self, text: str) -> str:
        """The model that a visitor named: a folder under a declared one, or a hub id.

        Raises:
            InputError: neither; or a hub id, in a public demo.
        """
        found = places.find_model(text, self.settings.models, self.settings.remote_code)
        if not Path(found).is_dir():
            self.require_rights()
        return found

    def require_rights(self) -> None:
        """Nothing where visitors may write, start jobs and use the network.

        Raises:
            InputError: this is a public demo.
        """
        if self.settings.public_demo:
            public_demo.refuse()

    def find_text(self, text: str) -> str:
        """The data set that a visitor named: "sotu", a text file under a declared folder, or a data set of the hub.

        Raises:
            InputError: none of them.
        """
        return places.find_text(text, self.settings.models)

    @property
    def text_help(self) -> str:
        """What a visitor may name as a data set, in a sentence."""
        return places.text_help(self.settings.models)

    def model_name(self, model: str) -> str:
        """A model's name for people: without the folders that the machine keeps it in."""
        return places.model_name(model, self.settings.models)

    def require_run(self, state: ViewState) -> RunFolder:
        """The run of a view.

        Raises:
            RunError: there is none, or no such run.
        """
        run = self.open(state)
        if run is None:
            raise RunError("no run is chosen: analyse a model first, or choose a run on the Model page")
        return run
