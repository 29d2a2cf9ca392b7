"""What a person asks for: method, ratio and the choices behind them. The same YAML drives pages and command line."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import yaml

from moesvd_core.errors import InputError, is_number, require_flag
from moesvd_core.planning.curves import Structure

Metric = Literal["plain", "scaled", "input", "output", "saliency", "frequency"]
"""What counts as error of ΔW: ‖ΔW‖² · ‖ΔW diag(mean|x|)^½‖² (ASVD) · tr ΔW C ΔWᵀ (Eq. 11-12) · tr Γ ΔW C ΔWᵀ (what it does to the loss);
for experts as a whole: mean(p·‖y‖) of their tokens (REAP) · how many tokens they get."""

Allocation = Literal["uniform", "selective", "owl", "greedy"]
"""Where the parameters go: the same share everywhere · layers of low S_L (3.2) · by OWL's outlier ratio · best gain per cost."""

Budget = Literal["parameters", "flops"]


class Finished:
    """What a recipe and a plan say of the finished model alike."""

    compensate: bool
    refit_router: bool

    @property
    def fits(self) -> tuple[str, ...]:
        """What is fitted to the stream that compressed layers have changed, once the ranks are chosen; the words for it."""
        return tuple(word for word, chosen in (("compensated", self.compensate), ("router refitted", self.refit_router)) if chosen)


@dataclass(frozen=True)
class Recipe(Finished):
    """One request for a plan.

    Attributes:
        method: a name of the registry; it decides whatever is None below.
        ratio: share of the whole model's stored parameters to remove, 0 <= ratio < 1; how far a method reaches depends on the model.
        metric, structure, allocation: overrides of the method's own choice.
        block: ranks are multiples of it (grouped kernels need multiples of 8), unless a matrix is smaller.
        budget: what one more rank costs in greedy allocation: stored parameters, or multiply-adds a token. The ratio counts stored
            parameters with either.
        flops_ratio: share of the floating-point operations a token to remove at least, beside the ratio (greedy allocation only, which then
            finds the price of an operation by itself); None: as many as the ratio brings.
        compensate: refine the bases that experts share at their ranks, and fit each layer's output factors to what the layers before it
            have changed, after the ranks are chosen (`compensation`); costs two passes over some of the calibration text for each ratio,
            and no parameter. False whatever the method: a plan is of factors as they are sliced until it is asked for; what a method
            would have is in the registry (`Method.compensate`), and the command line asks for it where nobody says otherwise.
        refit_router: let each router choose, from what the layers before it have changed, as much as it can like the original's from what
            it was before (`compensation`); with or without `compensate`, at the cost of running some of the calibration text through
            everything before each router twice more, and of no parameter.

    Raises:
        InputError: a value out of its bounds or of a wrong type.
    """

    method: str = "auto"
    ratio: float = 0.4
    metric: Metric | None = None
    structure: Structure | None = None
    allocation: Allocation | None = None
    block: int = 8
    budget: Budget = "parameters"
    flops_ratio: float | None = None
    compensate: bool = False
    refit_router: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not self.method:
            raise InputError(f"method must be the name of a method, got {self.method!r}")
        _check_share("ratio", self.ratio, "the model's parameters")
        if self.flops_ratio is not None:
            _check_share("flops_ratio", self.flops_ratio, "the floating-point operations a token")
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise InputError(f"block must be a whole number of ranks, at least 1 (8 suits grouped kernels), got {self.block!r}")
        for name in ("compensate", "refit_router"):
            require_flag(name, getattr(self, name))
        _check_choice("metric", self.metric, get_args(Metric))
        _check_choice("structure", self.structure, get_args(Structure))
        _check_choice("allocation", self.allocation, get_args(Allocation))
        if self.budget not in get_args(Budget):
            raise InputError(f"budget must be one of {', '.join(get_args(Budget))}, got {self.budget!r}")

    def unfitted(self) -> "Recipe":
        """The recipe of the same ranks that leaves factors and routers as they are sliced."""
        return replace(self, compensate=False, refit_router=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for YAML and JSON; choices left to the method are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Recipe":
        """The recipe that `as_dict` described.

        Raises:
            InputError: a key that no recipe has, or a value that cannot be used.
        """
        known = [field.name for field in fields(cls)]
        unknown = [str(key) for key in data if key not in known]
        if unknown:
            raise InputError(f"recipe has unknown keys {', '.join(unknown)}: it may have {', '.join(known)}")
        return cls(**data)

    def to_yaml(self) -> str:
        """The recipe as YAML text."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> "Recipe":
        """The recipe in a YAML text; only plain data is read, tags are refused.

        Raises:
            InputError: not YAML, not a mapping, or not a recipe.
        """
        return cls.from_dict(said_in(text))


def said_in(text: str) -> dict[str, Any]:
    """What a recipe's YAML text says itself, before anything that it leaves out is filled in.

    Raises:
        InputError: not YAML, or not a mapping.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"recipe is not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"recipe must be a YAML mapping such as 'ratio: 0.4', got {type(data).__name__}")
    return data


def _check_share(name: str, value: object, whole: str) -> None:
    if not (is_number(value) and 0 <= value < 1):
        raise InputError(f"{name} must be a number in [0, 1), the share of {whole} to remove, got {value!r}")


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)} (or left out, for the method's own), got {value!r}")
