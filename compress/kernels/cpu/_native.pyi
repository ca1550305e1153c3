"""Signatures of the native module (csrc/module.cpp). Arrays are torch tensors or numpy arrays, on the CPU."""

from typing import Any

PAGE_TOKENS: int
"""Tokens of one page of a decoder's key-value cache."""

def isa() -> str:
    """The instruction set in use. ValueError where COMPRESS_ISA names one that is not available."""

def set_isa(name: str) -> None:
    """Use this one of `available_isas()` from now on."""

def available_isas() -> list[str]:
    """What this processor runs, best last."""

def keep_tokens(logits: Any, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Any, Any]:
    """What top-k, then top-p (the smallest set of likeliest tokens that holds it), then min-p leave of one row.

    logits float32 (vocab,), divided by the temperature; of equals the lower id counts as likelier. Tensors of ids
    int64 (n,), ascending, and of their probabilities float64 (n,). 0, 1 and 0 switch the filters off.
    ValueError: NaN among the logits, or none that is finite at their largest.
    """

def gptq_quantize(
    weight: Any,
    upper: Any,
    scale: Any,
    zero_point: Any,
    group_of_column: Any,
    qmin: int,
    qmax: int,
    codes: Any,
    loss: Any,
    threads: int,
) -> None:
    """As `reference.gptq_quantize`; writes codes int8 (out, in) and loss float32 (out).

    weight, upper, scale, zero_point float32; zero_point holds whole numbers; group_of_column int32.
    """

def coordinate_descent(
    gradient: Any,
    hessian: Any,
    scale: Any,
    zero_point: Any,
    group_of_column: Any,
    qmin: int,
    qmax: int,
    codes: Any,
    sweeps: int,
    threads: int,
) -> int:
    """As `reference.coordinate_descent`; updates gradient float32 (out, in) and codes int8 (out, in)."""

def rounding_loss(
    weight: Any,
    scales: Any,
    importance: Any,
    shares: Any,
    group_size: int,
    bits: int,
    symmetric: bool,
    loss: Any,
    threads: int,
) -> None:
    """As `reference.rounding_loss`; shares float32 (n), loss float32 (candidates), written. All arrays float32."""

def search_range(
    weight: Any,
    importance: Any,
    shares: Any,
    offsets: Any,
    group_size: int,
    bits: int,
    symmetric: bool,
    scale_type: str,
    share: Any,
    sign: Any,
    threads: int,
) -> None:
    """As `reference.search_range`; share, sign float32 (out, groups), written. importance None counts squared errors.

    shares (n), offsets (m); scale_type float32, float16 or bfloat16. All arrays float32.
    """

def prune_columns(weight: Any, upper: Any, pruned: Any, errors: Any, group: int, drop: int, threads: int) -> None:
    """As `reference.prune_columns`; updates weight float32 and pruned int8 (out, in), writes errors float32 (out, in).

    `pruned` is read where group is 0, else written.
    """

def add_moment(out: Any, a: Any, b: Any, first: int, last: int, upper: bool) -> None:
    """As `reference.add_moment` for rows [first, last); out float32 (width, width), updated.

    a, b (tokens, width), both float32 or both bfloat16.
    """

def causal_attention(q: Any, k: Any, v: Any, out: Any, scale: float, threads: int) -> None:
    """As `reference.causal_attention`; out (batch, tokens, heads, dim), written. All float32 or all bfloat16."""

class PackedLinear:
    """A weight repacked for products (csrc/linear.h). `bits`: of a stored weight; `nbytes`: what a product reads.

    `takes_eight_bit`: its codes are integers, which `multiply` may meet with 8-bit inputs.
    """

    rows: int
    columns: int
    bits: int
    nbytes: int
    takes_eight_bit: bool

    def multiply(self, x: Any, out: Any, eight_bit: bool, threads: int) -> None:
        """out (tokens, rows) = x (tokens, columns) times the weight, transposed, plus its bias. All float32."""

def pack_codes(
    packed: Any,
    scale: Any,
    zero_point: Any,
    columns: int,
    group_size: int,
    bits: int,
    bias: Any,
    threads: int,
    inputs: tuple[str, int, float],
) -> PackedLinear:
    """As `kernels.packed_linear.pack_codes`; group_size a multiple of 32 that divides `columns`, or `columns`.

    inputs: how they are rounded, how many share a scale (0: a token's), and the calibrated scale (0: none).
    """

def pack_floats(
    packed: Any,
    scale: Any,
    columns: int,
    group_size: int,
    table: Any,
    scale_type: str,
    value_type: str,
    factor: float,
    divisor: float,
    bias: Any,
    threads: int,
    inputs: tuple[str, int, float],
) -> PackedLinear:
    """As `kernels.packed_linear.pack_floats`; ValueError where a code of FP8 is NaN."""

def pack_dense(weight: Any, group_size: int, bias: Any, threads: int) -> PackedLinear:
    """weight (rows, columns) bfloat16 or float32 as it is; with a group_size, rounded to 8 bits in such groups."""

class Decoder:
    """A decoder of the Llama family with its key-value cache of `pages` pages (csrc/decoder.h).

    `cache_bytes`: of the keys and values of one token in all layers. `open_page_bytes`: what each sequence's last page
    takes beyond that until it is full, where a layer keeps int2.
    """

    cache_bytes: int
    open_page_bytes: int

    def __init__(
        self,
        embedding: Any,
        packed_embedding: PackedLinear | None,
        final_norm: Any,
        head: PackedLinear,
        frequencies: Any,
        rope_factor: float,
        heads: int,
        kv_heads: int,
        epsilon: float,
        cache: str,
        pages: int,
    ) -> None:
        """All arrays but the embedding are float32; frequencies (dim / 2), final_norm (hidden); kv_heads divides heads.

        cache: how keys and values are kept: float32, bfloat16, int8 or int4 (each token and head with its own grid).
        embedding (vocabulary, hidden) bfloat16 or float32 is read in place, and kept; None where it is packed.
        """

    def add_layer(
        self,
        q: PackedLinear,
        k: PackedLinear,
        v: PackedLinear,
        o: PackedLinear,
        gate: PackedLinear,
        up: PackedLinear,
        down: PackedLinear,
        attention_norm: Any,
        mlp_norm: Any,
        q_norm: Any,
        k_norm: Any,
        window: int,
    ) -> None:
        """The next layer. q_norm, k_norm (dim) or None; window: positions that a token sees, its own among them."""

    def step(
        self,
        tokens: Any,
        positions: Any,
        sequences: Any,
        tables: Any,
        rows: Any,
        logits: Any,
        eight_bit: bool,
        threads: int,
    ) -> None:
        """Computes tokens and writes the logits (rows, vocabulary) of some of them.

        tokens, positions, sequences (count) int32: the id, the position, and the row of `tables` (sequences, pages)
        int32 that lists a sequence's pages; rows int32: indices of the tokens whose logits are wanted.
        """
