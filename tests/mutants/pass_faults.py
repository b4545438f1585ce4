"""Faults to plant in the passes: forward, decode, backward, their launch and the backend; see kernel_faults.py."""

# A fault a line, where it fits.
# fmt: off
from __future__ import annotations

from .mask_faults import Table

FORWARD: Table = {
    "forward-key-of-another-head": ("plain", "k_tile = load_tile(k, batch, head // GROUP,", "k_tile = load_tile(k, batch, head % GROUP,"),
    "forward-value-of-another-head": ("plain", "v_tile = load_tile(v, batch, head // GROUP,", "v_tile = load_tile(v, batch, head % GROUP,"),
    "forward-packed-queries-from-0": (
        "packed",
        "q_tile = load_tile(q, batch, head, member.start_q + start_m,",
        "q_tile = load_tile(q, batch, head, start_m,"),
    "forward-packed-keys-from-0": ("packed", "at, first, last = member.start_k + start_n,", "at, first, last = start_n,"),
    "forward-packed-output-from-0": (
        "packed",
        "store_tile(out, batch, head, member.start_q + start_m,",
        "store_tile(out, batch, head, start_m,"),
    "forward-full-tiles-alone": (
        "causal",
        "if PHASE != 1 else None\n            products",
        "if PHASE == 0 else None\n            products"),
    "forward-first-phase-unmasked": (
        "window-14",
        "if PHASE != 1 else None\n            products",
        "if PHASE == 2 else None\n            products"),
    "forward-last-phase-skipped": ("causal", "tl.static_range(FIRST, 3)", "tl.static_range(FIRST, 2)"),
    "forward-last-tile-skipped": ("causal", "tl.range(low, high, BLOCK_N)", "tl.range(low, high - BLOCK_N + 1, BLOCK_N)"),
    "forward-first-tile-skipped": ("causal", "tl.range(low, high, BLOCK_N)", "tl.range(low + BLOCK_N, high, BLOCK_N)"),
    "forward-hidden-nans-enter": ("hidden_values", "v_tile, broken = matmul.finite_rows(v_tile)", "_, broken = matmul.finite_rows(v_tile)"),
    "forward-dropout-of-another-head": ("everything", "batch * heads + head, rows", "batch * heads + head // GROUP, rows"),
    "forward-returns-too-soon": ("plain", "if start_m >= member.seqlen_q:", "if start_m + 1 >= member.seqlen_q:"),
}
DECODE: Table = {
    "split-sink-in-every-split": ("split", "        sinks = None  # the combination adds them, once\n", ""),
    "split-sink-in-no-split": (
        "split",
        "    if splits > 1:\n        sinks = options.sinks\n",
        "    if splits > 1:\n        sinks = None\n"),
    "split-ignores-the-first-tile": ("split-window", "begin = tiles.first + split * SPLIT", "begin = split * SPLIT"),
    "split-not-aligned": ("split-range", "begin = tiles.first + split * SPLIT", "begin = member.begin + split * SPLIT"),
    "split-too-long": ("split", "tl.minimum(high, begin + SPLIT)", "tl.minimum(high, begin + SPLIT + 1)"),
    "pages-without-their-number": ("pages", "seqlen_k * page_table.shape[1]", "seqlen_k"),
    "pages-unseen": ("pages", "sight._replace(seqlen_k=seqlen_k)", "sight._replace(seqlen_k=page_size)"),
    "split-range-ignores-its-begin": ("split", "listed, tl.maximum(low, begin),", "listed, low,"),
    "splits-too-few": (
        "split-many",
        "-(-_most_keys(seqlen_q, seqlen_k, tile.block_n, options) // SPLIT)",
        "_most_keys(seqlen_q, seqlen_k, tile.block_n, options) // SPLIT"),
    "splits-forget-the-tile-edge": (
        "split-edges",
        "options.window_left + options.window_right + seqlen_q + block_n - 1",
        "options.window_left + options.window_right + seqlen_q"),
    "splits-forget-the-rows": (
        "split-edges",
        "options.window_left + options.window_right + seqlen_q + block_n - 1",
        "options.window_left + options.window_right + block_n - 1"),
    "split-rows-and-heads-swapped": ("split", "rows = (packed % sight.seqlen_q)[:, None]", "rows = (packed // GROUP)[:, None]"),
    "split-list-of-the-first-head": ("split-mask", "visit.find(visits, batch, kv_head, 0,", "visit.find(visits, batch, 0, 0,"),
    "split-list-of-one-head-of-the-group": (
        "split-mask",
        "visit.of_keys(options.mask, block_m, tile.block_n, group)",
        "visit.of_keys(options.mask, block_m, tile.block_n)"),
    "split-head-of-group-0": (
        "split",
        "head = (kv_head * GROUP + packed // sight.seqlen_q)[:, None]",
        "head = (kv_head + packed // sight.seqlen_q)[:, None]"),
    "split-sink-of-another-head": (
        "split-everything",
        "sinks_stride, kv_head * GROUP + packed // sight.seqlen_q, ACC)",
        "sinks_stride, kv_head + packed // sight.seqlen_q, ACC)"),
    "split-place-of-another": ("split", "place = rows * splits + split", "place = split * sight.seqlen_q + rows"),
    "split-dropout-of-another-head": ("split", "batch * (kv_heads * GROUP) + head, rows", "batch * kv_heads + head, rows"),
    "split-first-phase-unmasked": (
        "split",
        "if PHASE != 1 else None\n            products",
        "if PHASE == 2 else None\n            products"),
    "split-poison-removed": ("visible_values", "acc = matmul.poison_rows(acc, s, broken)", "acc = acc"),
    "combine-other-0": ("split-many", 'splits - start, float("-inf"), BLOCK)', "splits - start, 0.0, BLOCK)"),
    "combine-first-block-alone": ("split-many", "for start in range(0, splits, BLOCK):", "for start in range(0, 1, BLOCK):"),
    "combine-next-row": (
        "split",
        "part_lse = load_numbers(part_lses, batch, head, row * splits + start, splits - start,",
        "part_lse = load_numbers(part_lses, batch, head, row * splits + start, BLOCK,"),
    "combine-head-and-row-swapped": (
        "split",
        "head = tl.program_id(0) // seqlen_q % heads\n    batch = tl.program_id(0) // seqlen_q // heads\n    acc",
        "head = tl.program_id(0) // seqlen_q // heads\n    batch = tl.program_id(0) // seqlen_q % heads\n    acc"),
    "packed-members-in-the-split-kernel": ("packed-cross", "return not packed and ", "return "),
    "splits-of-no-queries": ("empty_launches", "batch * kv_heads * splits if seqlen_q else 0,", "batch * kv_heads * splits,"),
    "combine-lse-in-base-2": (
        "split",
        "acc, row_max, row_sum = softmax.merge(acc, row_max, row_sum, part_lse, tile)",
        "acc, row_max, row_sum = softmax.merge(acc, row_max, row_sum, part_lse * LOG2_E, tile)"),
}
DIFFERENTIATE: Table = {
    "weights-without-lse": ("causal", "s - finite_pivot(row_lse) * UNIT, UNIT)", "s, UNIT)"),
    "weights-lse-in-natural-units": ("causal", "finite_pivot(row_lse) * UNIT, UNIT)", "finite_pivot(row_lse), UNIT)"),
    "weights-lse-unguarded": ("overflow", "finite_pivot(row_lse) * UNIT, UNIT)", "row_lse * UNIT, UNIT)"),
    "dropout-missing-in-dp": ("everything", "        dp *= factor\n", "        dp *= 1.0\n"),
    "delta-omitted": ("causal", "ds = p * (dp - row_delta)", "ds = p * dp"),
    "delta-dropped-too": (
        "everything",
        "        dp *= factor\n    ds = p * (dp - row_delta)",
        "        p *= factor\n    ds = p * (dp - row_delta)"),
    "hidden-gradients-kept": ("hidden_values", 'tl.where(s == float("-inf"), 0.0, ds) if MASKED else ds', "ds"),
}
BACKWARD: Table = {
    "dlse-sign": ("causal", "total -= load_numbers(dlse,", "total += load_numbers(dlse,"),
    "dlse-dropped": ("causal", "total -= load_numbers(dlse, batch, head, at, last, 0.0, BLOCK_M).to(total.dtype)", "total = total"),
    "delta-of-another-row": (
        "causal",
        "store_numbers(delta, batch, head, at, last, total, BLOCK_M)",
        "store_numbers(delta, batch, head, at, last - 1, total, BLOCK_M)"),
    "dv-without-dropout": ("everything", "p if factor is None else p * factor, dout_tile", "p, dout_tile"),
    "dk-without-scale": ("causal", "matmul.scale(dk_acc, terms.scale)", "dk_acc"),
    "dk-softcap-omitted": (
        "softcap",
        "dk_acc = matmul.add_product(dk_acc, scores.uncap(ds, capped, terms, UNIT),",
        "dk_acc = matmul.add_product(dk_acc, ds,"),
    "dk-of-the-first-head": ("plain", "range(kv_head * GROUP, (kv_head + 1) * GROUP)", "range(kv_head * GROUP, kv_head * GROUP + 1)"),
    "dk-of-interleaved-heads": ("plain", "range(kv_head * GROUP, (kv_head + 1) * GROUP)", "range(kv_head, kv_heads * GROUP, kv_heads)"),
    "dk-dropout-of-another-head": (
        "everything",
        "drop.transposed_factor(dropout, batch * (kv_heads * GROUP) + head,",
        "drop.transposed_factor(dropout, batch * kv_heads + head,"),
    "dk-bias-transposed": (
        "bias-1hqk",
        "bias, member, batch, head, rows[None, :], cols, seen, UNIT)",
        "bias, member, batch, head, cols, rows[None, :], seen, UNIT)"),
    "dk-bias-missing": (
        "bias-1hqk",
        "capped, slope, bias, member, batch, head, rows[None, :], cols, seen, UNIT)",
        "capped, slope, None, member, batch, head, rows[None, :], cols, seen, UNIT)"),
    "dk-first-phase-unmasked": (
        "window-14",
        "rows[None, :], cols) if PHASE != 1 else None",
        "rows[None, :], cols) if PHASE == 2 else None"),
    "dk-rows-past-the-member": ("everything", "else (rows < member.seqlen_q)[None, :]", "else (rows >= 0)[None, :]"),
    "dk-lse-other-0": ("everything", 'at_m, last_m, float("inf"), BLOCK_M)[None, :]', "at_m, last_m, 0.0, BLOCK_M)[None, :]"),
    "dk-packed-queries-from-0": (
        "packed",
        "at_m, last_m = member.start_q + start_m, member.seqlen_q - start_m\n                q_tile",
        "at_m, last_m = start_m, member.seqlen_q - start_m\n                q_tile"),
    "dq-without-scale": ("causal", "matmul.scale(dq_acc, terms.scale)", "dq_acc"),
    "dq-softcap-omitted": (
        "softcap",
        "dq_acc = matmul.add_product(dq_acc, scores.uncap(ds, capped, terms, UNIT),",
        "dq_acc = matmul.add_product(dq_acc, ds,"),
    "dq-key-of-another-head": ("plain", "k_tile = load_tile(k, batch, head // GROUP,", "k_tile = load_tile(k, batch, head % GROUP,"),
    "dq-hidden-nans-enter": ("hidden_values", "k_tile, _ = matmul.finite_rows(k_tile)", "_ = matmul.finite_rows(k_tile)"),
    "dq-slope-missing": (
        "everything",
        "s = scores.score(capped, slope, bias, member, batch, head, rows, cols, seen, UNIT)",
        "s = scores.score(capped, None, bias, member, batch, head, rows, cols, seen, UNIT)"),
    "dq-first-phase-unmasked": ("window-14", "head, rows, cols) if PHASE != 1 else None", "head, rows, cols) if PHASE == 2 else None"),
    "slope-gradient-sign": ("everything", "dslope_acc -= tl.sum(", "dslope_acc += tl.sum("),
    "slope-gradient-of-all-members": (
        "packed-alibi-members",
        "(members if slopes.dim() == 2 else members.sum(0))",
        "(members.sum(0).expand_as(slopes) if slopes.dim() == 2 else members.sum(0))"),
    "slope-gradient-of-the-last-rows": ("many-rows", "total += load_numbers(numbers,", "total = load_numbers(numbers,"),
    "sink-gradient-sign": ("everything", "return -(p * delta)", "return (p * delta)"),
    "sink-gradient-of-empty-rows": (
        "infinite_sink",
        "p = torch.where(lse == -torch.inf, 0.0, torch.exp(by_head - lse))",
        "p = torch.exp(by_head - lse)"),
    "packed-gradients-uninitialised": (
        "packed-unused-sinks",
        "new = torch.empty_like if options.cu_seqlens_q is None else torch.zeros_like",
        "new = torch.empty_like"),
    "packed-delta-uninitialised": (
        "packed-unused-sinks",
        "delta = torch.zeros_like(lse) if dlse is None else -dlse.to(lse.dtype)",
        "delta = torch.empty_like(lse)"),
    "packed-dlse-of-no-member-dropped": (
        "packed-unused-sinks",
        "delta = torch.zeros_like(lse) if dlse is None else -dlse.to(lse.dtype)",
        "delta = torch.zeros_like(lse)"),
    "dkv-grid-of-the-queries": (
        "ranges",
        "masks.programs(sight.seqlen_k, sight.batch, sight.cu_k,",
        "masks.programs(sight.seqlen_q, sight.batch, sight.cu_k,"),
    "dkv-phases-of-the-keys": ("window-15", 'phases | {"FIRST": masks.first_phase_of_queries(options)}', "phases"),
    "dq-grid-of-the-kv-heads": (
        "plain",
        "chosen.block_m) * heads\n        results = view(dq)",
        "chosen.block_m) * k.shape[1]\n        results = view(dq)"),
    "dq-not-for-the-slopes": (
        "single_gradients",
        "if dq is not None or shares.rows is not None or row_slopes is not None:",
        "if dq is not None or shares.rows is not None:"),
    "dkv-not-for-the-bias": (
        "single_gradients",
        "if dk_part is not None or dv_part is not None or columns is not None:",
        "if dk_part is not None or dv_part is not None:"),
    "dkv-tile-of-the-dq-pass": ("tiles", "            chosen = tile(name)\n", '            chosen = tile("dq")\n'),
    "dkv-grid-of-the-queries-rows": ("memory", "sight.cu_k, chosen.block_n)", "sight.cu_k, chosen.block_m)"),
    "dq-grid-of-the-keys": (
        "memory",
        "sight.cu_q, chosen.block_m) * heads\n        results = view(dq)",
        "sight.cu_q, chosen.block_n) * heads\n        results = view(dq)"),
    "split-passes-without-dv": ("split_passes", '(("dk", dk, None), ("dv", None, dv)) if split', '(("dk", dk, None),) if split'),
}
BIAS: Table = {
    "bias-gradient-of-rows-for-columns": (
        "bias-bh1k",
        "return cls(columns=lse.new_empty(*lse.shape[:2], k.shape[2]))",
        "return cls(rows=torch.empty_like(lse))"),
    "bias-gradient-of-one-member": ("bias-1h11", "share.sum_to_size(shape)", "share[tuple(slice(0, n) for n in shape)]"),
    "bias-pairs-of-every-member": ("bias", "range(owner // dbias_heads, sight.batch, dbias_batches)", "range(0, sight.batch, 1)"),
    "bias-pairs-of-the-first-head": (
        "bias-11qk",
        "range(first_head, heads, dbias_heads)",
        "range(first_head, dbias_heads, dbias_heads)"),
    "bias-pairs-scaled": ("bias-1hqk", "total += score_gradients(", "total += terms.scale * score_gradients("),
    "bias-pairs-without-dropout": ("bias", "dp, row_delta, factor, s, True)", "dp, row_delta, None, s, True)"),
    "bias-pairs-stored-past-the-rows": ("memory", "mask=(rows < sight.seqlen_q) & ", "mask=(rows <= sight.seqlen_q) & "),
    "bias-pairs-unstored-column": ("bias-1hqk", "(cols < sight.seqlen_k))", "(cols < sight.seqlen_k - 1))"),
    "bias-hidden-tiles-computed": ("work", "sees &= tl.max(tl.max(seen.to(tl.int32), 1), 0) != 0", "sees = sees"),
    "bias-mask-of-one-head-for-all": ("bias-mask-heads", "mask.head == 0 or bias_heads == heads", "True"),
    "bias-grid-one-tile-short": ("bias-1hqk", "* -(-sight.seqlen_k // tile.block_n)", "* (sight.seqlen_k // tile.block_n)"),
}
LAUNCH: Table = {
    "device-guard-removed": ("launch", 'if device.type != "cuda" or device.index == torch.cuda.current_device():', "if True:"),
    "device-guard-of-device-0": ("launch", "with torch.cuda.device(device):", 'with torch.cuda.device(torch.device("cuda", 0)):'),
    "nothing-launched-for-nothing": ("launch", "if programs == 0:", "if programs < 0:"),
}
BACKEND: Table = {
    "every-gradient-without-lse": ("causal", "backward(dout, dlse, q,", "backward(dout, None, q,"),
}

PASSES = {
    "forward": FORWARD, "decode": DECODE, "differentiate": DIFFERENTIATE, "backward": BACKWARD, "bias": BIAS, "launch": LAUNCH,
}
