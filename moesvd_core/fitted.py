"""What was fitted of finished plans: output factors, refined bases and routers, a file a layer, so that a plan is fitted once.

Everything else of a plan is a slice of decompositions; only what fitting has changed is kept.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from moesvd_core.decomposition.compensation import fitted_tensors, is_changed, with_fitted
from moesvd_core.decomposition.factors import LayerFactors
from moesvd_core.errors import RunError
from moesvd_core.planning import Plan
from moesvd_core.tensor_files import MADE_AGAIN, load_tensors, save_tensors

_ROUTER = "router"


@dataclass
class FittedLayers:
    """The fitted layers of all plans of one calibrated model.

    Attributes:
        folder: where their files are, by plan (`fit_key`) and layer; None: in `held`.
        held: those of this session, where there is no folder.
    """

    folder: Path | None = None
    held: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)

    def has(self, plan: Plan, index: int) -> bool:
        """Whether a layer was fitted, or has nothing to be fitted."""
        if not is_fitted(plan, index):
            return True
        file = self._file(plan, index)
        return (fit_key(plan), index) in self.held if file is None else file.exists()

    def of(self, plan: Plan, index: int, planned: LayerFactors) -> LayerFactors:
        """A layer that was fitted: what was kept of it in the place of what was planned.

        Raises:
            RunError: its file is damaged, or missing.
        """
        file = self._file(plan, index)
        kept = self.held[fit_key(plan), index] if file is None else load_tensors(file, error_type=RunError, fix=MADE_AGAIN)[0]
        factors = with_fitted(planned, kept) if is_compensated(plan, index) else planned
        return replace(factors, router_EF=kept.get(_ROUTER))

    def keep(self, plan: Plan, index: int, factors: LayerFactors) -> None:
        """Keep of a layer what fitting has changed.

        Raises:
            ResourceError: the disk is full.
        """
        if not is_fitted(plan, index):
            return
        changed = fitted_tensors(factors) if is_compensated(plan, index) else {}
        if factors.router_EF is not None:
            changed |= {_ROUTER: factors.router_EF}
        file = self._file(plan, index)
        if file is None:
            self.held[fit_key(plan), index] = changed
        elif not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(file, changed, {})

    def _file(self, plan: Plan, index: int) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"compensated-{fit_key(plan)}" / f"layer-{index:03d}.safetensors"


def is_compensated(plan: Plan, index: int) -> bool:
    """Whether a plan's compensation changes a layer."""
    layer = plan.layer(index)
    return plan.compensate and layer is not None and layer.selected and is_changed(layer)


def is_refitted(plan: Plan, index: int) -> bool:
    """Whether a layer's router is to be refitted: something has changed before it, which is not so up to the first layer with factors."""
    first = min((layer.layer for layer in plan.layers if layer.selected), default=index)
    return plan.refit_router and first < index and plan.layer(index) is not None


def is_fitted(plan: Plan, index: int) -> bool:
    """Whether a layer of the finished plan is another than the sliced one."""
    return is_compensated(plan, index) or is_refitted(plan, index)


def fit_key(plan: Plan) -> str:
    """Name under which a plan's fitted layers are kept: what decides them and nothing else."""
    layers = [(layer.layer, vars(layer.input), vars(layer.output)) for layer in plan.layers]
    decided = [*(["refitted routers", plan.compensate] if plan.refit_router else []), "refined bases", plan.method, plan.metric, layers]
    return hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:16]
