"""A family's patterns applied to one block: its linears, edges and fusion groups, by module path in the block."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.models.families import Edge, EdgeRule, Family


def linears(block: nn.Module, family: Family) -> dict[str, nn.Module]:
    """The block's quantisable linears: every nn.Linear and Conv1D that is no router."""
    found = {name: module for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return {name: module for name, module in found.items() if name not in family.routers}


def features(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an nn.Linear or Conv1D."""
    rows, columns = weight_of(linear).shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)


def weight_of(module: nn.Module) -> torch.Tensor:
    """The module's `weight` parameter."""
    return cast(torch.Tensor, module.weight)


def weighted(block: nn.Module) -> dict[str, nn.Module]:
    """The modules that own a `weight`: linears, norms with one, routers."""
    return {name: m for name, m in block.named_modules() if m._parameters.get("weight") is not None}


def edges(block: nn.Module, family: Family, config: Any) -> list[Edge]:
    """The edges that hold in this block, by module path in the block; those whose shapes do not match are left out."""
    modules = weighted(block)
    found = []
    for rule in family.rules:
        if rule.when(config):
            for producer, consumers in _expand(rule, list(modules)):
                edge = _edge(rule, producer, consumers, modules, family, config)
                if edge is not None:
                    found.append(edge)
    return found


def fusion_groups(block: nn.Module, family: Family) -> list[tuple[str, ...]]:
    """The linears that engines load as one matrix, so that they must share a scheme; by module path in the block."""
    names = list(linears(block, family))
    groups = []
    for patterns in family.fusions:
        for number in _numbers(patterns[0], names):
            group = tuple(pattern.replace("*", number) for pattern in patterns)
            if all(name in names for name in group):
                groups.append(group)
    return groups


def branches(block: nn.Module, family: Family, config: Any) -> dict[str, str]:
    """Linears that add to the residual stream -> the norms that read it there, by module path in the block."""
    modules = weighted(block)
    found = {branch.writer: branch.norm for branch in family.branches if branch.when(config)}
    return {writer: norm for writer, norm in found.items() if writer in modules and norm in modules}


def _edge(
    rule: EdgeRule,
    producer: str,
    consumers: tuple[str, ...],
    modules: dict[str, nn.Module],
    family: Family,
    config: Any,
) -> Edge | None:
    module = modules[producer]
    rows = rule.rows(config) if rule.rows is not None else None
    if rule.kind == "norm":
        channels = weight_of(module).shape[0]
    else:
        channels = rows[1] - rows[0] if rows is not None else features(module)[1]
    if any(_inputs(modules[name]) != channels for name in consumers):
        return None  # grouped-query attention: one value head feeds several heads of o_proj
    return Edge(
        producer,
        consumers,
        rule.kind,
        offset=rule.kind == "norm" and family.offset_norms,
        has_bias=getattr(module, "bias", None) is not None,
        rows=rows,
    )


def _inputs(consumer: nn.Module) -> int:
    """Input channels of a linear or a router, whose weight is (experts, in)."""
    return features(consumer)[0]


def _expand(rule: EdgeRule, names: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(producer, consumers) for each producer the pattern matches; `*` in it stands for the same number throughout."""
    pairs = []
    for number in _numbers(rule.producer, names):
        wanted = [pattern.replace("*", number) if "*" in rule.producer else pattern for pattern in rule.consumers]
        consumers = tuple(name for pattern in wanted for name in names if _matches(pattern, name))
        if consumers:
            pairs.append((rule.producer.replace("*", number), consumers))
    return pairs


def _numbers(pattern: str, names: list[str]) -> list[str]:
    """What `*` stands for in the names that match; [""] for a pattern without one that is among the names."""
    if "*" not in pattern:
        return [""] if pattern in names else []
    compiled = _compiled(pattern)
    return [match.group(1) for name in names if (match := compiled.fullmatch(name))]


def _matches(pattern: str, name: str) -> bool:
    return pattern == name or ("*" in pattern and _compiled(pattern).fullmatch(name) is not None)


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
