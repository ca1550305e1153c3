"""What is chosen and from what: sets of linears that must have one scheme, and the schemes that each may have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from compress.models.skeleton import LinearSpec, Skeleton
from compress.types import IntScheme

BITS = (2, 3, 4, 5, 6, 8)
TABLE_BITS = (3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Unit:
    """Linears of one block that engines load as one matrix, or one alone; all experts of a block are one unit.

    table: `embeddings` or `head` where it is one of these, as a recipe's stage calls it.
    """

    name: str
    block: int
    linears: tuple[LinearSpec, ...]
    options: tuple[IntScheme, ...]
    """The schemes that divide every width, from the fewest bits to the most."""
    bits: tuple[int, ...]
    """Stored bits of the whole unit under each option: codes, scales and zero points."""
    table: str | None = None

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return sum(spec.in_features * spec.out_features for spec in self.linears)


def grid(
    symmetric: bool = True, bits: Sequence[int] = BITS, group_sizes: Sequence[int | None] = GROUP_SIZES
) -> list[IntScheme]:
    """Every option: bits times group sizes."""
    return [IntScheme(width, size, symmetric) for width in bits for size in group_sizes]


def units(
    skeleton: Skeleton, wanted: Iterable[str], options: Sequence[IntScheme], scale_bits: Mapping[str, int]
) -> list[Unit]:
    """The units of the linears `wanted`, in the order of the model.

    A unit whose widths no group size divides may have a scale per channel instead. scale_bits: of each linear.
    """
    chosen, found = set(wanted), []
    for block in range(skeleton.num_blocks):
        specs = {spec.name: spec for spec in skeleton.linears(block) if spec.name in chosen}
        for names in _tied(specs, skeleton.fusion_groups(block)):
            members = tuple(specs[name] for name in names)
            found.append(_unit(_name(members), members, options, scale_bits))
    return found


def table_units(
    specs: Mapping[str, LinearSpec], options: Sequence[IntScheme], scale_bits: Mapping[str, int]
) -> list[Unit]:
    """The units of embedding and head, by what a recipe's stage calls them."""
    finer = [option for option in options if option.bits in TABLE_BITS]
    return [_unit(spec.name, (spec,), finer, scale_bits, table) for table, spec in specs.items()]


def _unit(
    name: str,
    members: tuple[LinearSpec, ...],
    options: Sequence[IntScheme],
    scale_bits: Mapping[str, int],
    table: str | None = None,
) -> Unit:
    fitting = [option for option in options if all(option.fits(spec.in_features) for spec in members)]
    if not fitting:
        fitting = list(dict.fromkeys(IntScheme(each.bits, None, each.symmetric) for each in options))
    sized = [(sum(stored_bits(s, option, scale_bits[s.name]) for s in members), option) for option in fitting]
    sized.sort(key=lambda pair: (pair[0], pair[1].bits))
    bits, ordered = zip(*sized, strict=True)
    return Unit(name, members[0].block, members, ordered, bits, table)


def stored_bits(spec: LinearSpec, scheme: IntScheme, scale_bits: int) -> int:
    """Bits that a linear takes under a scheme, as every other part of the program counts them."""
    per_weight = scheme.bits_per_weight(spec.in_features, scale_bits, spec.out_features)
    return round(per_weight * spec.in_features * spec.out_features)


def _tied(specs: Mapping[str, LinearSpec], fused: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Sets of names that share a scheme, each in the order of the block."""
    sets = [tuple(name for name in specs if specs[name].expert is not None)]
    sets += [tuple(name for name in specs if name in group) for group in fused]
    taken: dict[str, tuple[str, ...]] = {}
    for members in sets:
        taken |= {name: members for name in members if name not in taken}
    return list(dict.fromkeys(taken.get(name, (name,)) for name in specs))


def _name(members: Sequence[LinearSpec]) -> str:
    first, *others = (spec.name for spec in members)
    if members[0].expert is not None:
        return first.partition(".experts.")[0] + ".experts"
    return "+".join([first, *(name.rpartition(".")[2] for name in others)])
