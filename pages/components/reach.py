"""How far a view may go: no plan removes or saves more than its method can on the run's model."""

from moesvd_core.runs.bounded import most_flops_ratio
from moesvd_core.runs.folder import RunFolder
from moesvd_core.runs.known import reach
from pages.components.session import ViewState


def within_reach(run: RunFolder, state: ViewState) -> ViewState:
    """The view with at most as much removed and saved as its method can on the run's model; as it is where that is not known yet."""
    most = reach_percent(run, state.method)
    if most is None:
        return state
    return state.but(ratio=min(round(state.ratio, 4), most / 100), flops_ratio=flops_within(run, state))


def beyond_reach(run: RunFolder, state: ViewState) -> list[str]:
    """What a view asks for that `within_reach` takes away, in a sentence each; nothing of operations where the method weighs none."""
    within, told = within_reach(run, state), []
    if within.ratio < round(state.ratio, 4):
        asked = f"{state.method} removes at most {100 * within.ratio:.0f} % of this model"
        told.append(f"ratio must be in [0, {within.ratio:g}], got {state.ratio:g}: {asked}. The most is shown.")
    if state.flops_ratio is not None and within.flops_ratio and within.flops_ratio < round(state.flops_ratio, 4):
        asked = f"{state.method} saves at most {100 * within.flops_ratio:.0f} % of the operations of this model, whose experts do no more"
        told.append(f"flops_ratio must be in [0, {within.flops_ratio:g}], got {state.flops_ratio:g}: {asked}. The most is shown.")
    return told


def reach_percent(run: RunFolder, method: str) -> int | None:
    """The last whole percent that a method reaches, None when it was not analysed."""
    most = reach(run, method)
    return None if most is None else int(100 * most + 1e-9)


def flops_within(run: RunFolder, state: ViewState) -> float | None:
    """The share of operations that a view asks to save, at most as much as can be on this model; None for no bound."""
    if state.flops_ratio is None:
        return None
    return min(round(state.flops_ratio, 4), flops_percent(run, state.method) / 100) or None


def flops_percent(run: RunFolder, method: str) -> int:
    """The last whole percent of operations that a method can be asked to save; 0 where it weighs none."""
    return int(100 * most_flops_ratio(run, method))
