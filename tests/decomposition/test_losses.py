"""Loss curves against the sums that they stand for."""

import torch

from moesvd_core.decomposition.grams import FullGram
from moesvd_core.decomposition.losses import pair_losses, projection_losses, tail_losses

TOKENS = 40


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W [7, 5], diagonal of L [7], G [5, 5]."""
    x_TS = random(TOKENS, 5, seed=1)
    return random(7, 5, seed=2), random(7, seed=3).abs() + 0.1, x_TS.T @ x_TS


def loss(delta_NM: torch.Tensor, left_N: torch.Tensor, gram_MM: torch.Tensor) -> float:
    return float((left_N.diag() @ delta_NM @ gram_MM @ delta_NM.T).trace())


def test_tail_is_what_is_not_taken() -> None:
    assert tail_losses(torch.tensor([4.0, 2.0, 1.0]), rest=0.5).tolist() == [7.5, 3.5, 1.5, 0.5]


def test_pair_losses_are_those_of_any_rank_one_terms() -> None:
    weight_NM, left_N, gram_MM = problem()
    left_NR, right_RM = random(7, 4, seed=4), random(4, 5, seed=5)
    weighed_RN = left_NR.T * left_N
    cross_R = (weighed_RN @ weight_NM @ gram_MM @ right_RM.T).diagonal()
    square_RR = (weighed_RN @ left_NR) * (right_RM @ gram_MM @ right_RM.T)
    got_R = pair_losses(loss(weight_NM, left_N, gram_MM), cross_R, square_RR)
    wanted = [loss(weight_NM - left_NR[:, :rank] @ right_RM[:rank], left_N, gram_MM) for rank in range(5)]
    torch.testing.assert_close(got_R, torch.tensor(wanted, dtype=torch.float64))


def test_projection_losses_are_those_of_the_projected_matrix() -> None:
    weight_NM, left_N, gram_MM = problem()
    read_RS, basis_RS = random(3, 5, seed=6), random(3, 5, seed=7)
    got_R = projection_losses(read_RS, basis_RS, FullGram(gram_MM), weight_NM.T @ left_N.diag() @ weight_NM)
    wanted = [loss(weight_NM - weight_NM @ read_RS[:rank].T @ basis_RS[:rank], left_N, gram_MM) for rank in range(4)]
    torch.testing.assert_close(got_R, torch.tensor(wanted, dtype=torch.float64))
