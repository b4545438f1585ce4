"""Faults to plant in the C++ kernels, as data: a patch that must apply exactly once, to a file of csrc.

A patch that no longer applies is a fault to be planted anew, where the code that it damages has gone.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    file: str
    old: str
    new: str
    table: str = "baseline"  # of kernels, that has the damaged code
    suite: str = "attention"  # of cpu_suites.py, that is to notice it


FAULTS: dict[str, Fault] = {
    "last-visible-key-hidden": Fault("cpu/mask.inl", "(hi[n] > key)", "(hi[n] > key + 1)"),
    "one-key-too-many": Fault("cpu/mask.inl", "(hi[n] > key)", "(hi[n] >= key)"),
    "first-visible-key-hidden": Fault("cpu/mask.inl", "(lo[n] <= key)", "(lo[n] < key)"),
    "top-left": Fault("mask.h", "end - m.seqlen_q", "0 * end"),
    "row-sum-not-rescaled": Fault("cpu/softmax.inl", "fused(row_sum[n], rescale[n], tile_sum[n])", "row_sum[n] + tile_sum[n]"),
    "acc-not-rescaled": Fault("cpu/forward.inl", "fused(load(at), rescale[n], x)", "load(at) + x"),
    "empty-row-guard-removed": Fault("cpu/softmax.inl", "highest == -kInfinity ? Vec{} : highest", "highest"),
    "lse-in-base-2": Fault(
        "cpu/softmax.inl", "lse[n] = fused(row_max[n], broadcast(kLn2), ", "lse[n] = fused(row_max[n], broadcast(1.0f), "
    ),
    "hidden-values-enter": Fault("cpu/forward.inl", "if (hides && !all_finite(o))", "if (false)"),
    "wrong-head-of-a-group": Fault("cpu/query_block.inl", "kv_head * group + index / per_head", "kv_head + index / per_head * p.kv_heads"),
    "delta-dropped": Fault("cpu/backward.inl", "* (x - delta[n])", "* x"),
    "scale-omitted-in-dk": Fault("cpu/backward.inl", "dk, dk_row, Real(p.scale), adds)", "dk, dk_row, Real(1), adds)"),
    "group-of-heads-not-summed": Fault("cpu/backward.inl", "before = adds ?", "before = false ?"),
    "hidden-weights-in-backward": Fault(
        "cpu/backward.inl", "const bool masked = !common.contains({j, j + height});", "const bool masked = false;"
    ),
    "mask-ignored": Fault("cpu/mask.inl", "if (!shown) return inside;", "return inside;"),
    "mask-of-every-second-byte": Fault("cpu/mask_bits.inl", "x |= x >> 32, x |= x >> 16, x |= x >> 8;", "x |= x >> 32, x |= x >> 16;"),
    "softcap-not-differentiated": Fault("cpu/pair_block.inl", "ds * steepness", "ds"),
    "dropout-missing-in-backward": Fault("cpu/pair_block.inl", "if (p.dropout_seed) load_dropout();", "if (false) load_dropout();"),
    "bias-gradient-of-the-last-keys-alone": Fault("cpu/backward.inl", "bias_sums[i] += of_options", "bias_sums[i] = of_options"),
    "ranges-of-keys-not-rescaled": Fault("cpu/decode.inl", "broadcast(before[r]), x)", "broadcast(Real(1)), x)"),
    "packed-keys-of-queries": Fault("mask.h", "clamp(read(p.cu_seqlens_k + batch), 0,", "clamp(read(p.cu_seqlens_q + batch), 0,"),
    "last-key-block-skipped": Fault("cpu/forward.inl", "start_n < keys.hi;", "start_n + kBlockN < keys.hi + 1;"),
    "mean-of-heads-not-divided": Fault("cpu/weights.inl", "/ double(heads.hi - heads.lo)", "/ 1.0"),
    "first-head-alone-averaged": Fault(
        "cpu/weights.inl", "QueryBlock::of_head(p, member, head, first)", "QueryBlock::of_head(p, member, heads.lo, first)"
    ),
    "sums-of-the-tile-before": Fault(
        "cpu/weights.inl",
        "std::fill_n(sums, kBlockN * N * kWidth, Real(0));",
        "if (start_n == 0) std::fill_n(sums, kBlockN * N * kWidth, Real(0));",
    ),
    "weights-at-the-tiles-first-key": Fault("cpu/weights.inl", "(range.lo - tile_keys.lo) * N * kWidth", "0"),
    "weights-dropped-by-nobody": Fault("cpu/weights.inl", "(kept ? weight : Vec{})", "weight"),
    "weights-of-options-ignored": Fault("cpu/weights.inl", "shifted = PairOptions<N>::given(p);", "shifted = false;"),
    "weights-of-lse-in-base-e": Fault("cpu/weights.inl", "double(natural) * kLog2EOf64", "double(natural)"),
    "rows-that-see-nothing-weigh": Fault("cpu/weights.inl", "natural == -kInfinity;", "false;"),
    "pairs-not-scaled": Fault("cpu/pair_operands.inl", "return score * scale;", "return score;", "avx512_bf16"),
    "pairs-of-upper-queries-are-lower-ones": Fault(
        "cpu/gradient_tiles.inl", "interleave_upper(rows[2 * m], rows[2 * m + 1])", "interleave_lower(rows[2 * m], rows[2 * m + 1])",
        "avx512_bf16",
    ),
    "query-without-a-partner-forgotten": Fault(
        "cpu/backward.inl", "Operands::steps(see.hi) - first", "see.hi / Operands::kTerms - first", "avx512_bf16"
    ),
    "hidden-half-of-a-pair-enters": Fault(
        "cpu/pair_operands.inl", "return (IntVec)(((Halves)x & 0x7fff) != 0);", "return ~IntVec{};", "avx512_bf16"
    ),
    "biases-of-the-first-row": Fault("cpu/pairs.inl", "same_rows &= from[lane] == from[0];", "same_rows &= true;"),
    "shift-forgotten-without-a-softcap": Fault("cpu/forward.inl", "(options && p.softcap == 0.0)", "(options && p.softcap == -1.0)"),
    "tiles-open-at-one-end": Fault("cpu/mask.inl", "(lo[n] <= Int(0)) & (hi[n] >= keys)", "(lo[n] <= Int(0)) | (hi[n] >= keys)"),
    "pages-read-past-the-table": Fault(
        "cpu/key_rows.inl", "smaller(range.hi + kRowsAhead, p.seqlen_k)", "(range.hi + kRowsAhead)", suite="memory"
    ),
    "chains-not-added-up": Fault("cpu/linear.inl", "s == 0 ? x : load(to) + x", "x", suite="layers"),
    "block-of-steps-forgotten": Fault("cpu/linear.inl", "if (k > 0) x +=", "if (k > kProductSteps) x +=", suite="layers"),
    "bias-with-every-block-of-steps": Fault("cpu/linear.inl", "if (last && p.bias)", "if (p.bias)", suite="layers"),
    "gate-and-value-exchanged": Fault(
        "cpu/linear.inl", "activation.value(gate) * value", "activation.value(value) * gate", suite="layers"
    ),
    "residual-instead-of-the-sum": Fault("cpu/linear.inl", "if (p.residual) x +=", "if (p.residual) x =", suite="layers"),
    "epsilon-outside-the-root": Fault(
        "cpu/norm.inl", "std::sqrt(squares[0] / width + p.eps)", "(std::sqrt(squares[0] / width) + p.eps)", suite="layers"
    ),
    "mean-slope-forgotten": Fault("cpu/norm.inl", "level = p.mean ? sums[1] / width : 0.0f", "level = 0.0f", suite="layers"),
    "gradient-of-the-sum-forgotten": Fault("cpu/norm.inl", "if (dsummed) result +=", "if (false) result +=", suite="layers"),
    "weight-gradient-of-the-last-row-alone": Fault(
        "cpu/norm.inl", "fused(gradient, normal, lanes.load_from(dweight + c))", "gradient * normal", suite="layers"
    ),
    "gate-gradient-without-the-value": Fault(
        "cpu/pointwise.inl", "value ? slope * lanes.load_from(value + c) : slope", "slope", suite="layers"
    ),
    "sums-of-the-last-block-of-rows": Fault("cpu/pointwise.inl", "load(sums + c) + load(part + c)", "load(part + c)", suite="layers"),
    "slope-of-silu-turned-round": Fault(
        "cpu/activation.inl", "fused(x, sigmoid.off, broadcast", "fused(x, sigmoid.on, broadcast", suite="layers"
    ),
    "cubic-term-rounded": Fault("cpu/activation.inl", "kCubic = 0.044715f", "kCubic = 0.0447f", suite="layers"),
    "rotated-forward-alone": Fault("cpu/rotation.inl", "p.inverse ? -1.0f : 1.0f", "1.0f", suite="layers"),
    "end-of-the-row-not-copied": Fault("cpu/rotation.inl", "d < p.head_dim; ++d)", "d + 1 < p.head_dim; ++d)", suite="layers"),
}  # fmt: skip
