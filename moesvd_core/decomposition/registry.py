"""Named methods: points in the space metric × structure × allocation. Code follows the three axes; only this table knows the names."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import get_args

from moesvd_core.errors import InputError
from moesvd_core.planning import Allocation, Metric, Structure

OURS = "this project"
"""Reference of the methods that were made here."""
FACTORED: tuple[Structure, ...] = ("per-expert", "pivoted", "latent", "shared-v", "base-delta")
"""Structures that store matrices of lower rank, or what such are added to."""
_MATRIX_METRICS: tuple[Metric, ...] = ("plain", "scaled", "input", "output")
_METRICS: Mapping[Structure, tuple[Metric, ...]] = {
    "kept-neurons": ("input", "output"),
    "kept-experts": ("saliency", "frequency", "output"),
    "merged-experts": ("plain", "input"),
}
"""Metrics that a structure has a meaning for, where those are not the ones that measure an error of a matrix."""


@dataclass(frozen=True)
class Method:
    """One way to choose metric, structure and allocation.

    Attributes:
        name: what recipes, pages and the command line call it.
        metric: what the factors minimise.
        structures: what is on offer for each side of a layer; with several, the plan takes whichever wins.
        allocation: how ranks are given out.
        refit: shared-v takes the least-squares U for its V instead of the sums of Eq. 8 (latent and kept-neurons always refit, the others
            never need to).
        reference: where it comes from.
        description: one sentence for a person who has to choose.
        shrink: experts with few tokens lean on the layer's average; without it, each is measured by its own tokens alone.
        compensate: the command line and the pages compensate a model that they write unless a person or the recipe file says otherwise.
            A `Recipe` of Python asks for it by `compensate=True`: nothing is filled in there.
        alternate: shared bases of a model that is compensated are refined at their ranks before (see `alternating`).
        screen: a base for all experts is on offer only where they have enough in common (`base_delta.have_in_common`).
    """

    name: str
    metric: Metric
    structures: tuple[Structure, ...]
    allocation: Allocation
    refit: bool
    reference: str
    description: str
    shrink: bool = True
    compensate: bool = False
    alternate: bool = True
    screen: bool = False

    def __post_init__(self) -> None:
        _check("metric", self.metric, get_args(Metric))
        _check("allocation", self.allocation, get_args(Allocation))
        if not self.structures:
            raise InputError(f"structures must name at least one of {', '.join(get_args(Structure))}, got none")
        for structure in self.structures:
            _check("structure", structure, get_args(Structure))
            known = _METRICS.get(structure, _MATRIX_METRICS)
            if self.metric not in known:
                raise InputError(f"metric must be one of {', '.join(known)} for structure {structure}, got {self.metric!r}")

    @property
    def published(self) -> bool:
        """Whether it is other people's."""
        return self.reference != OURS

    @property
    def bounds_flops(self) -> bool:
        """Whether its plans can also be asked to save operations (`Recipe.flops_ratio`)."""
        return self.allocation == "greedy"

    @property
    def low_rank(self) -> bool:
        """Whether everything it has on offer are matrices of lower rank."""
        return set(self.structures) <= set(FACTORED)

    def customised(
        self, *, metric: Metric | None = None, structures: tuple[Structure, ...] | None = None, allocation: Allocation | None = None
    ) -> "Method":
        """The same method with some axes chosen by hand; what is None stays.

        Raises:
            InputError: a name that no axis knows.
        """
        return replace(
            self, metric=metric or self.metric, structures=structures or self.structures, allocation=allocation or self.allocation
        )

    def alone(self, structure: Structure) -> "Method":
        """The same method with one structure on offer, without options that mean nothing to it."""
        return replace(
            self,
            structures=(structure,),
            refit=self.refit and structure == "shared-v",
            screen=self.screen and structure == "base-delta",
        )


def method(name: str, methods: Mapping[str, Method] | None = None) -> Method:
    """The named method.

    Args:
        methods: where to look; None: those of this table.

    Raises:
        InputError: no such name; the message lists those there are.
    """
    known = METHODS if methods is None else methods
    if name not in known:
        raise InputError(f"method must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def _check(axis: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{axis} must be one of {', '.join(known)}, got {value!r}")


_ALL = (
    Method(
        "auto", "output", ("pivoted", "latent", "base-delta"), "greedy", True, OURS,
        "For each matrix dense, pivoted or latent factors or a base for all, whichever costs the loss least: the recommended choice.",
        compensate=True, screen=True,
    ),
    Method(
        "fisher", "output", ("pivoted",), "greedy", False, OURS,
        "Each expert's own factors without their identities, weighted by what an error does to the loss: best quality for its size.",
    ),
    Method(
        "latent", "output", ("latent",), "greedy", True, OURS,
        "One input and one output basis a layer, small experts in between: best quality for its speed.",
    ),
    Method(
        "moe-svd", "input", ("shared-v",), "selective", False, "MoE-SVD 3.1-3.3, Algorithms 1-5, D.4",
        "The paper as written: V of the most frequent expert for all, U's of the most frequent summed, sensitive layers left dense.",
    ),
    Method(
        "moe-svd-refit", "input", ("shared-v",), "selective", True, "MoE-SVD 3.1-3.2 with least-squares U",
        "The paper's shared V, but every expert gets the U that fits it best.",
    ),
    Method(
        "svd-llm", "input", ("per-expert",), "uniform", False, "MoE-SVD Table 2; SVD-LLM",
        "Each expert's own factors, weighted by the activations it reads, the same share everywhere.",
    ),
    Method(
        "mpifa", "input", ("pivoted",), "uniform", False, "PIFA (Zhao et al., ICML 2025)",
        "As svd-llm, without what factors say twice, and fitted to what earlier layers have changed.",
        compensate=True,
    ),
    Method(
        "owl", "input", ("per-expert",), "owl", False, "MoE-SVD Table 3; OWL",
        "As svd-llm, with more parameters for layers of many outliers.",
    ),
    Method(
        "asvd", "scaled", ("per-expert",), "uniform", False, "MoE-SVD Table 2; ASVD",
        "Each expert's own factors, weighted by the mean size of each input channel.",
    ),
    Method(
        "svd", "plain", ("per-expert",), "uniform", False, "MoE-SVD Table 2",
        "Plain truncated SVD of the weights; looks at no text.",
    ),
    Method(
        "d2-moe", "input", ("base-delta",), "uniform", False, "D²-MoE",
        "One base for all experts, their mean weighted by Fisher's information, and a low-rank delta for each.",
    ),
    Method(
        "neuron-pruning", "input", ("kept-neurons",), "uniform", True, "MoE-SVD Table 9; CAMERA-P",
        "Each expert keeps its most salient neurons, and its output matrix is fitted anew to them.",
    ),
    Method(
        "expert-pruning", "saliency", ("kept-experts",), "uniform", False, "MoE-SVD Table 9; REAP",
        "Experts that add least to the output go, and the router chooses among the rest.",
    ),
    Method(
        "expert-pruning-frequency", "frequency", ("kept-experts",), "uniform", False, "MoE-SVD Table 9",
        "Experts that get the fewest tokens go, and the router chooses among the rest.",
    ),
    Method(
        "expert-merging", "input", ("merged-experts",), "uniform", False, "MoE-SVD Table 9; HC-SMoE, MC-SMoE",
        "Similar experts become one, their neurons aligned and averaged by frequency; the router stays as it is.",
    ),
)
METHODS: Mapping[str, Method] = MappingProxyType({each.name: each for each in _ALL})
"""Every named method, the recommended one first."""
WEIGHING = tuple(name for name, each in METHODS.items() if each.bounds_flops)
"""Names of the methods whose plans can be asked to save operations."""
