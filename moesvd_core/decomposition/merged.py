"""Expert merging: similar experts become one, the mean of their weights by frequency; the router stays as it is (MC-SMoE, HC-SMoE).

Experts are clustered hierarchically by average linkage, as HC-SMoE does. Calibration keeps no outputs of experts for tokens that went
elsewhere, so the distance is one of weights: that between matched neurons, each the row of gate and of up, measured in the layer's input
Gram (what the row answers to the tokens that there are), and the column of down; where experts have biases, a row's difference in bias
counts beside that in the Gram, and the difference of the output biases is added for the pair. For the distance of a pair every neuron takes
its best match; before two clusters are averaged their neurons are put in one order by assignment, since a mean of neurons that do different
things does neither. A number of groups is a cut of the tree, so every number is one decomposition. All pairs are compared: the work grows
with the square of the number of experts, and for alignment with the cube of their width.

The predicted loss takes each expert's two matrices and biases as replaced by its group's, its neurons in the group's order, and the two
sides' errors as independent, as everywhere. So it does with the errors of a side's matrix and of its bias: what they have in common would
need the sums Σ p² h and Σ ‖δ‖² x, which calibration does not keep.

Shapes: E experts, M width, N input rows, D hidden size, G groups, L merges (E − 1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moesvd_core.decomposition.assignment import best_assignment
from moesvd_core.decomposition.curves import merged_curve
from moesvd_core.decomposition.factors import DenseFactors, MergedFactors, SideFactors
from moesvd_core.decomposition.grams import diagonal_of
from moesvd_core.decomposition.metrics import LayerMetric
from moesvd_core.planning import DENSE, SIDES, Metric, Side, SideCurve


@dataclass(frozen=True)
class MergeTree:
    """How the experts of a layer become one, step by step.

    Attributes:
        pair_L2: two clusters, named by their first expert, that each step joins; the joint one has the name of the first.
        order_LM: for each step, which neuron of the second cluster comes to stand at each place of the first.
        distance_L: how far apart the two are, never falling.
    """

    pair_L2: torch.Tensor
    order_LM: torch.Tensor
    distance_L: torch.Tensor

    def clusters(self, groups: int, experts: int, width: int) -> dict[int, dict[int, torch.Tensor]]:
        """Cluster -> its experts, each with the order [M] in which its neurons stand in the cluster, when so many groups are left."""
        found = {expert: {expert: torch.arange(width)} for expert in range(experts)}
        for (first, second), order_M in zip(self.pair_L2[: experts - groups].tolist(), self.order_LM, strict=False):
            found[first] |= {expert: own_M[order_M] for expert, own_M in found.pop(second).items()}
        return found


class MergedBasis:
    """The merge tree of a layer; both sides have the same.

    Attributes:
        curve: predicted loss at every number of groups; one slot.
    """

    def __init__(self, metric: LayerMetric, side: Side, tree: MergeTree, curve: SideCurve) -> None:
        self.curve = curve
        self._metric, self._side, self._tree = metric, side, tree

    @classmethod
    def both(cls, metric: LayerMetric, kind: Metric) -> dict[Side, "MergedBasis"]:
        """Cluster the experts of a layer, and tell what every number of groups loses on each side.

        Args:
            kind: "input", rows of gate and up are compared in the layer's input Gram; "plain", by themselves.
        """
        tree = _merged(metric, kind)
        experts, width = metric.layer.experts, metric.layer.width
        made: dict[Side, MergedBasis] = {}
        for side in SIDES:
            losses = [sum(_absence(metric, side, expert) for expert in range(experts))]
            known: dict[tuple[int, ...], float] = {}
            for groups in range(1, experts + 1):
                clusters = tree.clusters(groups, experts, width)
                for members in clusters.values():
                    if tuple(members) not in known:
                        known[tuple(members)] = _loss(metric, side, members)
                losses.append(sum(known[tuple(members)] for members in clusters.values()))
            loss_R = torch.tensor(losses, dtype=torch.float64) * metric.unit
            made[side] = cls(metric, side, tree, merged_curve(metric, side, loss_R, _gains(tree)))
        return made

    def clusters(self, groups: int) -> dict[int, dict[int, torch.Tensor]]:
        """As `MergeTree.clusters`."""
        return self._tree.clusters(groups, self._metric.layer.experts, self._metric.layer.width)

    def factors(self, ranks: Sequence[int]) -> SideFactors:
        """The matrices of so many groups; DENSE keeps the original ones."""
        (rank,) = ranks
        if rank == DENSE:
            return DenseFactors(self._metric.stored(self._side))
        clusters = self.clusters(rank)
        weight_GNM = torch.stack([_mean(self._metric, self._side, members) for members in clusters.values()])
        group_of = {expert: group for group, members in enumerate(clusters.values()) for expert in members}
        return MergedFactors(weight_GNM, tuple(group_of[expert] for expert in range(len(group_of))))

    def biases(self, ranks: Sequence[int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Every expert's biases are those of its group."""
        weights = self._metric.weights
        if weights.input_bias_EN is None or weights.output_bias_ED is None or ranks[0] == DENSE:
            return weights.input_bias_EN, weights.output_bias_ED
        merged_EN = torch.empty(weights.input_bias_EN.shape, dtype=torch.float32)
        merged_ED = torch.empty(weights.output_bias_ED.shape, dtype=torch.float32)
        for members in self.clusters(ranks[0]).values():
            merged_EN[list(members)] = _mean_bias(self._metric, "input", members).cpu()
            merged_ED[list(members)] = _mean_bias(self._metric, "output", members).cpu()
        return merged_EN, merged_ED

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file has to keep so that `loaded` can cut the tree again."""
        tree = {"pair": self._tree.pair_L2, "order": self._tree.order_LM, "distance": self._tree.distance_L}
        return {name: tensor.clone() for name, tensor in tree.items()} | {"loss": torch.from_numpy(self.curve.loss_SR)}

    @classmethod
    def loaded(cls, metric: LayerMetric, side: Side, tensors: Mapping[str, torch.Tensor]) -> "MergedBasis":
        """The basis that `tensors` came from, for the same weights and statistics."""
        tree = MergeTree(tensors["pair"], tensors["order"], tensors["distance"])
        return cls(metric, side, tree, merged_curve(metric, side, tensors["loss"][0], _gains(tree)))


def ordered(metric: LayerMetric, side: Side, expert: int, order_M: torch.Tensor) -> torch.Tensor:
    """An expert's matrix with its neurons in an order, [rows, columns]."""
    weight_NM = metric.weight(side, expert)
    if side == "output":
        return weight_NM[:, order_M.to(metric.device)]
    return weight_NM[metric.layer.rows_in_order(order_M).to(metric.device)]


def _gains(tree: MergeTree) -> torch.Tensor:
    """What each further group is worth to the method: the distance that it keeps apart [E]; the first one as much as the second."""
    distance_L = tree.distance_L.flip(0)
    return torch.cat([distance_L[:1], distance_L]) if len(distance_L) else distance_L.new_ones(1)


def _shares(metric: LayerMetric, members: Mapping[int, torch.Tensor]) -> list[float]:
    """Share of each expert in its cluster's mean; one more token for each, so that experts without any have a mean too."""
    count = [float(metric.statistics.count_E[expert]) + 1 for expert in members]
    return [each / sum(count) for each in count]


def _mean(metric: LayerMetric, side: Side, members: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The cluster's matrix [rows, columns]."""
    parts = zip(_shares(metric, members), members.items(), strict=True)
    return torch.stack([share * ordered(metric, side, expert, order_M) for share, (expert, order_M) in parts]).sum(0)


def _mean_bias(metric: LayerMetric, side: Side, members: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The cluster's bias [rows], float32 as it is stored; zeros where experts have none."""
    parts = zip(_shares(metric, members), members.items(), strict=True)
    own = [share * _in_order(metric, side, metric.bias(side, expert), order_M) for share, (expert, order_M) in parts]
    return torch.stack(own).sum(0).float()


def _in_order(metric: LayerMetric, side: Side, bias_N: torch.Tensor, order_M: torch.Tensor) -> torch.Tensor:
    """A bias whose neurons are in an order, [rows]; those of the hidden size, on the output side, have one order only."""
    return bias_N if side == "output" else bias_N[metric.layer.rows_in_order(order_M).to(metric.device)]


def _absence(metric: LayerMetric, side: Side, expert: int) -> float:
    """What a side of an expert loses if nothing is put in its place."""
    if side == "output":
        return metric.absence(expert)
    return metric.energy(side, expert) + metric.bias_loss(side, expert, metric.bias(side, expert))


def _loss(metric: LayerMetric, side: Side, members: Mapping[int, torch.Tensor]) -> float:
    """Σ tr L_e ΔW G_e ΔWᵀ over the experts of a cluster, and what the errors of their biases lose by themselves."""
    if len(members) == 1:
        return 0.0
    mean_NM, mean_N, total = _mean(metric, side, members), _mean_bias(metric, side, members), 0.0
    for expert, order_M in members.items():
        own_order_M = order_M.argsort()
        own_NM = mean_NM[:, own_order_M] if side == "output" else mean_NM[metric.layer.rows_in_order(own_order_M)]
        total += metric.bias_loss(side, expert, metric.bias(side, expert) - _in_order(metric, side, mean_N, own_order_M))
        delta_NM = metric.weight(side, expert) - own_NM
        weighed_NM = metric.right(side, "output", expert).times(delta_NM if side == "input" else delta_NM.double())
        total += float((metric.left(side, "output", expert).times(delta_NM.T).T * weighed_NM).sum(dtype=torch.float64))
    return total


def _merged(metric: LayerMetric, kind: Metric) -> MergeTree:
    """Average linkage over the distances of experts; two clusters are aligned when they meet."""
    layer = metric.layer
    experts, neurons = layer.experts, _Neurons(metric, kind)
    distance_EE = torch.full((experts, experts), torch.inf, dtype=torch.float64)
    single = {expert: neurons.of({expert: torch.arange(layer.width)}) for expert in range(experts)}
    for first in range(experts):
        for second in range(first + 1, experts):
            distance_EE[first, second] = distance_EE[second, first] = neurons.distance(single[first], single[second])
    alive = {expert: {expert: torch.arange(layer.width)} for expert in range(experts)}
    pairs, orders, distances = [], [], []
    while len(alive) > 1:
        first, second = divmod(int(distance_EE.argmin()), experts)
        distances.append(float(distance_EE[first, second]))
        first, second = min(first, second), max(first, second)
        gain_MM = neurons.likeness(neurons.of(alive[first]), neurons.of(alive[second]))
        order_M = torch.from_numpy(best_assignment(gain_MM.cpu().double().numpy()))
        sizes = len(alive[first]), len(alive[second])
        alive[first] |= {expert: own_M[order_M] for expert, own_M in alive.pop(second).items()}
        joint_E = (sizes[0] * distance_EE[first] + sizes[1] * distance_EE[second]) / sum(sizes)
        distance_EE[first], distance_EE[:, first] = joint_E, joint_E
        distance_EE[first, first] = torch.inf
        distance_EE[second], distance_EE[:, second] = torch.inf, torch.inf
        pairs.append([first, second])
        orders.append(order_M)
    order_LM = torch.stack(orders) if orders else torch.empty(0, layer.width, dtype=torch.int64)
    return MergeTree(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2), order_LM, torch.tensor(distances, dtype=torch.float64))


class _Cluster(NamedTuple):
    """What an expert or the mean of several consists of; biases are zeros where experts have none."""

    input_ND: torch.Tensor
    output_DM: torch.Tensor
    bias_N: torch.Tensor
    bias_D: torch.Tensor


class _Neurons:
    """Neurons of experts and clusters as vectors whose inner products tell how alike they are; both sides weigh the same."""

    def __init__(self, metric: LayerMetric, kind: Metric) -> None:
        self._metric = metric
        layer, statistics = metric.layer, metric.statistics
        gram_DD = torch.eye(layer.hidden, dtype=torch.float64, device=metric.device)
        if kind == "input":
            gram_DD = sum((metric.right_of_input("input", expert).full() for expert in range(layer.experts)), 0 * gram_DD)
            gram_DD /= float(statistics.weight_square_E.sum())
        self._gram_DD = gram_DD.to(metric.dtype)
        self._row_MP = layer.rows_of_neuron().to(metric.device)
        experts = range(layer.experts)
        tiny = torch.finfo(torch.float32).tiny
        read = sum(float((metric.weight("input", e) @ self._gram_DD * metric.weight("input", e)).sum()) for e in experts)
        self._input_energy = max(read + sum(float(metric.bias("input", e).square().sum()) for e in experts), tiny)
        self._output_energy = max(sum(float(metric.weight("output", e).square().sum()) for e in experts), tiny)
        # An output bias is no column of down: what it adds to answers is compared with the answers that the columns make.
        answer_E = diagonal_of(statistics.output_gram_EDD).sum(1).double().cpu() / statistics.weight_square_E.double().clamp(min=tiny)
        answered = float(answer_E.sum()) if kind == "input" else self._output_energy
        self._answer_energy = max(answered + sum(float(metric.bias("output", e).square().sum()) for e in experts), tiny)

    def of(self, members: Mapping[int, torch.Tensor]) -> _Cluster:
        """A cluster's matrices and biases."""
        bias_N, bias_D = (_mean_bias(self._metric, side, members).to(self._metric.dtype) for side in SIDES)
        return _Cluster(_mean(self._metric, "input", members), _mean(self._metric, "output", members), bias_N, bias_D)

    def likeness(self, a: _Cluster, b: _Cluster) -> torch.Tensor:
        """Inner products of the neurons of two experts, [M, M]."""
        total_MM = a.output_DM.T @ b.output_DM / self._output_energy
        for row_M in self._row_MP.T:
            alike_MM = (a.input_ND[row_M] @ self._gram_DD @ b.input_ND[row_M].T).addr_(a.bias_N[row_M], b.bias_N[row_M])
            total_MM = total_MM + alike_MM / self._input_energy
        return total_MM

    def distance(self, a: _Cluster, b: _Cluster) -> float:
        """Summed squared distance of every neuron to its best match, both ways, and of the output biases as often."""
        distance_MM = self._squares(a)[:, None] + self._squares(b) - 2 * self.likeness(a, b)
        apart = float((a.bias_D - b.bias_D).square().sum()) / self._answer_energy
        return float(distance_MM.min(0).values.sum() + distance_MM.min(1).values.sum()) + 2 * apart

    def _squares(self, a: _Cluster) -> torch.Tensor:
        """Squared length of every neuron, [M]."""
        total_M = a.output_DM.square().sum(0) / self._output_energy
        row_N = (((a.input_ND @ self._gram_DD) * a.input_ND).sum(1) + a.bias_N.square()) / self._input_energy
        return total_M + row_N[self._row_MP].sum(1)
