"""What a person looks at: run, layer, method, ratio, operations. It lives in the address: a view can be shared and survives a reload."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from moesvd_core.decomposition.registry import METHODS, WEIGHING
from moesvd_core.errors import InputError
from moesvd_core.runs.folder import is_run_id


@dataclass(frozen=True)
class ViewState:
    """One view, as plain data. Ratios are whole percents, at which runs have their plans: pages would show different ones for others.

    Attributes:
        run: name of a run, "" for none.
        layer: index of a decoder layer, None for none chosen.
        method: name in `METHODS`.
        ratio: share of the whole model's parameters that is removed, in [0, 1).
        flops_ratio: share of the operations a token that is saved at least, None for no such bound; of methods that weigh operations.
        without: the run that was shown is gone, so that the address, which may still name it, is not asked for one.
    """

    run: str = ""
    layer: int | None = None
    method: str = "auto"
    ratio: float = 0.4
    flops_ratio: float | None = None
    without: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.run and not is_run_id(self.run):
            raise InputError(f"run must be an id of letters, digits, dots, dashes and underscores, got {self.run!r}")
        if self.layer is not None and not 0 <= self.layer < 10_000:
            raise InputError(f"layer must be in [0, 10000), got {self.layer}")
        if self.method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not 0 <= self.ratio < 1:  # also refuses NaN
            raise InputError(f"ratio must be in [0, 1), got {self.ratio}")
        object.__setattr__(self, "ratio", min(round(self.ratio, 2), 0.99))
        if self.flops_ratio is None:
            return
        if not 0 < self.flops_ratio < 1:
            raise InputError(f"flops_ratio must be in (0, 1), or left out for no bound on operations, got {self.flops_ratio}")
        if not METHODS[self.method].bounds_flops:
            weighing = ", ".join(WEIGHING)
            raise InputError(f"flops_ratio needs a method that weighs operations ({weighing}), got {self.method}: choose one of them")
        object.__setattr__(self, "flops_ratio", min(max(round(self.flops_ratio, 2), 0.01), 0.99))

    def but(self, **changes: Any) -> "ViewState":
        """The same view with some fields changed; another run forgets the layer, and operations are bounded where the method weighs them.

        Raises:
            InputError: a value out of bounds.
        """
        if changes.get("run", self.run) != self.run:
            changes = {"layer": None, **changes}
        if "method" in changes and changes["method"] in METHODS and not METHODS[changes["method"]].bounds_flops:
            changes = {"flops_ratio": None, **changes}
        return replace(self, **changes)

    def without_run(self) -> "ViewState":
        """The same view when its run is gone."""
        return replace(self.but(run=""), without=True)

    @property
    def query(self) -> str:
        """The view as the query of an address, "" for a view that shows no run."""
        fewer = None if self.flops_ratio is None else f"{self.flops_ratio:g}"
        fields = {"run": self.run, "layer": self.layer, "method": self.method, "ratio": f"{self.ratio:g}", "flops_ratio": fewer}
        return urlencode({name: value for name, value in fields.items() if value not in ("", None)}) if self.run else ""


_FIELDS: Mapping[str, Callable[[str], Any]] = {"run": str, "layer": int, "method": str, "ratio": float, "flops_ratio": float}


def read_query(query: Mapping[str, str]) -> tuple[ViewState, list[str]]:
    """The view that an address asks for, and what is wrong with it: a field that cannot be read keeps its default."""
    state, problems = ViewState(), []
    for name, parse in _FIELDS.items():
        text = query.get(name, "")[:200]
        if not text:
            continue
        try:
            state = state.but(**{name: parse(text)})
        except InputError as error:
            problems.append(f"The address was not understood: {error}")
        except ValueError:
            problems.append(f"The address was not understood: {name} must be a number, got {text!r}")
    return state, problems
