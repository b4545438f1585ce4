"""Faults to plant in the mask: which pairs are visible, which tiles are visited, which integers are trusted; see kernel_faults.py."""

# A fault a line, where it fits.
# fmt: off
from __future__ import annotations

Table = dict[str, tuple[str, str, str]]  # name -> what notices it, the code, the fault

MASK: Table = {
    "visible-one-key-too-many": ("everything", "(cols < member.end)", "(cols <= member.end)"),
    "visible-one-query-too-many": ("memory", "& (rows < member.seqlen_q)", "& (rows <= member.seqlen_q)"),
    "visible-begin-off-by-one": ("everything", "seen &= cols >= member.begin", "seen &= cols > member.begin"),
    "visible-begin-dropped": ("everything", "seen &= cols >= member.begin", "seen = seen"),
    "visible-left-off-by-one": ("everything", "cols - rows >= member.lower", "cols - rows > member.lower"),
    "visible-left-dropped": ("everything", "seen &= cols - rows >= member.lower", "seen = seen"),
    "visible-right-off-by-one": ("everything", "cols - rows <= member.upper", "cols - rows < member.upper"),
    "visible-right-dropped": ("everything", "seen &= cols - rows <= member.upper", "seen = seen"),
    "visible-mask-dropped": ("everything", "other=0) != 0", "other=0) >= 0"),
    "visible-mask-loads-hidden-pairs": ("memory", "mask=seen, other=0) != 0", "mask=seen | True, other=0) != 0"),
    "visible-mask-other-1": ("everything", "mask=seen, other=0) != 0", "mask=seen, other=1) != 0"),
    "keys-begin-ignored": ("ranges", "low, high = tl.cast(member.begin, tl.int64), ", "low, high = tl.cast(0, tl.int64), "),
    "keys-end-ignored": (
        "ranges",
        "tl.cast(member.begin, tl.int64), tl.cast(member.end,",
        "tl.cast(member.begin, tl.int64), tl.cast(member.seqlen_k,"),
    "keys-left-not-skipped": ("work", "low = tl.maximum(low, tl.cast(start_m, tl.int64) + member.lower)", "low = low"),
    "keys-left-skips-one-more": (
        "window-16",
        "low, tl.cast(start_m, tl.int64) + member.lower)",
        "low, tl.cast(start_m, tl.int64) + member.lower + 1)"),
    "keys-full-before-the-left-bound": ("window-14", "full_low = tl.maximum(full_low, last_row + member.lower)", "full_low = full_low"),
    "keys-full-left-of-first-row": (
        "window-14",
        "full_low, last_row + member.lower)",
        "full_low, tl.cast(start_m, tl.int64) + member.lower)"),
    "keys-full-left-off-by-one": ("window-13", "full_low, last_row + member.lower)", "full_low, last_row + member.lower - 1)"),
    "keys-right-not-skipped": ("work", "high = tl.minimum(high, last_row + member.upper + 1)", "high = high"),
    "keys-right-off-by-one": (
        "window-13",
        "high = tl.minimum(high, last_row + member.upper + 1)",
        "high = tl.minimum(high, last_row + member.upper)"),
    "keys-full-behind-the-right-bound": (
        "window-14",
        "full_high = tl.minimum(full_high, tl.cast(start_m, tl.int64) + member.upper + 1)",
        "full_high = full_high"),
    "keys-full-right-of-last-row": (
        "window-14",
        "full_high = tl.minimum(full_high, tl.cast(start_m, tl.int64) + member.upper + 1)",
        "full_high = tl.minimum(full_high, last_row + member.upper + 1)"),
    "keys-full-right-off-by-one": (
        "window-15",
        "full_high = tl.minimum(full_high, tl.cast(start_m, tl.int64) + member.upper + 1)",
        "full_high = tl.minimum(full_high, tl.cast(start_m, tl.int64) + member.upper + 2)"),
    "keys-rows-past-the-last": (
        "work",
        "tl.minimum(start_m + BLOCK_M, member.seqlen_q) - 1, tl.int64)",
        "start_m + BLOCK_M - 1, tl.int64)"),
    "queries-begin-ignored": (
        "work",
        "first_key = tl.cast(tl.maximum(start_n, member.begin), tl.int64)",
        "first_key = tl.cast(start_n, tl.int64)"),
    "queries-end-ignored": (
        "work",
        "last_key = tl.cast(tl.minimum(start_n + BLOCK_N, member.end) - 1, ",
        "last_key = tl.cast(start_n + BLOCK_N - 1, "),
    "queries-hidden-keys-visited": (
        "work",
        "tl.where(first_key <= last_key, tl.cast(member.seqlen_q, tl.int64), zero)",
        "tl.cast(member.seqlen_q, tl.int64)"),
    "queries-full-beyond-the-range": ("ranges", "tl.where(whole, high, zero)", "high"),
    "queries-full-before-begin": ("ranges", "whole = (start_n >= member.begin) & ", "whole = "),
    "queries-full-behind-end": ("ranges", "& (start_n + BLOCK_N <= member.end)", "& (start_n < member.end)"),
    "queries-right-not-skipped": ("work", "low = tl.maximum(low, first_key - member.upper)", "low = low"),
    "queries-right-skips-one-more": (
        "window-13",
        "low = tl.maximum(low, first_key - member.upper)",
        "low = tl.maximum(low, first_key - member.upper + 1)"),
    "queries-full-before-the-right-bound": ("window-14", "full_low = tl.maximum(full_low, last_key - member.upper)", "full_low = full_low"),
    "queries-full-of-first-key": ("window-14", "full_low, last_key - member.upper)", "full_low, first_key - member.upper)"),
    "queries-left-not-skipped": ("work", "high = tl.minimum(high, last_key - member.lower + 1)", "high = high"),
    "queries-left-off-by-one": (
        "window-16",
        "high = tl.minimum(high, last_key - member.lower + 1)",
        "high = tl.minimum(high, last_key - member.lower)"),
    "queries-full-behind-the-left-bound": (
        "window-14",
        "full_high = tl.minimum(full_high, first_key - member.lower + 1)",
        "full_high = full_high"),
    "queries-full-of-last-key": ("window-14", "full_high, first_key - member.lower + 1)", "full_high, last_key - member.lower + 1)"),
    "first-tile-skipped": ("window-14", "first = low // BLOCK * BLOCK", "first = (low + BLOCK - 1) // BLOCK * BLOCK"),
    "first-tile-not-aligned": ("everything", "first = low // BLOCK * BLOCK", "first = low"),
    "full-starts-a-tile-early": (
        "window-14",
        "(tl.maximum(full_low, 0) + BLOCK - 1) // BLOCK * BLOCK",
        "tl.maximum(full_low, 0) // BLOCK * BLOCK"),
    "full-ends-a-tile-late": (
        "window-14",
        "tl.maximum(full_high, 0) // BLOCK * BLOCK",
        "(tl.maximum(full_high, 0) + BLOCK - 1) // BLOCK * BLOCK"),
    "full-range-past-the-last": ("window-narrow", "tl.minimum(tail, high).to(tl.int32)", "tail.to(tl.int32)"),
    "phase-0-runs-into-the-full": ("window-14", "high = tiles.full\n", "high = tiles.tail\n"),
    "phase-1-runs-to-the-last": ("window-14", "high = tiles.tail\n", "high = tiles.last\n"),
    "phase-1-from-the-first": (
        "window-14",
        "low = tiles.full if PHASE == 1 else tiles.tail",
        "low = tiles.first if PHASE == 1 else tiles.tail"),
    "phase-2-from-the-full": ("window-14", "low = tiles.full if PHASE == 1 else tiles.tail", "low = tiles.full"),
    "bias-taken-for-no-mask": (
        "bias-1hqk",
        'no tile is known to be seen in full."""\n    if options.mask is not None or options.bias is not None:',
        'no tile is known to be seen in full."""\n    if options.mask is not None:'),
    "mask-taken-for-no-mask-of-queries": (
        "mask-causal",
        'keys from the first queries."""\n    if options.mask is not None or options.bias is not None:',
        'keys from the first queries."""\n    if options.bias is not None:'),
    "left-bound-without-first-phase": ("window-14", "return 0 if options.window_left is not None or (", "return 0 if ("),
    "begins-without-first-phase": ("ranges", "or (options.kv_lengths is not None and options.kv_lengths.dim() == 2)", ""),
    "right-bound-without-first-phase": ("window-15", "return 0 if options.window_right is not None else 1", "return 1"),
    "offset-ignored": ("window-14", "offset = tl.cast(sight.offset, tl.int64)", "offset = offset"),
    "offset-plus-1": ("window-14", "offset = tl.cast(sight.offset, tl.int64)", "offset = tl.cast(sight.offset, tl.int64) + 1"),
    "offsets-of-the-first-member": ("everything", "read(sight.offsets, batch,", "read(sight.offsets, 0,"),
    "offset-top-left": ("causal", "offset = tl.cast(end, tl.int64) - seqlen_q", "offset = tl.cast(0, tl.int64)"),
    "offset-of-the-whole-length": (
        "lengths",
        "offset = tl.cast(end, tl.int64) - seqlen_q",
        "offset = tl.cast(seqlen_k, tl.int64) - seqlen_q"),
    "offset-minus-1": ("causal", "offset = tl.cast(end, tl.int64) - seqlen_q", "offset = tl.cast(end, tl.int64) - seqlen_q - 1"),
    "left-measured-from-the-key": ("everything", "clamp(offset - sight.left, -FARTHEST_PAIR", "clamp(0 - sight.left, -FARTHEST_PAIR"),
    "lower-unclamped": (
        "window-huge", "clamp(offset - sight.left, -FARTHEST_PAIR, FARTHEST_PAIR).to(tl.int32)", "(offset - sight.left).to(tl.int32)"),
    "upper-unclamped": (
        "window-huge", "clamp(offset + sight.right, -FARTHEST_PAIR, FARTHEST_PAIR).to(tl.int32)", "(offset + sight.right).to(tl.int32)"),
    "integers-unclamped": (
        "untrusted_integers",
        "return clamp(tl.load(pointer + tl.cast(index, tl.int64) * stride).to(tl.int64), low, high)",
        "return tl.load(pointer + tl.cast(index, tl.int64) * stride).to(tl.int64)"),
    "integers-narrowed": (
        "wide_integers",
        "clamp(tl.load(pointer + tl.cast(index, tl.int64) * stride).to(tl.int64), low, high)",
        "clamp(tl.load(pointer + tl.cast(index, tl.int64) * stride).to(tl.int32).to(tl.int64), low, high)"),
    "integers-clamped-above-alone": ("untrusted_integers", "return tl.minimum(tl.maximum(x, low), high)", "return tl.minimum(x, high)"),
    "integers-clamped-below-alone": ("untrusted_integers", "return tl.minimum(tl.maximum(x, low), high)", "return tl.maximum(x, low)"),
    "integers-with-a-unit-stride": (
        "strided_options",
        "tl.load(pointer + tl.cast(index, tl.int64) * stride)",
        "tl.load(pointer + tl.cast(index, tl.int64))"),
    "integers-stride-in-int32": (
        "huge_strides",
        "tl.load(pointer + tl.cast(index, tl.int64) * stride)",
        "tl.load(pointer + index * stride)"),
    "members-not-monotone": (
        "untrusted_integers",
        "read(sight.cu_k, batch + 1, sight.cu_k_stride, start_k,",
        "read(sight.cu_k, batch + 1, sight.cu_k_stride, 0,"),
    "members-of-keys-from-queries": ("packed", "start_k = read(sight.cu_k, batch,", "start_k = read(sight.cu_q, batch,"),
    "kv-lengths-beyond-the-member": (
        "packed-kv-lengths",
        "end = read(sight.ends, batch, sight.lengths_stride, 0, seqlen_k)",
        "end = read(sight.ends, batch, sight.lengths_stride, 0, sight.seqlen_k)"),
    "packed-tile-of-the-member-before": ("packed", "// BLOCK + middle <= slot", "// BLOCK + middle < slot"),
    "packed-tile-without-its-slot": (
        "packed",
        "first = read(cu_seqlens, low, stride, 0, total) // BLOCK + low",
        "first = read(cu_seqlens, low, stride, 0, total) // BLOCK"),
    "packed-tile-before-the-first": ("late_members", "(tl.maximum(slot - first, 0) * BLOCK)", "((slot - first) * BLOCK)"),
    "grid-too-small": ("causal", "return -(-seqlen // block) * batch", "return seqlen // block * batch"),
    "grid-too-large": ("memory", "return -(-seqlen // block) * batch", "return -(-seqlen // block) * batch + 1"),
    "packed-grid-too-small": (
        "packed",
        "return seqlen // block + batch if batch else 0",
        "return triton.cdiv(seqlen, block) if batch else 0"),
    "packed-grid-of-no-members": ("packed-none", "return seqlen // block + batch if batch else 0", "return seqlen // block + batch"),
    "program-takes-the-wrong-head": (
        "memory",
        "return program // tiles // heads, program // tiles % heads, tile * BLOCK_M",
        "return program // tiles % heads, program // tiles // heads, tile * BLOCK_M"),
    "longest-rows-off-by-one": ("memory", "tile = tiles - 1 - tile", "tile = tiles - tile"),
    "hidden-nans-of-windows-enter": ("hidden_values", "hiders = (options.window_left, options.window_right, ", "hiders = ("),
    "hidden-nans-of-masks-enter": (
        "hidden_values",
        "options.window_right, options.mask, options.bias)",
        "options.window_right, options.bias)"),
    "hidden-nans-of-biases-enter": (
        "hidden_values",
        "options.window_right, options.mask, options.bias)",
        "options.window_right, options.mask)"),
    "pairs-taken-for-contiguous": ("bias-1hq1", "cols.to(tl.int64) * x.dim", "cols.to(tl.int64)"),
    "pairs-rows-in-int32": ("huge_strides", "rows.to(tl.int64) * x.seq + cols", "rows * x.seq + cols"),
    "pairs-transposed": (
        "bias-1hqk",
        "rows.to(tl.int64) * x.seq + cols.to(tl.int64) * x.dim",
        "rows.to(tl.int64) * x.dim + cols.to(tl.int64) * x.seq"),
}
VISITS: Table = {
    "lists-of-everything": ("work", "shown = tl.maximum(shown, tl.max((bits != 0).to(tl.int32), 0))", "shown = tl.maximum(shown, 1)"),
    "lists-of-the-last-rows": (
        "mask-blocks",
        "shown = tl.maximum(shown, tl.max((bits != 0).to(tl.int32), 0))",
        "shown = tl.max((bits != 0).to(tl.int32), 0)"),
    "lists-of-whole-tiles": ("mask-blocks", "any_shown = tl.max(tl.reshape(", "any_shown = tl.min(tl.reshape("),
    "lists-keep-no-order": ("mask-blocks", "tl.cumsum(any_shown, 0) - any_shown", "tl.cumsum(any_shown, 0)"),
    "lists-of-the-last-chunk": ("mask-blocks", "count += tl.sum(any_shown, 0)", "count = tl.sum(any_shown, 0)"),
    "lists-forget-the-chunk": ("mask-blocks", "numbers = first + tl.arange(0, CHUNK)", "numbers = tl.arange(0, CHUNK)"),
    "lists-past-their-end": ("memory", "before, mask=numbers < tiles)", "before)"),
    "lists-of-hidden-tiles": ("memory", "tl.store(starts + before, numbers, mask=any_shown != 0)", "tl.store(starts + before, numbers)"),
    "lists-load-past-the-mask": ("memory", "& (cols < listed)[None, :]", "& (cols <= listed)[None, :]"),
    "lists-load-past-the-rows": ("memory", "inside = (rows < length) & (cols", "inside = (rows <= length) & (cols"),
    "lists-of-one-tile-of-rows": ("mask-blocks", "own = (program % own_tiles * OWN_BLOCK).to(tl.int32)", "own = 0"),
    "lists-of-one-head": ("mask-blocks", "(program // own_tiles % head_lists).to(tl.int32) * SHARED", "0"),
    "lists-of-one-member": ("mask-blocks", "batch = (program // own_tiles // head_lists).to(tl.int32)", "batch = 0"),
    "lists-of-the-group-off-by-one": ("split-mask", "head + row // OWN_BLOCK,", "head,"),
    "list-of-the-first-member": ("mask-blocks", "batch=own_tiles * head_lists if batches > 1 else 0", "batch=0"),
    "list-of-the-first-head": ("mask-blocks", "head=own_tiles if head_lists > 1 else 0", "head=0"),
    "list-of-the-first-tile": ("mask-blocks", "own=1 if own_tiles > 1 else 0", "own=0"),
    "list-of-keys-for-queries": ("mask-blocks", "_visits(mask.transpose(-2, -1), ", "_visits(mask, "),
    "turns-past-the-range": (
        "work",
        "high = tl.load(ranks + tl.minimum((tl.maximum(high, low) + BLOCK - 1) // BLOCK, visits.tiles)) * BLOCK",
        "high = tl.load(ranks + visits.tiles) * BLOCK"),
    "turns-before-the-range": ("work", "tl.load(ranks + tl.minimum(low // BLOCK, visits.tiles))", "tl.load(ranks)"),
    "turns-one-tile-short": ("mask-blocks", "(tl.maximum(high, low) + BLOCK - 1) // BLOCK", "tl.maximum(high, low) // BLOCK"),
    "turns-rank-past-the-list": ("memory", "tl.minimum(low // BLOCK, visits.tiles)", "low // BLOCK"),
    "turns-of-a-hidden-tile": ("work", "high = tl.where(tl.load(ranks + 1) > 0, high, low)", "high = high"),
    "turns-taken-for-tiles": ("mask-blocks", "at = tl.load(visits.starts + place * visits.tiles + turn // BLOCK) * BLOCK", "at = turn"),
}
