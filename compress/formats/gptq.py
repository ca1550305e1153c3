"""Integer weights as GPTQ checkpoints store them (AutoGPTQ, GPTQModel): packed along the inputs.

qweight (in * bits / 32, out) int32; qzeros (groups, out * bits / 32) int32; scales (groups, out) float16; g_idx (in,)
int32, the group of each input. Codes form one dense stream down each column. Zero points are unsigned; version 1 stores
them less one, so it cannot say zero, version 2 as they are (arXiv:2210.17323; GPTQModel's checkpoint formats).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from compress.errors import IntegrityError, UserError
from compress.formats.int_packed import pack_bits, unpack_bits
from compress.formats.names import GPTQ_BITS, Refusal
from compress.formats.tensors import HINT, Layout, exact, fetch
from compress.types import IntScheme, QuantizedTensor, Scheme

Version = Literal[1, 2]

QUANT_METHOD = "gptq"
SCALE_DTYPE = torch.float16
PARTS = ("qweight", "qzeros", "scales", "g_idx")
CHECKPOINT_FORMATS: dict[Version, str] = {1: "gptq", 2: "gptq_v2"}
_WORD = 32
# Engines that join linears ask about the joint name.
_JOINT = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)


def shape_refusal(scheme: Scheme, out: int, width: int) -> Refusal | None:
    """Why a weight (out, in) cannot be packed; None if it can."""
    bits = _integers(scheme).bits
    for what, extent in (("inputs", width), ("outputs", out)):
        if extent * bits % _WORD:
            return Refusal(
                f"gptq packs whole words, and {extent} {what} of {bits} bits are none", "use compressed-tensors"
            )
    return None


def value_refusal(quantized: QuantizedTensor, version: Version) -> Refusal | None:
    """Why these very zero points cannot be stored; None if they can."""
    zero = quantized.zero_point
    if version == 2 or zero is None or int(zero.amin()) > _integers(quantized.scheme).qmin:
        return None
    return Refusal(
        "gptq v1 stores zero points less one, and one of them is 0", "use gptq-v2, which stores them as they are"
    )


def layout(scheme: Scheme, out: int, width: int) -> Layout:
    """Shape and dtype of everything that a linear stores."""
    integers = _integers(scheme)
    groups = integers.groups(width)
    return {
        "qweight": ((width * integers.bits // _WORD, out), torch.int32),
        "qzeros": ((groups, out * integers.bits // _WORD), torch.int32),
        "scales": ((groups, out), SCALE_DTYPE),
        "g_idx": ((width,), torch.int32),
    }


def pack(quantized: QuantizedTensor, version: Version) -> dict[str, Tensor]:
    """The stored tensors of one linear, by local name; `value_refusal` has none for it."""
    scheme = _integers(quantized.scheme)
    zero = quantized.zero_point
    if zero is None:
        zero = torch.zeros(quantized.scale.shape, dtype=torch.int8)
    if value_refusal(quantized, version) is not None:
        raise IntegrityError("a zero point of 0 has no place in gptq v1", "please report this with the recipe")
    width, groups = quantized.codes.shape[1], quantized.scale.shape[1]
    return {
        "qweight": pack_bits(quantized.codes, scheme.bits).T.contiguous(),
        "qzeros": pack_bits((zero - _less(version)).T.contiguous(), scheme.bits),
        "scales": exact(quantized.scale, SCALE_DTYPE).T.contiguous(),
        "g_idx": torch.arange(width, dtype=torch.int32) // (width // groups),
    }


def unpack(stored: Mapping[str, Tensor], scheme: Scheme, version: Version) -> QuantizedTensor:
    """Inverse of `pack`.

    Raises:
        IntegrityError: a tensor is missing, its shape or dtype contradicts the scheme, or a symmetric weight has a zero
            point that is not in the middle.
        UserError: groups of inputs that do not lie side by side (activation order), which only `decode` reads.
    """
    quantized, g_idx = _unpacked(stored, scheme, version)
    width, groups = quantized.codes.shape[1], quantized.scale.shape[1]
    if not torch.equal(g_idx, torch.arange(width, dtype=torch.int32) // (width // groups)):
        raise UserError(
            "the groups of this gptq checkpoint follow the activation order: its inputs do not lie side by side",
            "no other format carries that; `compress export --to dense` does",
        )
    return quantized


def decode(stored: Mapping[str, Tensor], scheme: Scheme, version: Version) -> Tensor:
    """The weight (out, in) float16, whatever the order of the groups."""
    quantized, g_idx = _unpacked(stored, scheme, version)
    groups = quantized.scale.shape[1]
    if int(g_idx.amin()) < 0 or int(g_idx.amax()) >= groups:
        raise IntegrityError(f"g_idx names a group outside 0..{groups - 1}", HINT)
    codes = quantized.codes.to(SCALE_DTYPE)
    if quantized.zero_point is not None:
        codes = codes - quantized.zero_point[:, g_idx].to(SCALE_DTYPE)
    return codes * quantized.scale[:, g_idx]


def _unpacked(stored: Mapping[str, Tensor], scheme: Scheme, version: Version) -> tuple[QuantizedTensor, Tensor]:
    integers = _integers(scheme)
    words, out = fetch(stored, "qweight", 2).shape
    width = words * _WORD // integers.bits
    if not integers.fits(width):
        raise IntegrityError(
            f"qweight holds {width} inputs, which group size {integers.group_size} does not divide", HINT
        )
    qweight, qzeros, scales, g_idx = (
        fetch(stored, name, len(rule[0]), *rule) for name, rule in layout(integers, out, width).items()
    )
    codes = unpack_bits(qweight.T, integers.bits, width)
    found = unpack_bits(qzeros, integers.bits, out).to(torch.int16) + _less(version)
    found = torch.where(found > integers.qmax, integers.qmin, found)  # as kernels do: the sum wraps within its bits
    zero = found.to(torch.int8).T.contiguous()
    if integers.symmetric and bool(zero.any()):
        raise IntegrityError("qzeros are not in the middle of the grid, but the config says sym", HINT)
    return QuantizedTensor(codes, scales.T.contiguous(), None if integers.symmetric else zero, integers), g_idx


def quantization_config(schemes: Mapping[str, Scheme], ignored: Iterable[str], version: Version) -> dict[str, Any]:
    """The `quantization_config`: the commonest scheme as the base, every other linear and those left out by name."""
    (base, _), *others = Counter(schemes.values()).most_common()
    dynamic: dict[str, dict[str, Any]] = {}
    for scheme, _ in others:
        names = [name for name in schemes if schemes[name] == scheme]
        dynamic |= {f"+:{_pattern(name)}": _settings(_integers(scheme)) for name in names}
    dynamic |= {f"-:{_pattern(name)}": {} for name in sorted(ignored)}
    checkpoint_format = CHECKPOINT_FORMATS[version]
    return {
        "quant_method": QUANT_METHOD,
        "method": QUANT_METHOD,
        **_settings(_integers(base)),
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }


def schemes(quantization: Mapping[str, Any], linears: Sequence[str]) -> dict[str, Scheme]:
    """The scheme of each of `linears`. IntegrityError where the config says what is not read here."""
    dynamic = quantization.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise IntegrityError("`dynamic` of the gptq config is no mapping", "restore config.json")
    rules = [(str(key).removeprefix("+:"), rule) for key, rule in dynamic.items() if not str(key).startswith("-:")]
    found: dict[str, Scheme] = {}
    for name in linears:
        own: Mapping[str, Any] = next((rule for pattern, rule in rules if re.match(pattern, name)), {})
        found[name] = _scheme({**quantization, **own})
    return found


def ignored(quantization: Mapping[str, Any], candidates: Sequence[str]) -> list[str]:
    """Those of `candidates` that the config leaves out by a pattern."""
    patterns = [key.removeprefix("-:") for key in quantization.get("dynamic") or {} if key.startswith("-:")]
    return [name for name in candidates if any(re.match(pattern, name) for pattern in patterns)]


def version_of(quantization: Mapping[str, Any]) -> Version | None:
    """The checkpoint format of a gptq config: 1 where it names none, None where it is another (marlin ...)."""
    named = str(quantization.get("checkpoint_format") or quantization.get("format") or "gptq").lower()
    return next((version for version, name in CHECKPOINT_FORMATS.items() if name == named), None)


def _scheme(settings: Mapping[str, Any]) -> IntScheme:
    bits, size = settings.get("bits"), settings.get("group_size")
    if bits not in GPTQ_BITS or not isinstance(size, int) or not (size == -1 or size > 0):
        raise IntegrityError(
            f"gptq with bits {bits!r} and group_size {size!r} cannot be read here",
            f"{', '.join(map(str, GPTQ_BITS))} bits in groups are read",
        )
    return IntScheme(int(bits), None if size == -1 else size, bool(settings.get("sym", True)))


def _settings(scheme: IntScheme) -> dict[str, Any]:
    size = -1 if scheme.group_size is None else scheme.group_size
    return {"bits": scheme.bits, "group_size": size, "sym": scheme.symmetric}


def _pattern(name: str) -> str:
    parent, dot, leaf = name.rpartition(".")
    found = f"(?:{leaf}|{_JOINT[leaf]})" if leaf in _JOINT else re.escape(leaf)
    return f"^{re.escape(parent + dot)}{found}$"


def _less(version: Version) -> int:
    return 1 if version == 1 else 0


def _integers(scheme: Scheme) -> IntScheme:
    assert isinstance(scheme, IntScheme)
    return scheme
