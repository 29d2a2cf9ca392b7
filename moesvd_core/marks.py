"""How a method is drawn, on every page and in every figure of the documentation.

A method has the same colour, dash and marker everywhere, so that figures also read without colour.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mark:
    """How a method is drawn.

    Attributes:
        color: Okabe-Ito (its yellow darkened and its black made grey, to be seen on light and dark alike).
        dash: of its line, as plotly names it.
        symbol: of its points, as plotly names it.
    """

    color: str
    dash: str
    symbol: str


METHOD_MARKS = {
    "auto": Mark("#0072B2", "solid", "circle"),
    "latent": Mark("#D55E00", "solid", "square"),
    "fisher": Mark("#009E73", "solid", "diamond"),
    "moe-svd": Mark("#CC79A7", "solid", "triangle-up"),
    "moe-svd-refit": Mark("#CC79A7", "dash", "triangle-up-open"),
    "svd-llm": Mark("#E69F00", "solid", "cross"),
    "mpifa": Mark("#E69F00", "longdash", "cross-open"),
    "owl": Mark("#56B4E9", "dash", "x"),
    "asvd": Mark("#B8A400", "dot", "star"),
    "svd": Mark("#8A8F98", "dot", "circle-open"),
    "d2-moe": Mark("#E69F00", "dashdot", "hexagon"),
    "neuron-pruning": Mark("#009E73", "dashdot", "triangle-down"),
    "expert-pruning": Mark("#D55E00", "dashdot", "hourglass"),
    "expert-pruning-frequency": Mark("#D55E00", "dot", "hourglass-open"),
    "expert-merging": Mark("#56B4E9", "dashdot", "bowtie"),
}
ORIGINAL = Mark("#8A8F98", "longdash", "pentagon")
"""The model before compression."""


def mark(method: str) -> Mark:
    """How a method is drawn; a method without a mark of its own is drawn like the original."""
    return METHOD_MARKS.get(method, ORIGINAL)
