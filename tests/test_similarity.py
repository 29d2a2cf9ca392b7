"""CKA against its definition written out, what random matrices reach, and what comparing must refuse."""

import json
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from moesvd_core.errors import InputError, StatisticsError
from moesvd_core.similarity import AXES, Sampling, SideSimilarity, axis_of, compare, random_control

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def biased_hsic(k_SS: Tensor, l_SS: Tensor) -> Tensor:
    """tr K H L H, with the centring matrix H."""
    centring = torch.eye(len(k_SS), dtype=k_SS.dtype) - 1 / len(k_SS)
    return torch.trace(k_SS @ centring @ l_SS @ centring)


def unbiased_hsic(k_SS: Tensor, l_SS: Tensor) -> Tensor:
    """Song et al. 2012, Eq. 5, as a mean over all quadruples of different samples would be."""
    n = len(k_SS)
    k, l = k_SS - k_SS.diag().diag(), l_SS - l_SS.diag().diag()  # noqa: E741 - the field's letters
    return (torch.trace(k @ l) + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ l).sum()) / (n * (n - 3))


def cka(hsic: Callable[[Tensor, Tensor], Tensor], x_SF: Tensor, y_SF: Tensor) -> float:
    """CKA of two sets of features of the same samples."""
    k_SS, l_SS = x_SF @ x_SF.T, y_SF @ y_SF.T
    return float(hsic(k_SS, l_SS) / (hsic(k_SS, k_SS) * hsic(l_SS, l_SS)).sqrt())


@pytest.mark.parametrize(("rows", "columns"), [(24, 10), (10, 24)])
@pytest.mark.parametrize("side", ["input", "output"])
def test_equals_the_definition_for_weights_and_bases_at_every_rank(side: str, rows: int, columns: int) -> None:
    matrix_ERC = random(3, rows, columns)
    found = compare(matrix_ERC, side)["experts"]
    assert found.ranks[0] == 1
    assert found.ranks[-1] == 10
    samples = {"channels": 1, "neurons": 0} if side == "input" else {"channels": 0, "neurons": 1}
    factors = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrix_ERC]
    for axis in AXES:
        own = found.axis(axis)
        for pair, (first, second) in enumerate(combinations(range(3), 2)):
            weights = [matrix.transpose(0, samples[axis]) for matrix in (matrix_ERC[first], matrix_ERC[second])]
            assert own.pairs("biased", 0)[pair] == pytest.approx(cka(biased_hsic, *weights), abs=1e-5)
            assert own.pairs("debiased", 0)[pair] == pytest.approx(cka(unbiased_hsic, *weights), abs=1e-5)
            bases = [factors[each][2].T if samples[axis] else factors[each][0] for each in (first, second)]
            for place, rank in enumerate(found.ranks[:-1]):
                leading = [basis[:, :rank] for basis in bases]
                assert own.pairs("biased", 1 + place)[pair] == pytest.approx(cka(biased_hsic, *leading), abs=1e-5)
                assert own.pairs("debiased", 1 + place)[pair] == pytest.approx(cka(unbiased_hsic, *leading), abs=1e-4)
                overlap = (leading[0].T @ leading[1]).square().sum() / rank
                assert own.overlap_GP[place, pair] == pytest.approx(float(overlap), abs=1e-5)


def test_an_expert_with_its_neurons_turned_is_the_same_over_channels() -> None:
    first_RC = random(12, 16)
    turn_RR = torch.linalg.qr(random(12, 12, seed=1))[0]
    found = compare(torch.stack([first_RC, 3 * turn_RR @ first_RC]), "input")["experts"]
    for kernel in range(1 + len(found.ranks)):
        assert found.channels.pairs("biased", kernel) == pytest.approx(1, abs=1e-5)
        assert found.channels.pairs("debiased", kernel) == pytest.approx(1, abs=1e-4)
    assert found.channels.overlap_GP == pytest.approx(1, abs=1e-5)
    assert found.neurons.pairs("debiased", 0)[0] < 0.5


def test_random_experts_are_unrelated_to_the_debiased_estimator_alone() -> None:
    """Table C of the paper: 14336 x 4096 (here a 64th of it) gives W 0.22, U 0.29 and V 1 by chance."""
    found = random_control(compare(random(4, 224, 64), "input")["experts"])
    share = 64 / 224
    assert found.neurons.pairs("biased", 0).mean() == pytest.approx(share / (1 + share), abs=0.02)
    assert found.neurons.pairs("biased", len(found.ranks)).mean() == pytest.approx(share, abs=0.02)
    assert found.channels.pairs("biased", len(found.ranks)) == pytest.approx(1, abs=1e-4)
    assert np.isnan(found.channels.pairs("debiased", len(found.ranks))).all()
    for axis in AXES:
        assert abs(found.axis(axis).pairs("debiased", 0).mean()) < 0.02
    half = found.ranks.index(32)
    assert found.channels.overlap_GP[half].mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("share", [0.5, 1])
def test_unrelated_experts_of_low_rank_are_as_similar_as_chance(share: float) -> None:
    own = compare(random(6, 128, 16) @ random(6, 16, 64, seed=1), "input")["experts"]
    control = random_control(own)
    assert control.ranks == own.ranks
    kernel = 1 + own.ranks.index(round(16 * share))
    for axis in AXES:
        mean, chance = (found.axis(axis).pairs("biased", kernel).mean() for found in (own, control))
        assert mean == pytest.approx(chance, abs=0.02)
        assert own.axis(axis).overlap_GP[kernel - 1].mean() == pytest.approx(control.axis(axis).overlap_GP[kernel - 1].mean(), abs=0.02)


@pytest.mark.parametrize("loud", ["one channel", "a mean that all rows share"])
def test_one_loud_direction_costs_no_digits(loud: str) -> None:
    matrix_ERC = random(3, 64, 48)
    if loud == "one channel":
        matrix_ERC[:, :, 5] *= 100
    else:
        matrix_ERC += 5 * random(3, 64, 1, seed=1)
    own = compare(matrix_ERC, "input")["experts"].channels
    for pair, (first, second) in enumerate(combinations(range(3), 2)):
        assert own.pairs("debiased", 0)[pair] == pytest.approx(cka(unbiased_hsic, matrix_ERC[first].T, matrix_ERC[second].T), abs=1e-8)
        bases = [torch.linalg.svd(matrix_ERC[each], full_matrices=False)[2][:3].T for each in (first, second)]
        assert own.pairs("debiased", 3)[pair] == pytest.approx(cka(unbiased_hsic, *bases), abs=1e-8)


def test_a_control_tells_how_many_experts_the_layer_has() -> None:
    like = compare(random(6, 20, 16), "input", Sampling(experts=3))["experts"]
    found = random_control(like, Sampling(experts=3))
    assert (found.total, len(found.experts)) == (like.total, 3) == (6, 3)


def test_shuffling_breaks_what_experts_share_and_nothing_else() -> None:
    common_RC = random(20, 64)
    found = compare(torch.stack([common_RC + 0.3 * random(20, 64, seed=seed) for seed in (1, 2, 3)]), "input")
    assert found["experts"].channels.pairs("debiased", 0).min() > 0.8
    assert abs(found["shuffled"].channels.pairs("debiased", 0).mean()) < 0.05
    assert found["shuffled"].ranks == found["experts"].ranks


def test_a_matrix_of_low_rank_is_compared_up_to_its_rank() -> None:
    low_ERC = random(3, 20, 5) @ random(5, 12, seed=1)
    found = compare(low_ERC, "output")["experts"]
    assert found.ranks[-1] == 5
    assert found.neurons.overlap_GP[-1] == pytest.approx(1, abs=1e-5)  # all of them lie in the same five directions
    assert found.neurons.pairs("debiased", len(found.ranks)) == pytest.approx(1, abs=1e-4)


def test_many_experts_are_sampled_and_it_says_which() -> None:
    matrix_ERC = random(40, 6, 8)
    found = compare(matrix_ERC, "input", Sampling(experts=5, seed=2))["experts"]
    assert found.total == 40
    assert len(found.experts) == 5
    assert list(found.experts) == sorted(set(found.experts))
    assert found.channels.biased_GP.shape == (1 + len(found.ranks), 10)
    alone = compare(matrix_ERC[list(found.experts)], "input")["experts"]
    assert alone.channels.biased_GP == pytest.approx(found.channels.biased_GP)
    assert Sampling(experts=5, seed=2).draw(40) == found.experts
    assert Sampling(experts=5, seed=3).draw(40) != found.experts


def test_half_precision_weights_are_compared_exactly() -> None:
    matrix_ERC = random(3, 16, 12).bfloat16()
    assert compare(matrix_ERC, "input")["experts"].channels.biased_GP == pytest.approx(
        compare(matrix_ERC.double(), "input")["experts"].channels.biased_GP, abs=1e-6
    )


def test_goes_through_json() -> None:
    found = compare(random(4, 12, 9), "output")["experts"]
    again = SideSimilarity.from_dict(json.loads(json.dumps(found.as_dict(), allow_nan=False)))
    assert again.experts == found.experts
    assert again.ranks == found.ranks
    for axis in AXES:
        np.testing.assert_allclose(again.axis(axis).debiased_GP, found.axis(axis).debiased_GP, atol=1e-5)
        np.testing.assert_allclose(again.axis(axis).overlap_GP, found.axis(axis).overlap_GP, atol=1e-5)
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert summary["axes"]["channels"]["biased"]["mean"][0] == pytest.approx(found.channels.biased_GP[0].mean(), abs=1e-5)
    assert summary["axes"]["neurons"]["overlap"]["deviation"][0] == pytest.approx(found.neurons.overlap_GP[0].std(), abs=1e-5)


def test_a_square_of_pairs_is_symmetric_with_ones_on_its_diagonal() -> None:
    found = compare(random(3, 8, 8), "input")["experts"]
    assert found.square(np.array([0.1, 0.2, 0.3])).tolist() == [[1, 0.1, 0.2], [0.1, 1, 0.3], [0.2, 0.3, 1]]


def test_every_factor_is_compared_along_the_axis_it_has() -> None:
    assert [axis_of(matrix, "input") for matrix in ("W", "U", "V")] == ["channels", "neurons", "channels"]
    assert [axis_of(matrix, "output") for matrix in ("W", "U", "V")] == ["channels", "channels", "neurons"]


def test_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="at least 2 experts of at least 4 x 4, got 1 of 8 x 8"):
        compare(random(1, 8, 8), "input")
    with pytest.raises(InputError, match="got 2 of 3 x 8"):
        compare(random(2, 3, 8), "input")
    broken = random(3, 8, 8)
    broken[1] = 0
    with pytest.raises(StatisticsError, match="expert 1, output side is all zeros"):
        compare(broken, "output")
    broken[1, 2, 3] = torch.nan
    with pytest.raises(StatisticsError, match="expert 1, input side"):
        compare(broken, "input")
    with pytest.raises(InputError, match="experts must be a whole number of at least 2, got 1"):
        Sampling(experts=1)
    with pytest.raises(InputError, match="seed must be a whole number of at least 0, got -1"):
        Sampling(seed=-1)
