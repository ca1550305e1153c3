"""Damping and factoring of Hessians, against float64 inverses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.quantization.hessian import DAMPING_LADDER, damped, factor
from tests.quantization.data import correlated, normal, stats_of


def with_eigenvalues(values: Tensor) -> Tensor:
    """A symmetric matrix of these eigenvalues in random directions."""
    directions = torch.linalg.qr(normal(len(values), len(values)).double())[0]
    return (directions * values.double() @ directions.T).float()


@pytest.mark.parametrize("width", [1, 2, 17, 96])
@pytest.mark.parametrize("damp_frac", [0.01, 0.1])
def test_the_factor_of_the_inverse(width: int, damp_frac: float) -> None:
    hessian = stats_of(correlated(4 * width, width)).hessian
    found = factor(hessian, damp_frac)
    assert found is not None
    assert found.damp_frac == damp_frac
    expected = hessian.double() + damp_frac * hessian.double().diagonal().mean() * torch.eye(width)
    torch.testing.assert_close(damped(hessian, damp_frac).double(), expected, rtol=1e-5, atol=1e-8)
    assert torch.equal(found.upper, torch.triu(found.upper))
    assert (found.upper.diagonal() > 0).all()
    upper = found.upper.double()
    inverse = torch.linalg.inv(expected)
    torch.testing.assert_close(upper.T @ upper, inverse, rtol=1e-3, atol=1e-4 * float(inverse.abs().max()))


def test_dead_inputs_get_the_mean_diagonal() -> None:
    x = correlated(64, 8)
    x[:, [2, 5]] = 0
    hessian = stats_of(x).hessian
    mean = hessian.diagonal().mean()
    matrix = damped(hessian, 0.0)
    torch.testing.assert_close(matrix.diagonal()[[2, 5]], mean.expand(2))
    alive = [0, 1, 3, 4, 6, 7]
    assert torch.equal(matrix[alive][:, alive], hessian[alive][:, alive])
    found = factor(hessian, 0.0)
    assert found is not None
    assert found.damp_frac == 0.0


def test_singular_matrices_need_damping() -> None:
    hessian = stats_of(correlated(5, 32)).hessian  # rank 5
    assert torch.linalg.matrix_rank(hessian) == 5
    found = factor(hessian, 0.01)
    assert found is not None
    assert found.damp_frac == 0.01


@pytest.mark.parametrize(("lowest", "expected"), [(-0.02, 0.03), (-0.05, 0.1), (-0.2, 0.3), (-0.5, 1.0)])
def test_the_ladder_raises_damping_on_indefinite_matrices(lowest: float, expected: float) -> None:
    values = torch.ones(16)
    values[0] = lowest
    values[1:] += (1 - lowest) / 15  # the mean diagonal stays 1, so damping is what it is called
    found = factor(with_eigenvalues(values), 0.01)
    assert found is not None
    assert found.damp_frac == expected
    assert expected in DAMPING_LADDER
    largest = torch.linalg.eigvalsh(found.upper.double().T @ found.upper.double()).max()
    torch.testing.assert_close(1 / float(largest), lowest + expected, rtol=0, atol=1e-3)


def test_nothing_below_what_was_asked_is_tried() -> None:
    values = torch.ones(16)
    values[0] = -0.05
    values[1:] += 1.05 / 15
    found = factor(with_eigenvalues(values), 0.2)
    assert found is not None
    assert found.damp_frac == 0.2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_factor_of_what_is_not_finite(value: float) -> None:
    hessian = stats_of(correlated(64, 8)).hessian
    hessian[1, 2] = hessian[2, 1] = value
    assert factor(hessian, 0.01) is None


def test_no_factor_of_nothing_and_of_the_hopeless() -> None:
    assert factor(torch.zeros(8, 8), 0.01) is None
    assert factor(-torch.eye(8), 0.01) is None
    values = torch.tensor([-50.0, *[4.0] * 15])
    assert factor(with_eigenvalues(values), 0.01) is None
