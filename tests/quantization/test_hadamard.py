"""Rotations: orthogonal, as their matrix says, and fused so that products stay what they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.quantization.hadamard import Rotation, Rows, Turn, matrix, order
from tests.quantization.data import normal


def dense(rotation: Rotation) -> Tensor:
    """The matrix, row by row from unit vectors."""
    return rotation(torch.eye(rotation.size, dtype=torch.float64))


@pytest.mark.parametrize("m", [1, 2, 4, 12, 20, 28, 36, 44, 60, 84])
def test_paley_s_matrices_are_hadamard(m: int) -> None:
    found = matrix(m)
    assert found.abs().eq(1).all()
    assert torch.equal(found @ found.T, m * torch.eye(m, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 16, 64, 96, 160, 896, 3584])
def test_rotations_are_orthogonal_and_spread_a_channel_over_all(size: int) -> None:
    rotation = Rotation.random(size, seed=3)
    x = normal(5, size).double()
    torch.testing.assert_close(rotation(x).norm(dim=1), x.norm(dim=1))
    one = torch.zeros(1, size, dtype=torch.float64)
    one[0, size // 2] = 1.0
    torch.testing.assert_close(rotation(one).abs(), torch.full((1, size), size**-0.5, dtype=torch.float64))
    if size < 200:
        square = dense(rotation)
        torch.testing.assert_close(square @ square.T, torch.eye(size, dtype=torch.float64))
        torch.testing.assert_close(rotation(x), x @ square)
        assert size < 16 or not torch.equal(dense(Rotation.random(size, seed=4)), square)


def test_orders_that_have_no_matrix_here() -> None:
    assert order(4096) == (1, 4096)
    assert order(5120) == (20, 256)
    assert order(5376) == (84, 64)
    assert [order(n) for n in (3, 6, 172, 344)] == [None, None, None, None]


def test_a_long_row_is_rotated_in_runs() -> None:
    rotation, x = Rotation.random(16, seed=0), normal(3, 48).double()
    torch.testing.assert_close(rotation(x), torch.cat([rotation(part) for part in x.split(16, 1)], 1))


def test_fusing_keeps_products() -> None:
    """x -> writer -> stream -> gain -> reader, with the stream rotated."""
    stream, x, gain = Rotation.random(96, seed=1), normal(7, 40), normal(96).double()
    writer, bias, reader = normal(96, 40), normal(96), normal(300, 96)
    wanted = ((x @ writer.T + bias) * gain.float()) @ reader.T
    turned = Turn(outputs=stream)
    between = x @ turned.weight(writer).T + turned.bias(bias)
    torch.testing.assert_close(between.double(), stream((x @ writer.T + bias).double()), rtol=1e-4, atol=1e-4)
    # The gain stands in front of the reader, whose norm has none any more.
    found = between @ Turn(gain=gain, inputs=stream).weight(reader).T
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_values_turn_in_their_rows_alone() -> None:
    rotation, rows = Rotation.random(8, seed=2), Rows(start=4, heads=3, stride=12, size=8)
    weight, bias, turn = normal(40, 10), normal(40), Turn(outputs=rotation, rows=rows)
    found, square = turn.weight(weight), dense(rotation).float()
    wanted = weight.clone()
    for head in range(3):
        places = slice(4 + 12 * head, 12 + 12 * head)
        wanted[places] = square.T @ weight[places]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(turn.bias(bias).reshape(40, 1), turn.weight(bias.reshape(40, 1)))
    assert torch.equal(found[:4], weight[:4])
