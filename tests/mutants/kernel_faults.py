"""Faults to plant in what the Triton kernels are made of, as data: a patch that must apply exactly once, and what notices it.

A patch that no longer applies is a fault to be planted anew, where the code that it damages has gone.
"""

# A fault a line, where it fits.
# fmt: off
from __future__ import annotations

from typing import NamedTuple

from .mask_faults import MASK, VISITS, Table
from .page_faults import PAGES
from .pass_faults import BACKEND, PASSES


class Fault(NamedTuple):
    file: str  # in the folder of the package
    noticed_by: str  # the unit of kernel_suite.py that runs first; if it notices nothing, the others follow
    old: str
    new: str


# What changes no result, and why nothing can or should notice it.
SURVIVORS = {
    "visible-mask-other-1": "lanes that get `other` are hidden already: what is loaded is and-ed with seen",
    "bias-other-0": "lanes that get `other` are hidden already: what is loaded is and-ed with seen",
    "stored-dim-stride-in-int32": "only results are stored, and the backend allocates them: their columns lie near each other",
    "dk-rows-past-the-member": "rows past the member have an lse of inf and read as zero: the select is there for the compiler",
    "members-not-monotone": "a negative length sees as little as a length of 0, and what such members give is not specified",
    "dropout-of-everything-keeps": "at p = 1 the threshold keeps one word in 2**32, too rare to be met, which the scale of 0 drops",
    "dk-lse-other-0": "rows past the member are hidden or not there: their weights are 0 whatever their lse",
}

TENSOR: Table = {
    "batch-stride-in-int32": ("huge_strides", "tl.cast(batch, tl.int64) * x.batch", "batch * x.batch"),
    "head-stride-in-int32": ("huge_strides", "tl.cast(head, tl.int64) * x.head", "head * x.head"),
    "seq-stride-in-int32": ("huge_strides", "tl.cast(start, tl.int64) * x.seq", "start * x.seq"),
    "row-stride-in-int32": (
        "huge_strides",
        "return load_rows(x, row_pointers(x, batch, head, start) + rows[:, None].to(tl.int64) * x.seq",
        "return load_rows(x, row_pointers(x, batch, head, start) + rows[:, None] * x.seq"),
    "dim-stride-in-int32": ("huge_strides", "tl.load(pointers + columns.to(tl.int64) * x.dim", "tl.load(pointers + columns * x.dim"),
    "stored-dim-stride-in-int32": (
        "huge_strides",
        "tl.store(pointers + columns.to(tl.int64) * x.dim",
        "tl.store(pointers + columns * x.dim"),
    "columns-taken-for-contiguous": (
        "layout-strided",
        "tl.load(pointers + columns.to(tl.int64) * x.dim",
        "tl.load(pointers + columns.to(tl.int64)"),
    "stored-columns-taken-for-contiguous": (
        "layout-column",
        "tl.store(pointers + columns.to(tl.int64) * x.dim",
        "tl.store(pointers + columns.to(tl.int64)"),
    "packed-strides-swapped": (
        "packed",
        "View(x, 0, strides[1], strides[0], strides[2])",
        "View(x, 0, strides[0], strides[1], strides[2])"),
    "packed-numbers-strides-swapped": (
        "memory",
        "View(x, *strides, 0) if len(strides) == 3 else View(x, 0, *strides, 0)",
        "View(x, *strides, 0) if len(strides) == 3 else View(x, 0, *strides[::-1], 0)"),
    "size-1-keeps-its-stride": ("bias-1h11", "0 if size == 1 else stride", "stride"),
    "columns-unmasked": (
        "memory",
        "here = inside if fills(DIM, chunk) else inside & (columns < DIM)\n        tiles",
        "here = inside if fills(DIM, chunk) else inside & (columns < DIM + 1)\n        tiles"),
    "stored-columns-unmasked": (
        "memory",
        "here = inside if fills(DIM, chunk) else inside & (columns < DIM)\n        tl.store",
        "here = inside if fills(DIM, chunk) else inside & (columns < DIM + 1)\n        tl.store"),
    "stored-last-column-missing": (
        "plain",
        "here = inside if fills(DIM, chunk) else inside & (columns < DIM)\n        tl.store",
        "here = inside if fills(DIM, chunk) else inside & (columns < DIM - 1)\n        tl.store"),
    "chunk-fills-too-soon": ("plain", "return sum(widths(dim)[: chunk + 1]) <= dim", "return sum(widths(dim)[:chunk]) <= dim"),
    "second-chunk-too-narrow": (
        "plain",
        "second = max(16, 1 << max(dim - first - 1, 0).bit_length())",
        "second = max(16, 1 << max(dim - first - 2, 0).bit_length())"),
    "second-chunk-reads-the-first": ("plain", "return sum(widths(dim)[:chunk])", "return sum(widths(dim)[: max(chunk - 1, 0)])"),
    "tile-other-1": ("plain", "mask=here, other=0.0)", "mask=here, other=1.0)"),
    "tile-other-missing": ("memory", "mask=here, other=0.0)", "mask=here)"),
    "numbers-other-missing": ("memory", "mask=rows < last, other=other)", "mask=rows < last)"),
    "numbers-one-row-too-many": ("memory", "mask=rows < last, other=other)", "mask=rows <= last, other=other)"),
    "rows-before-the-first-loaded": ("hidden_values", "((rows >= first) & (rows < last))", "(rows < last)"),
    "rows-behind-the-last-loaded": ("memory", "((rows >= first) & (rows < last))", "((rows >= first) & (rows <= last))"),
    "output-tail-unwritten": ("causal", "(rows < last)[:, None], tiles, DIM)", "(rows < last - 1)[:, None], tiles, DIM)"),
    "output-beyond-the-tail": ("memory", "(rows < last)[:, None], tiles, DIM)", "(rows <= last)[:, None], tiles, DIM)"),
    "numbers-tail-unwritten": (
        "causal",
        "numbers.to(x.ptr.dtype.element_ty), mask=rows < last)",
        "numbers.to(x.ptr.dtype.element_ty), mask=rows < last - 1)"),
}
MATMUL: Table = {
    "last-chunk-not-contracted": (
        "plain",
        "total = tl.dot(a[chunk], b[chunk].T, total,",
        "total = tl.dot(a[chunk], b[chunk].T * 0.0, total,"),
    "accumulate-in-fp32": ("float64", "return tl.float64 if dtype == tl.float64 else tl.float32", "return tl.float32"),
    "weights-in-half-precision": ("causal", "w = weights.to(rows[chunk].dtype)", "w = weights.to(tl.float16).to(rows[chunk].dtype)"),
    "product-forgets-the-total": ("causal", "tl.dot(w, rows[chunk], total[chunk], ", "tl.dot(w, rows[chunk], total[chunk] * 0.0, "),
    "row-products-of-the-first-chunk": ("plain", "total += tl.sum(a[chunk].to(ACC) * b[chunk].to(ACC), 1)", "total = total"),
    "infinite-rows-pass": ("hidden_values", '< float("inf"))', '<= float("inf"))'),
    "broken-rows-kept": ("hidden_values", "tl.where((broken > 0)[:, None], tl.zeros_like(tiles[chunk]), tiles[chunk])", "tiles[chunk]"),
    "broken-rows-of-the-last-chunk": (
        "visible_values",
        "broken = tl.maximum(broken, tl.max(infinite.to(tl.int32), 1))",
        "broken = tl.max(infinite.to(tl.int32), 1)"),
    "poison-removed": ("visible_values", 'tl.where(poisoned[:, None], float("nan"), tiles[chunk])', "tiles[chunk]"),
    "poison-of-hidden-pairs": ("hidden_values", '(s != float("-inf")) & broken[None, :]', "(s == s) & broken[None, :]"),
}
SOFTMAX: Table = {
    "row-max-starts-at-0": ("no-visible-keys-sinks", 'tl.full([ROWS], float("-inf"), ACC)', "tl.full([ROWS], 0.0, ACC)"),
    "row-max-starts-finite": ("low", 'tl.full([ROWS], float("-inf"), ACC)', "tl.full([ROWS], -1e4, ACC)"),
    "sink-in-natural-units": ("packed-unused-sinks", "tl.maximum(row_max, sink * UNIT)", "tl.maximum(row_max, sink)"),
    "sink-missing-in-the-sum": ("everything", 'tl.where(row_max == float("-inf"), 0.0, 1.0).to(ACC)', "tl.zeros([ROWS], ACC)"),
    "sink-twice": (
        "everything",
        'tl.where(row_max == float("-inf"), 0.0, 1.0).to(ACC)',
        'tl.where(row_max == float("-inf"), 0.0, 2.0).to(ACC)'),
    "sink-of-minus-infinity-counts": ("infinite_sink", 'tl.where(row_max == float("-inf"), 0.0, 1.0).to(ACC)', "tl.full([ROWS], 1.0, ACC)"),
    "sink-of-head-0": ("everything", "tl.load(sinks + tl.cast(head, tl.int64) * stride)", "tl.load(sinks + 0 * head)"),
    "sinks-taken-for-contiguous": ("strided_options", "tl.load(sinks + tl.cast(head, tl.int64) * stride)", "tl.load(sinks + head)"),
    "pivot-unguarded": ("first-rows-empty", 'return tl.where(row_max == float("-inf"), 0.0, row_max)', "return row_max"),
    "acc-not-rescaled": ("causal", "matmul.scale(acc, rescale[:, None]), p, v", "acc, p, v"),
    "row-sum-not-rescaled": ("causal", "row_sum = row_sum * rescale + tl.sum(p, 1)", "row_sum = row_sum + tl.sum(p, 1)"),
    "row-sum-of-dropped-weights": (
        "everything",
        "    row_sum = row_sum * rescale + tl.sum(p, 1)\n    if factor is not None:\n        p *= factor\n",
        "    if factor is not None:\n        p *= factor\n    row_sum = row_sum * rescale + tl.sum(p, 1)\n"),
    "row-sum-of-rounded-weights": (
        "bfloat16",
        "row_sum * rescale + tl.sum(p, 1)",
        "row_sum * rescale + tl.sum(p.to(v[0].dtype).to(p.dtype), 1)"),
    "dropout-missing-in-forward": ("everything", "        p *= factor\n", "        p *= 1.0\n"),
    "maximum-of-this-tile-alone": ("large-scores", "new_max = tl.maximum(row_max, tl.max(scores, 1))", "new_max = tl.max(scores, 1)"),
    "merge-acc-not-rescaled": ("split-many", "acc[chunk] * rescale[:, None] + tl.sum(weights", "acc[chunk] + tl.sum(weights"),
    "merge-sum-not-rescaled": ("split", "row_sum * rescale + tl.sum(weights, 0)", "row_sum + tl.sum(weights, 0)"),
    "merge-unweighted": ("split", "tl.sum(weights[:, None] * tiles[chunk], 0)", "tl.sum(tiles[chunk], 0)"),
    "merge-pivot-unguarded": (
        "split-range",
        "new_max = tl.maximum(row_max, tl.max(lse, 0))\n    pivot = finite_pivot(new_max)",
        "new_max = tl.maximum(row_max, tl.max(lse, 0))\n    pivot = new_max"),
    "lse-in-base-2": ("causal", "+ tl.log2(total) * LN_2)", "+ tl.log2(total))"),
    "lse-without-the-maximum": ("causal", "finite_pivot(row_max) * (1.0 / UNIT) + tl.log2(total)", "tl.log2(total)"),
    "empty-row-divides-by-0": ("no-visible-keys", "total = tl.where(row_sum == 0.0, 1.0, row_sum)", "total = row_sum"),
    "empty-row-lse-0": ("no-visible-keys", 'tl.where(row_sum == 0.0, float("-inf"), ', "tl.where(row_sum == 0.0, 0.0, "),
    "output-not-normalised": ("causal", "matmul.scale(acc, 1.0 / total[:, None])", "matmul.scale(acc, 1.0 + 0.0 * total[:, None])"),
    "lse-maximum-in-base-2": ("causal", "finite_pivot(row_max) * (1.0 / UNIT) + tl.log2(total)", "finite_pivot(row_max) + tl.log2(total)"),
    "exponential-in-base-2": ("bias-1hqk", "tl.exp2(x * LOG2_E)", "tl.exp2(x)"),
    "exponential-of-the-wrong-unit": ("causal", "tl.exp2(x) if UNIT != 1.0 else", "tl.exp2(x) if UNIT == 1.0 else"),
}
SCORES: Table = {
    "scale-omitted": ("causal", "products * (terms.scale * UNIT)", "products * UNIT"),
    "scale-twice": ("causal", "products * (terms.scale * UNIT)", "products * (terms.scale * terms.scale * UNIT)"),
    "scores-in-natural-units": ("causal", "products * (terms.scale * UNIT)", "products * terms.scale"),
    "softcap-in-natural-units": ("softcap", "* (terms.softcap * UNIT)\n    return capped", "* terms.softcap\n    return capped"),
    "softcap-without-scale": ("softcap", "tanh(products * (terms.scale / terms.softcap))", "tanh(products * (1.0 / terms.softcap))"),
    "tanh-without-its-near-branch": ("softcap-wide", "small = tl.abs(x) < 0.6", "small = tl.abs(x) < 0.0"),
    "tanh-near-branch-too-wide": ("softcap", "small = tl.abs(x) < 0.6", "small = tl.abs(x) < 0.7"),
    "tanh-short-fraction": ("float64", "y2 * (378.0 + y2)", "y2 * 378.0"),
    "tanh-sign-lost": ("softcap", "tl.where(x < 0, -magnitude, magnitude)", "magnitude"),
    "softcap-derivative-omitted": ("softcap", "dscores * (1.0 - tanh_x * tanh_x)", "dscores"),
    "softcap-derivative-unguarded": (
        "hidden_values",
        "tl.where(dscores == 0.0, 0.0, dscores * (1.0 - tanh_x * tanh_x))",
        "dscores * (1.0 - tanh_x * tanh_x)"),
    "softcap-derivative-in-natural-units": ("softcap", "capped * (1.0 / (terms.softcap * UNIT))", "capped * (1.0 / terms.softcap)"),
    "slope-sign": ("everything", "s -= slope * UNIT", "s += slope * UNIT"),
    "slope-in-natural-units": ("alibi-offset", "s -= slope * UNIT * distance", "s -= slope * distance"),
    "slope-of-the-first-member": ("packed-alibi-members", "tl.cast(batch, tl.int64) * terms.slopes_batch + ", ""),
    "slope-of-the-first-head": (
        "everything",
        "tl.cast(batch, tl.int64) * terms.slopes_batch + tl.cast(head, tl.int64) * terms.slopes_head",
        "tl.cast(batch, tl.int64) * terms.slopes_batch + 0 * head"),
    "distance-signed": (
        "alibi-offset",
        "return tl.abs(tl.cast(member.offset, ACC) + (rows - cols).to(ACC))",
        "return tl.cast(member.offset, ACC) + (rows - cols).to(ACC)"),
    "distance-without-offset": (
        "everything",
        "tl.abs(tl.cast(member.offset, ACC) + (rows - cols).to(ACC))",
        "tl.abs((rows - cols).to(ACC))"),
    "bias-hides-nothing": ("hidden_values", 'seen &= added != float("-inf")', "seen = seen"),
    "bias-other-0": ("everything", 'mask=seen, other=float("-inf")).to', "mask=seen, other=0.0).to"),
    "hidden-scores-kept": ("causal", 's = tl.where(seen, s, float("-inf"))', "s = s"),
    "hidden-scores-finite": ("low", 's = tl.where(seen, s, float("-inf"))', "s = tl.where(seen, s, -1e4)"),
    "bias-added-twice": ("bias-1hqk", "s += added * UNIT", "s += 2 * added * UNIT"),
}
DROPOUT: Table = {
    "threshold-word-dropped": (
        "threshold",
        "(words >= tl.cast(dropout.threshold, tl.uint32))",
        "(words > tl.cast(dropout.threshold, tl.uint32))"),
    "dropout-not-rescaled": ("everything", "1 / (1 - p) if p < 1 else 0.0", "1.0 if p < 1 else 0.0"),
    "dropout-of-everything-keeps": ("dropout-all", "1 / (1 - p) if p < 1 else 0.0", "1 / (1 - p) if p < 1 else 1.0"),
    "dropout-offset-ignored": ("everything", "offset = tl.load(dropout.seed + dropout.stride)", "offset = tl.load(dropout.seed)"),
    "dropout-seed-low-word": (
        "everything",
        "seed = tl.load(dropout.seed).to(tl.uint64)",
        "seed = tl.load(dropout.seed).to(tl.uint32).to(tl.uint64)"),
    "dropout-key-not-divided": ("everything", "start_n // 4 + tl.arange(0, BLOCK_N // 4)", "start_n + tl.arange(0, BLOCK_N // 4)"),
    "dropout-words-out-of-order": ("everything", "tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))"),
    "dropout-rows-and-keys-swapped": (
        "everything",
        "quads + shape, rows.to(tl.uint32) + shape",
        "rows.to(tl.uint32) + shape, quads + shape"),
    "dropout-ignores-the-head": ("everything", "stream.to(tl.uint32) + shape", "0 * stream.to(tl.uint32) + shape"),
    "dropout-transposed-late": (
        "everything",
        "kept = factor(dropout, stream, rows, start_n, ACC, BLOCK_N)",
        "kept = factor(dropout, stream, rows, start_n + 4, ACC, BLOCK_N)"),
}


def planted(file: str, table: Table) -> dict[str, Fault]:
    return {name: Fault(file, *fault) for name, fault in table.items()}


PARTS = {
    "mask": MASK, "visits": VISITS, "tensor": TENSOR, "pages": PAGES, "matmul": MATMUL, "softmax": SOFTMAX, "scores": SCORES,
    "dropout": DROPOUT,
}
FAULTS = {
    name: fault
    for module, table in {**PARTS, **PASSES}.items()
    for name, fault in planted(f"triton_kernels/{module}.py", table).items()
} | planted("triton_backend.py", BACKEND)
