"""A refitted router is what least squares finds, as far as the tokens can tell, and stays as it is where nothing has changed."""

import pytest
import torch

from moesvd_core.decomposition.router_fit import RouterFit

EXPERTS, FEATURES = 5, 12


def streams(tokens: int, off: float, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A router [E, F], and what it reads in the original and in a compressed model [T, F] that has turned and disturbed it a little."""
    generator = torch.Generator().manual_seed(seed)
    router_EF = torch.randn(EXPERTS, FEATURES, generator=generator, dtype=torch.float64)
    x_TF = torch.randn(tokens, FEATURES, generator=generator, dtype=torch.float64) * torch.logspace(0, -0.5, FEATURES, dtype=torch.float64)
    turn_FF = torch.eye(FEATURES, dtype=torch.float64) + off * torch.randn(FEATURES, FEATURES, generator=generator, dtype=torch.float64)
    return router_EF, x_TF, x_TF @ turn_FF + 0.1 * off * torch.randn(tokens, FEATURES, generator=generator, dtype=torch.float64)


def fitted(router_EF: torch.Tensor, x_TF: torch.Tensor, changed_TF: torch.Tensor, batch: int = 700) -> torch.Tensor | None:
    fit = RouterFit(router_EF)
    for x_BF, changed_BF in zip(x_TF.split(batch), changed_TF.split(batch), strict=True):
        fit.add(x_BF, changed_BF)
    return fit.weight()


def error(router_EF: torch.Tensor, x_TF: torch.Tensor, weight_EF: torch.Tensor, changed_TF: torch.Tensor) -> float:
    """Mean square of what the logits are off by."""
    return float((x_TF @ router_EF.T - changed_TF @ weight_EF.T).square().mean())


def test_many_tokens_give_what_least_squares_gives() -> None:
    router_EF, x_TF, changed_TF = streams(20_000, 0.1)
    found_EF = fitted(router_EF, x_TF, changed_TF)
    brute_FE = torch.linalg.lstsq(changed_TF, x_TF @ router_EF.T).solution
    assert found_EF is not None
    torch.testing.assert_close(found_EF, brute_FE.T, rtol=1e-2, atol=1e-2)
    assert error(router_EF, x_TF, found_EF, changed_TF) < 1.01 * error(router_EF, x_TF, brute_FE.T, changed_TF)
    assert error(router_EF, x_TF, found_EF, changed_TF) < 0.1 * error(router_EF, x_TF, router_EF, changed_TF)


def test_it_is_the_closed_form_of_the_second_moments() -> None:
    """R E[x x̃ᵀ] E[x̃ x̃ᵀ]^{-1}, but for the ridge and the shrinking, which are little for many tokens."""
    router_EF, x_TF, changed_TF = streams(20_000, 0.1)
    closed_EF = router_EF @ (x_TF.T @ changed_TF) @ torch.linalg.inv(changed_TF.T @ changed_TF)
    torch.testing.assert_close(fitted(router_EF, x_TF, changed_TF), closed_EF, rtol=1e-2, atol=1e-2)


def test_batches_do_not_matter() -> None:
    router_EF, x_TF, changed_TF = streams(2000, 0.1)
    torch.testing.assert_close(fitted(router_EF, x_TF, changed_TF, 7), fitted(router_EF, x_TF, changed_TF, 2000))


def test_an_unchanged_stream_changes_nothing_bit_for_bit() -> None:
    router_EF, x_TF, _ = streams(2000, 0.0)
    assert fitted(router_EF, x_TF, x_TF) is None
    assert RouterFit(router_EF).weight() is None


def test_too_few_tokens_tell_nothing() -> None:
    router_EF, x_TF, changed_TF = streams(FEATURES + 1, 0.1)
    assert fitted(router_EF, x_TF, changed_TF) is None


def test_features_that_are_always_zero_need_no_inverse() -> None:
    router_EF, x_TF, changed_TF = streams(20_000, 0.1)
    x_TF[:, :3], changed_TF[:, :3] = 0, 0
    found_EF = fitted(router_EF, x_TF, changed_TF)
    assert found_EF is not None
    torch.testing.assert_close(found_EF[:, :3], router_EF[:, :3])
    brute_FE = torch.linalg.lstsq(changed_TF[:, 3:], x_TF @ router_EF.T).solution
    torch.testing.assert_close(found_EF[:, 3:], brute_FE.T, rtol=1e-2, atol=1e-2)


def test_noise_is_not_fitted() -> None:
    """A disturbance that the changed stream does not tell: little is changed, beside what plain least squares would change."""
    router_EF, x_TF, _ = streams(60, 0.0)
    apart_TF = x_TF + 0.1 * torch.randn(x_TF.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found_EF = fitted(router_EF, apart_TF, x_TF)
    plain_FE = torch.linalg.lstsq(x_TF, apart_TF @ router_EF.T).solution
    changed = 0.0 if found_EF is None else float((found_EF - router_EF).square().sum())
    assert changed < 0.2 * float((plain_FE.T - router_EF).square().sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_fitted_in_single(dtype: torch.dtype) -> None:
    router_EF, x_TF, changed_TF = (each.to(dtype) for each in streams(2000, 0.1))
    found_EF = fitted(router_EF, x_TF, changed_TF)
    assert found_EF is not None
    assert found_EF.dtype == torch.float32
    assert found_EF.device.type == "cpu"
