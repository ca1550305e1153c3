"""Losses against plain formulas in float64, and against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from compress.distillation import hidden
from compress.distillation.configs import LOSS_NAMES, LOSSES, HiddenConfig, LossConfig
from compress.distillation.divergences import forward_kl, jsd, reverse_kl, skew_kl
from compress.distillation.losses import loss, shared_vocabulary
from compress.distillation.sampled import draw, sampled_kl
from compress.distillation.truncated import top_k, topk_kl

CONFIG: TypeAdapter[LossConfig] = TypeAdapter(LossConfig)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(3 * torch.randn(7, 31, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def plain_kl(p: Tensor, q: Tensor) -> list[float]:
    return [
        sum(a * math.log(a / b) for a, b in zip(r, s, strict=True)) for r, s in zip(p.tolist(), q.tolist(), strict=True)
    ]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_divergence_is_its_formula(logits: tuple[Tensor, Tensor], temperature: float) -> None:
    teacher, student = logits
    p, q = (x.div(temperature).softmax(-1) for x in logits)
    squared = temperature**2
    assert forward_kl(teacher, student, temperature).tolist() == pytest.approx([squared * v for v in plain_kl(p, q)])
    assert reverse_kl(teacher, student, temperature).tolist() == pytest.approx([squared * v for v in plain_kl(q, p)])
    mixture = 0.3 * p + 0.7 * q
    wanted = [squared * (0.3 * a + 0.7 * b) for a, b in zip(plain_kl(p, mixture), plain_kl(q, mixture), strict=True)]
    assert jsd(teacher, student, 0.3, temperature).tolist() == pytest.approx(wanted)
    skewed = 0.1 * p + 0.9 * q
    wanted = [squared * value for value in plain_kl(p, skewed)]
    assert skew_kl(teacher, student, 0.1, temperature).tolist() == pytest.approx(wanted)
    assert torch.equal(skew_kl(teacher, student, 0.0, temperature), forward_kl(teacher, student, temperature))


def test_the_gradient_keeps_its_size_as_the_temperature_grows() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (0.1 * torch.randn(4, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    norms = []
    for temperature in (1.0, 8.0):
        leaf = student.clone().requires_grad_()
        forward_kl(teacher, leaf, temperature).sum().backward()
        norms.append(float(leaf.grad.norm()))  # type: ignore[union-attr]
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def test_top_k_with_its_bucket_is_the_kl_of_the_coarser_distributions(logits: tuple[Tensor, Tensor]) -> None:
    teacher, student = logits
    log_p, ids = top_k(teacher, 5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    coarse = [torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], -1) for x in (p, q)]
    found = topk_kl(log_p, ids, student)
    assert found.tolist() == pytest.approx(plain_kl(*coarse))
    assert bool((found <= forward_kl(teacher, student) + 1e-12).all()), "it is a lower bound"
    whole = topk_kl(*top_k(teacher, 31), student)
    assert whole.tolist() == pytest.approx(forward_kl(teacher, student).tolist())


def test_draws_from_the_teacher_give_the_kl_and_its_gradient_without_bias(logits: tuple[Tensor, Tensor]) -> None:
    teacher, student = logits
    exact, estimated = student.clone().requires_grad_(), student.clone().requires_grad_()
    forward_kl(teacher, exact).sum().backward()
    found = sampled_kl(*draw(teacher, 200_000, 0), estimated)
    found.sum().backward()
    assert found.tolist() == pytest.approx(forward_kl(teacher, student).tolist(), rel=0.02)
    assert exact.grad is not None
    assert estimated.grad is not None
    assert float((exact.grad - estimated.grad).abs().max()) < 0.01
    few = torch.stack([sampled_kl(*draw(teacher, 3, seed), student) for seed in range(4000)]).mean(0)
    assert few.tolist() == pytest.approx(forward_kl(teacher, student).tolist(), rel=0.1)
    assert torch.equal(draw(teacher, 3, 7)[1], draw(teacher, 3, 7)[1])
    assert not torch.equal(draw(teacher, 3, 7)[1], draw(teacher, 3, 8)[1])


def test_a_projection_begins_where_it_explains_the_teacher_and_states_are_matched_by_depth() -> None:
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(500, 6, generator=generator)
    wanted = states @ torch.randn(6, 9, generator=generator)
    projection = hidden.fitted(states, wanted)
    assert projection.shape == (9, 6)
    for kind in ("cosine", "mse"):
        near = hidden.distance(kind, [states], [wanted], [projection])  # type: ignore[arg-type]
        far = hidden.distance(kind, [states.flip(0)], [wanted], [projection])  # type: ignore[arg-type]
        assert near.shape == (500,)
        assert float(near.mean()) < 0.01 < 0.5 < float(far.mean())
    relative = hidden.distance("mse", [states], [100 * wanted], [projection])
    assert relative.mean() == pytest.approx(0.98, abs=0.02), "of the teacher's own size"
    assert hidden.pairs(HiddenConfig(), 2, 6) == [(1, 3), (2, 6)]
    assert hidden.pairs(HiddenConfig(layers="last"), 4, 6) == [(4, 6)]


@pytest.mark.parametrize("kind", [name for name in LOSS_NAMES if not LOSSES[name].own_text])
def test_every_loss_of_a_recipe_is_lowest_at_the_teacher_and_has_a_finite_gradient(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    config = CONFIG.validate_python({"kind": kind})
    teacher = torch.randn(6, 40, generator=generator)
    targets = torch.randint(0, 40, (6,), generator=generator)
    far = (torch.randn(6, 44, generator=generator) * 60).requires_grad_()
    value = loss(config, far, teacher if config.taught else None, targets).sum()
    value.backward()
    assert bool(torch.isfinite(far.grad).all())  # type: ignore[arg-type]
    if config.taught:
        same = loss(config, teacher.clone(), teacher, targets)
        assert same.tolist() == pytest.approx([0.0] * 6, abs=1e-5)
        assert float(value.detach()) > 1.0
        assert not far.grad[:, 40:].any(), "ids that only one model has teach nothing"  # type: ignore[index]
    else:
        assert loss(config, teacher, None, targets).tolist() == pytest.approx(
            torch.nn.functional.cross_entropy(teacher, targets, reduction="none").tolist()
        )


def test_vocabularies_are_cut_to_what_both_have() -> None:
    a, b = shared_vocabulary(torch.zeros(2, 10), torch.zeros(2, 12))
    assert (a.shape, b.shape) == ((2, 10), (2, 10))
