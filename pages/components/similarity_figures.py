"""Drawings of how alike experts are: pairs as a heatmap, means by layer, overlap by rank. Every one beside its control."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moesvd_core.marks import Mark
from moesvd_core.similarity import RANK_SHARES, Estimator, Matrix, Side, SideSimilarity, Source, axis_of
from pages.components import colors, figure
from pages.components.layers import across, band

MATRICES: tuple[Matrix, Matrix, Matrix] = ("W", "U", "V")
MARKS: Mapping[Matrix, Mark] = {
    "W": Mark("#8A8F98", "solid", "circle"), "U": Mark("#9367C7", "solid", "diamond"), "V": Mark("#1F9E89", "solid", "square"),
}
"""How the three matrices are drawn: none of them is a method, so none has a method's colour."""
CONTROL_WORDS: Mapping[Source, str] = {"random": "random matrices of the same shape", "shuffled": "the same experts, samples shuffled"}
SIDE_WORDS: Mapping[Side, str] = {"input": "gate and up", "output": "down"}
_TEXT_EXPERTS = 12
"""Up to so many experts a cell has room for its number."""


@dataclass(frozen=True)
class Choice:
    """What a person chose to see.

    Attributes:
        share: rank of U and V, as a share of the largest; one of `RANK_SHARES`.
    """

    side: Side
    matrix: Matrix
    share: float
    estimator: Estimator
    control: Source

    @property
    def place(self) -> int:
        """Position of the share among `RANK_SHARES`."""
        return min(range(len(RANK_SHARES)), key=lambda each: abs(RANK_SHARES[each] - self.share))

    def kernel(self, ranks: Sequence[int], matrix: Matrix | None = None) -> int:
        """Number of the kernel that stands for the matrix at the chosen rank; small matrices have fewer ranks than there are shares."""
        if (matrix or self.matrix) == "W":
            return 0
        wanted = RANK_SHARES[self.place] * ranks[-1]
        return 1 + min(range(len(ranks)), key=lambda each: abs(ranks[each] - wanted))

    def words(self, ranks: Sequence[int]) -> str:
        """The matrix and its rank."""
        return "W" if self.matrix == "W" else f"{self.matrix} at rank {ranks[self.kernel(ranks) - 1]} of {ranks[-1]}"


def pairs_of(found: SideSimilarity, choice: Choice) -> np.ndarray:
    """CKA of every pair [P] of the chosen matrix."""
    return found.axis(axis_of(choice.matrix, choice.side)).pairs(choice.estimator, choice.kernel(found.ranks))


def scale_top(*shown: np.ndarray) -> float:
    """Upper end of the colour scale that experts and control share: unequal scales would make any control look like the experts."""
    finite = [value for pair_P in shown for value in pair_P[np.isfinite(pair_P)].tolist()]
    return max([0.1, *finite])


def pair_map(found: SideSimilarity, choice: Choice, top: float, what: str, name: str) -> str:
    """Expert × expert; the diagonal, 1 by definition, is left out, so that the scale serves the pairs."""
    pair_P = pairs_of(found, choice)
    if not np.isfinite(pair_P).any():
        reason = f"All {found.ranks[-1]} directions of {choice.matrix} together have the Gram 1, whatever the experts are."
        return figure.nothing("Undefined at full rank", f"{reason} Choose a smaller rank.")
    square_EE = found.square(pair_P)
    np.fill_diagonal(square_EE, np.nan)
    labels = [str(expert) for expert in found.experts]
    few = len(labels) <= _TEXT_EXPERTS
    heat = go.Heatmap(
        z=square_EE, x=labels, y=labels, zmin=0, zmax=top, colorscale=colors.MAGNITUDE, xgap=1, ygap=1,
        hovertemplate="Experts %{y} and %{x}<br>CKA %{z:.3f}<extra></extra>",
        colorbar={"title": {"text": "CKA", "side": "right", "font": {"size": 14}}},
        texttemplate="%{z:.2f}" if few else None,
    )
    axis = {"type": "category", "showgrid": False, "nticks": 16, "title": {"text": "Expert"}}
    layout = {"xaxis": axis, "yaxis": {**axis, "autorange": "reversed"}}
    upper = np.triu_indices(len(labels), 1)
    table = pd.DataFrame({"expert": np.array(found.experts)[upper[0]], "other": np.array(found.experts)[upper[1]], "cka": pair_P})
    return figure.drawing(go.Figure(heat, layout), table, what, name)


def mean_lines(layers: Sequence[Mapping[str, Any]], choice: Choice, chosen: int | None, caption: str) -> str:
    """Mean CKA a layer of W, U and V, and of the control: Figure 1 right of the paper, and its Table C as the data."""
    records: list[dict[str, Any]] = []
    for row in layers:
        for source in ("experts", choice.control):
            found = row[choice.side][source]
            for matrix in MATRICES:
                moments = found["axes"][axis_of(matrix, choice.side)][choice.estimator]
                at = choice.kernel(found["ranks"], matrix)
                rank = None if matrix == "W" else found["ranks"][at - 1]
                values = {"mean": moments["mean"][at], "deviation": moments["deviation"][at]}
                records.append({"layer": row["layer"], "matrix": matrix, "of": source, "rank": rank, **values})
    table = pd.DataFrame(records)
    drawn = go.Figure(layout={
        "xaxis": across([row["layer"] for row in layers]), "shapes": band(chosen), "hovermode": "closest",
        "yaxis": {"title": {"text": "Mean CKA over pairs"}, "range": [min(-0.04, float(table["mean"].min())), 1.05]},
    })
    for source in ("experts", choice.control):
        for matrix in MATRICES:
            own = table[(table["of"] == source) & (table["matrix"] == matrix)]
            control = source != "experts"
            drawn.add_scatter(
                x=own["layer"], y=own["mean"], name=f"{matrix} by chance" if control else matrix, customdata=own["deviation"],
                mode="lines+markers", line={"color": MARKS[matrix].color, "dash": "dot" if control else "solid", "width": 2},
                marker={"symbol": f"{MARKS[matrix].symbol}-open" if control else MARKS[matrix].symbol, "size": 8},
                hovertemplate="Layer %{x}<br>%{fullData.name} %{y:.3f} ± %{customdata:.3f}<extra></extra>",
            )
    return figure.drawing(drawn, table, caption, f"similarity-{choice.side}-{choice.estimator}")


def overlap_lines(layer: Mapping[Source, SideSimilarity], choice: Choice, name: str) -> str:
    """How much of one expert's leading subspace lies in another's, by rank; chance is rank over samples."""
    records: list[dict[str, Any]] = []
    for source in ("experts", choice.control):
        found = layer[source]
        for matrix in ("V", "U"):
            overlap_GP = found.axis(axis_of(matrix, choice.side)).overlap_GP
            for place, rank in enumerate(found.ranks):
                row_P = overlap_GP[place]
                values = {"mean": row_P.mean(), "least": row_P.min(), "most": row_P.max()}
                records.append({"matrix": matrix, "of": source, "rank": rank, **values})
    table = pd.DataFrame(records)
    drawn = go.Figure(layout={
        "xaxis": {"title": {"text": "Rank of each subspace"}},
        "yaxis": {"title": {"text": "Overlap of two subspaces"}, "range": [-0.03, 1.05], "tickformat": ".0%"},
        "hovermode": "closest",
    })
    for source in ("experts", choice.control):
        for matrix in ("V", "U"):
            own = table[(table["of"] == source) & (table["matrix"] == matrix)]
            control = source != "experts"
            drawn.add_scatter(
                x=own["rank"], y=own["mean"], name=f"{matrix} by chance" if control else matrix, mode="lines+markers",
                line={"color": MARKS[matrix].color, "dash": "dot" if control else "solid", "width": 2},
                marker={"symbol": f"{MARKS[matrix].symbol}-open" if control else MARKS[matrix].symbol, "size": 8},
                customdata=own[["least", "most"]],
                hovertemplate="Rank %{x}<br>%{fullData.name} %{y:.1%} (%{customdata[0]:.1%} to %{customdata[1]:.1%})<extra></extra>",
            )
    axes = {matrix: axis_of(matrix, choice.side) for matrix in ("U", "V")}
    caption = (
        f"Share of one expert's subspace that lies in another's, mean over pairs. V spans {axes['V']}, U spans {axes['U']}. "
        "It reaches 100 % by itself once the subspaces fill the space: only the distance to the dotted line counts."
    )
    return figure.drawing(drawn, table, caption, name)


def figures_of(layer: Mapping[Source, SideSimilarity], choice: Choice) -> list[tuple[str, str, str]]:
    """The chosen matrix in figures, for `tables.facts`: experts, control, and what is left above chance."""
    found = layer["experts"]
    own_P, control_P = pairs_of(found, choice), pairs_of(layer[choice.control], choice)
    if not np.isfinite(own_P).any():
        return [("Mean CKA", "–", "undefined at full rank"), ("By chance", "–", ""), ("Above chance", "–", "")]
    difference = float(own_P.mean() - control_P.mean())
    return [
        ("Mean CKA", f"{own_P.mean():.3f}", f"± {own_P.std():.3f} over {own_P.size} pairs"),
        ("By chance", f"{round(float(control_P.mean()), 3) + 0.0:.3f}".replace("-", "−"), CONTROL_WORDS[choice.control]),
        ("Above chance", f"{difference:+.3f}".replace("-", "−"), f"{choice.words(found.ranks)}, {choice.estimator}"),
    ]
