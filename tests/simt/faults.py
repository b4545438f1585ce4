"""Faults planted in the CUDA sources, each a textual patch that must apply exactly once: the simulated GPU has to notice them.

Some leave every number right on the CPU, and only the machine's watch over barriers, copies, bounds and banks can tell.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    file: str  # of csrc/cuda
    old: str
    new: str
    type: str = "bfloat16"  # whose kernels have it


_WAIT_K = "wait_copies<0>();\n      sync_block();  // k is there"
_WAIT_V = "wait_copies<0>();\n      sync_block();  // v is there"
_SYNC = "    sync_block();\n"
_WAIT_STAGE = f"    wait_copies<STAGES - 1>();\n{_SYNC}"

FAULTS: dict[str, Fault] = {
    "k-not-awaited": Fault("forward.cuh", _WAIT_K, "sync_block();  // k is there"),
    "v-not-awaited": Fault("forward.cuh", _WAIT_V, "sync_block();  // v is there"),
    "no-barrier-for-k": Fault("forward.cuh", _WAIT_K, "wait_copies<0>();  // k is there"),
    "no-barrier-for-v": Fault("forward.cuh", _WAIT_V, "wait_copies<0>();  // v is there"),
    "no-barrier-after-mending": Fault("forward.cuh", "int(thread_index()));\n        sync_block();", "int(thread_index()));"),
    "one-tile-too-many-is-copied": Fault("forward.cuh", "if (start_n + N < end) load_keys", "if (start_n < end) load_keys"),
    "acc-not-rescaled": Fault("forward.cuh", "acc[t][i][2 * r] *= rescale, acc[t][i][2 * r + 1] *= rescale", "acc[t][i][2 * r] *= 1.0f"),
    "wrong-head-of-a-group": Fault("forward.cuh", "work.head / (p.heads / p.kv_heads)", "work.head % p.kv_heads"),
    "tiles-begin-anywhere": Fault("forward.cuh", "int(keys.lo / N * N)", "int(keys.lo)"),
    "rows-are-not-poisoned": Fault("forward.cuh", "poisoned >> (t * 2 + r) & 1 ? not_a_number()", "false ? not_a_number()"),
    "poison-of-one-lane": Fault("forward.cuh", "  poisoned |= shuffle_xor(poisoned, 1);\n", ""),
    "hidden-values-enter": Fault("forward.cuh", "if (masked && any_broken", "if (false && any_broken"),
    "masked-tile-taken-for-full": Fault("forward.cuh", "const bool masked = !band.is_full(start_n, N, rows)", "const bool masked = false"),
    "no-swizzle": Fault("tile.cuh", "(chunk ^ (row & 7))", "chunk"),
    "columns-past-the-row": Fault("tile.cuh", "int(clamp(columns - begin, 0, kPerChunk<T>));\n  int row", "kPerChunk<T>;\n  int row"),
    "rows-past-the-end": Fault("tile.cuh", "row < last ? count * kBytes<T>", "true ? count * kBytes<T>"),
    "k-transposed": Fault("products.cuh", "load_matrices(right, b", "load_matrices_transposed(right, b"),
    "v-not-transposed": Fault("products.cuh", "load_matrices_transposed(right, b", "load_matrices(right, b"),
    "no-barrier-of-the-warp": Fault("tile.cuh", "  sync_warp();\n  constexpr int kChunks", "  constexpr int kChunks"),
    "rows-stored-past-the-end": Fault("tile.cuh", "from < last ? int(clamp", "true ? int(clamp"),
    "row-sum-not-rescaled": Fault("softmax.cuh", "row_sum[t][r] * rescale", "row_sum[t][r]"),
    "rescale-rounded": Fault("softmax.cuh", "power_of_2((x - pivot) * unit)", "power_of_2(fmaf(x, unit, -pivot * unit))"),
    "maximum-of-half-a-row": Fault("softmax.cuh", "    highest = fmaxf(highest, shuffle_xor(highest, 2));\n", ""),
    "no-finite-pivot": Fault("softmax.cuh", "row_max == -infinity() ? 0.0f : row_max", "row_max"),
    "lse-without-scale": Fault("softmax.cuh", "(OPTIONS ? 1.0f : unit * kLn2)", "1.0f"),
    "sink-counts-four-times": Fault("softmax.cuh", "lane_index() % 4 == 0 && sink", "sink"),
    "one-key-too-few": Fault("scores.cuh", "column >= hi", "column >= hi - 1"),
    "one-key-too-many": Fault("scores.cuh", "column >= hi", "column > hi"),
    "full-for-the-first-row": Fault("scores.cuh", "begin_of(rows - 1) <= start_n", "begin_of(0) <= start_n"),
    "distance-without-offset": Fault("scores.cuh", "fabsf(offset + float", "fabsf(float"),
    "mask-read-past-the-end": Fault("scores.cuh", "s != -infinity() && i < rows && !load_global", "!load_global"),
    "bias-of-another-row": Fault("scores.cuh", "row_of(p.bias, batch, head, start_m)", "row_of(p.bias, batch, head, 0)"),
    "broken-values-stay": Fault("finite.cuh", "c < kChunks && found", "c < 0"),
    "packed-slots-too-few": Fault("schedule.cuh", "0, seqlen) / size + b", "0, seqlen) / size"),
    "q-and-dout-not-awaited": Fault("backward_keys.cuh", _WAIT_STAGE, _SYNC),
    "no-barrier-for-q-and-dout": Fault("backward_keys.cuh", _WAIT_STAGE, _WAIT_STAGE.removesuffix(_SYNC)),
    "stage-of-queries-overwritten": Fault("backward_keys.cuh", "    sync_block();  // nobody reads this stage any more\n", ""),
    "one-stage-of-queries": Fault("backward_keys.cuh", "turn % STAGES * 2 * C::kQuery, *const", "0, *const"),
    "one-head-of-a-group": Fault("backward_keys.cuh", "turns = tiles * group", "turns = tiles"),
    "dk-not-scaled": Fault("backward_keys.cuh", "scale[2] = {float(p.scale), float(p.scale)}, one", "scale[2] = {1.0f, 1.0f}, one"),
    "hidden-pairs-weigh-in": Fault("backward_keys.cuh", "else if (!band.is_full(start_n, N, rows))", "else if (false)"),
    "k-and-v-not-awaited": Fault("backward_queries.cuh", _WAIT_STAGE, _SYNC),
    "stage-of-keys-overwritten": Fault("backward_queries.cuh", "    sync_block();  // nobody reads this stage any more\n", ""),
    "broken-keys-enter-dq": Fault("backward_queries.cuh", "if (masked && any_broken", "if (false && any_broken"),
    "dq-of-another-head-of-keys": Fault("backward_queries.cuh", "work.head / (p.heads / p.kv_heads)", "work.head % p.kv_heads"),
    "delta-left-out": Fault("differentiate.cuh", "p * (dp - delta)", "p * dp"),
    "gradient-of-lse-left-out": Fault("differentiate.cuh", "if (p.dlse) sum -=", "if (false) sum -="),
    "half-of-delta": Fault("differentiate.cuh", "int lanes = 16;", "int lanes = 8;"),
    "dropout-of-other-words": Fault("dropout.cuh", "upper ? c[0] : c[2], 1)", "upper ? c[2] : c[0], 1)"),
    "dropout-of-one-row": Fault("dropout.cuh", "query + fragment_row(upper)", "query + fragment_row(0)"),
    "dropout-words-change-no-places": Fault("dropout.cuh", "step = 1; step < 4;", "step = 1; step < 2;"),
    "dropout-of-one-query": Fault("dropout.cuh", "query + fragment_column(0, n)", "query + fragment_column(0, 0)"),
    "dropout-of-the-first-rows": Fault("differentiate.cuh", "(kept, first_query + (TRANSPOSED ? i * 8 : 0)", "(kept, first_query"),
    "dropout-missing-in-dv": Fault("differentiate.cuh", "x[i][e] = weight * factor", "x[i][e] = weight"),
    "dropout-missing-in-ds": Fault("differentiate.cuh", "dp[i][e] * factor", "dp[i][e]"),
    "softcap-not-differentiated-in-dk": Fault("backward_keys.cuh", "    if (OPTIONS) unbend(dp[0], steep);\n", ""),
    "softcap-not-differentiated-in-dq": Fault("backward_queries.cuh", "    if (OPTIONS) unbend(dp[0], steep);\n", ""),
    "hidden-pairs-of-broken-rows": Fault("differentiate.cuh", "x == -infinity() || !here", "!here"),
    "absent-queries-weigh-in": Fault("differentiate.cuh", "x == -infinity() || !here", "x == -infinity()"),
    "slopes-of-half-a-row": Fault("backward_slopes.cuh", "    sum[r] += shuffle_xor(sum[r], 2);\n", ""),
    "slopes-stored-past-the-end": Fault("backward_slopes.cuh", "% 4 == 0 && first_row + fragment_row(r) < rows", "% 4 == 0"),
    "slopes-of-one-warp": Fault("backward_slopes.cuh", "warp = 1; warp < C::kThreads / 32", "warp = 1; warp < 1"),
    "no-barrier-for-slopes": Fault("backward_slopes.cuh", "  sync_block();\n", ""),
    "slopes-of-the-first-rows": Fault("scores.cuh", "int(start_m) - start_n + row;", "int(start_m) - start_n;"),
    "bias-tiles-not-awaited": Fault("backward_bias.cuh", "    wait_copies<0>();\n    sync_block();\n", "    sync_block();\n"),
    "no-barrier-for-bias-tiles": Fault("backward_bias.cuh", "    wait_copies<0>();\n    sync_block();\n", "    wait_copies<0>();\n"),
    "bias-tiles-overwritten": Fault("backward_bias.cuh", "    sync_block();  // nobody reads the last tiles any more\n", ""),
    "sums-overwrite-bias-tiles": Fault("backward_bias.cuh", "  sync_block();\n  Pairs<false>", "  Pairs<false>"),
    "no-barrier-for-bias-sums": Fault("backward_bias.cuh", "s); });\n  sync_block();", "s); });"),
    "bias-of-the-first-member": Fault("backward_bias.cuh", "if (!stride) return {0, count};", "if (!stride) return {0, 1};"),
    "bias-of-half-a-tile": Fault("backward_bias.cuh", "to.seq ? 1 : C::M", "to.seq ? 1 : C::M / 2"),
    "bias-of-another-head-of-keys": Fault("backward_bias.cuh", "head / (p.heads / p.kv_heads)", "head % p.kv_heads"),
    "bias-stored-past-the-end": Fault("backward_bias.cuh", "to.seq ? int(smaller(M, p.seqlen_q - start_m)) : 1", "to.seq ? M : 1"),
    "length-of-the-next-member": Fault("../mask.h", "p.starts + m.batch * p.kv_stride", "p.starts + (m.batch + 1) * p.kv_stride"),
    "end-of-the-next-member": Fault("../mask.h", "read(p.cu_seqlens_q + batch + 1)", "read(p.cu_seqlens_q + batch + 2)"),
    "float32-without-its-rest": Fault("prims.cuh", "  multiply_add_leading(c, a_rest, b_leads);\n", "", "float32"),
    "float32-weights-of-other-keys": Fault("products.cuh", "w[t][k][j % 2 * 2 + j / 2]", "w[t][k][j]", "float32"),
    "float32-values-of-other-keys": Fault("products.cuh", "k * 8 + row + j, chunk", "k * 8 + row, chunk", "float32"),
    "one-stage-overwritten": Fault("backward_keys.cuh", "    sync_block();  // nobody reads this stage any more\n", "", "float32"),
    "columns-of-the-other-half": Fault("backward_keys.cuh", "dv, x, dout_tile, part * kColumns", "dv, x, dout_tile, 0"),
    "split-reads-keys-twice": Fault("decode.cuh", "(tile_n + (warp_index() + WARPS - tile_n % WARPS) % WARPS) * N", "tile_n * N"),
    "split-without-a-barrier-for-q": Fault("decode.cuh", "  sync_block();  // q is there\n", ""),
    "split-keys-not-awaited": Fault("decode.cuh", "    wait_copies<1>();\n    sync_warp();\n", "    sync_warp();\n"),
    "split-without-a-barrier-of-the-warp": Fault("decode.cuh", "    wait_copies<1>();\n    sync_warp();\n", "    wait_copies<1>();\n"),
    "split-stage-overwritten": Fault("decode.cuh", "    sync_warp();  // no lane reads this stage any more\n", ""),
    "split-without-a-barrier-before-the-parts": Fault("decode.cuh", "  sync_block();\n  const auto of_warp", "  const auto of_warp"),
    "split-of-one-warp": Fault("decode.cuh", "merge(0, WARPS, 1,", "merge(0, 1, 1,"),
    "split-of-another-head": Fault("decode.cuh", "return kv_head * group + number / p.seqlen_q", "return kv_head * group + number % group"),
    "split-of-another-query": Fault("decode.cuh", "int(number_of(fragment_row(1))", "int(number_of(fragment_row(0) + 0)"),
    "split-rows-past-the-last": Fault("decode.cuh", "    if (number >= all) break;\n", ""),
    "split-broken-values-enter": Fault("decode.cuh", "if (found) {", "if (false) {"),
    "split-poison-forgotten": Fault("decode.cuh", "poisoned >> r & 1 ? not_a_number()", "false ? not_a_number()"),
    "split-without-a-barrier-after-mending": Fault("decode.cuh", "broken, lane);\n        sync_warp();\n", "broken, lane);\n"),
    "pages-of-another-member": Fault("decode.cuh", "batch * p.page_table_batch + key / p.page_size", "key / p.page_size"),
    "pages-taken-at-their-word": Fault("decode.cuh", "(p.page_table + at), 0,", "(p.page_table + at), -9,"),
    "combined-in-part": Fault("decode.cuh", "= shuffle_xor(lse, lanes)", "= shuffle_xor(lse, lanes % 2)"),
    "combined-without-sinks": Fault("decode.cuh", "  if (p.sinks) {", "  if (false) {"),
    "combined-without-weights": Fault("decode.cuh", "share(lse_of(n), lse) * load_global", "load_global"),
    "distance-of-a-pair-without-its-key": Fault("scores.cuh", "distance(query - key)", "distance(query)"),
    "mask-of-a-pair-left-out": Fault("scores.cuh", "if (p.mask.data && !load_global", "if (false && !load_global"),
}  # fmt: skip

# In every test run; the others under `make mutants`.
QUICK = ("no-barrier-for-v", "no-swizzle")
