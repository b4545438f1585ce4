"""Faults planted in the CUDA sources, each a textual patch that must apply exactly once: the simulated GPU has to notice them.

Some leave every number right on the CPU, and only the machine's watch over barriers, copies, bounds and banks can tell.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    file: str
    old: str
    new: str


_WAIT_K = "wait_copies<0>();\n      sync_block();  // k is there"
_WAIT_V = "wait_copies<0>();\n      sync_block();  // v is there"

FAULTS: dict[str, Fault] = {
    "k-not-awaited": Fault("forward.cuh", _WAIT_K, "sync_block();  // k is there"),
    "v-not-awaited": Fault("forward.cuh", _WAIT_V, "sync_block();  // v is there"),
    "no-barrier-for-k": Fault("forward.cuh", _WAIT_K, "wait_copies<0>();  // k is there"),
    "no-barrier-for-v": Fault("forward.cuh", _WAIT_V, "wait_copies<0>();  // v is there"),
    "no-barrier-after-mending": Fault("forward.cuh", "(v_tile, broken);\n        sync_block();", "(v_tile, broken);"),
    "one-tile-too-many-is-copied": Fault("forward.cuh", "if (start_n + N < end) load_keys", "if (start_n < end) load_keys"),
    "acc-not-rescaled": Fault("forward.cuh", "acc[t][i][2 * r] *= rescale, acc[t][i][2 * r + 1] *= rescale", "acc[t][i][2 * r] *= 1.0f"),
    "wrong-head-of-a-group": Fault("forward.cuh", "work.head / (p.heads / p.kv_heads)", "work.head % p.kv_heads"),
    "tiles-begin-anywhere": Fault("forward.cuh", "int(keys.lo / N * N)", "int(keys.lo)"),
    "rows-are-not-poisoned": Fault("forward.cuh", "poisoned >> (t * 2 + r) & 1 ? not_a_number()", "false ? not_a_number()"),
    "poison-of-one-lane": Fault("forward.cuh", "  poisoned |= shuffle_xor(poisoned, 1);\n", ""),
    "hidden-values-enter": Fault("forward.cuh", "if (masked && any_broken", "if (false && any_broken"),
    "masked-tile-taken-for-full": Fault("forward.cuh", "const bool masked = !band.is_full(start_n, N, rows)", "const bool masked = false"),
    "no-swizzle": Fault("tile.cuh", "(chunk ^ (row & 7))", "chunk"),
    "columns-past-the-row": Fault("tile.cuh", "count = int(clamp(columns - chunk * 8, 0, 8));\n  int row", "count = 8;\n  int row"),
    "rows-past-the-end": Fault("tile.cuh", "at, row >= first && row < last ? count * 2 : 0", "at, row >= first ? count * 2 : 0"),
    "k-transposed": Fault("tile.cuh", "load_matrices(right, b", "load_matrices_transposed(right, b"),
    "v-not-transposed": Fault("tile.cuh", "load_matrices_transposed(right, b", "load_matrices(right, b"),
    "no-barrier-of-the-warp": Fault("tile.cuh", "  sync_warp();\n  constexpr int kChunks", "  constexpr int kChunks"),
    "rows-stored-past-the-end": Fault("tile.cuh", "from < last ? int(clamp", "true ? int(clamp"),
    "row-sum-not-rescaled": Fault("softmax.cuh", "row_sum[t][r] * rescale", "row_sum[t][r]"),
    "rescale-rounded": Fault("softmax.cuh", "power_of_2((x - pivot) * unit)", "power_of_2(fmaf(x, unit, -pivot * unit))"),
    "hidden-pairs-of-broken-rows": Fault("differentiate.cuh", "if (x == -infinity()) return 0.0f;", ""),
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
    "dropout-words-in-twos": Fault("dropout.cuh", "(upper ? c[2] : c[0])", "c[0]"),
    "dropout-of-the-first-rows": Fault("dropout.cuh", "uint32_t(start_m + fragment_row(r))", "uint32_t(fragment_row(r))"),
    "broken-values-stay": Fault("finite.cuh", "c < D / 8 && found", "c < 0"),
    "packed-slots-too-few": Fault("schedule.cuh", "0, seqlen) / size + b", "0, seqlen) / size"),
    "q-and-dout-not-awaited": Fault("backward_keys.cuh", "    wait_copies<1>();\n    sync_block();\n", "    sync_block();\n"),
    "no-barrier-for-q-and-dout": Fault("backward_keys.cuh", "    wait_copies<1>();\n    sync_block();\n", "    wait_copies<1>();\n"),
    "stage-of-queries-overwritten": Fault("backward_keys.cuh", "    sync_block();  // nobody reads this stage any more\n", ""),
    "one-stage-of-queries": Fault("backward_keys.cuh", "q_tile = stages + turn % 2 * 2 * C::kQuery, *const", "q_tile = stages, *const"),
    "one-head-of-a-group": Fault("backward_keys.cuh", "turns = tiles * group", "turns = tiles"),
    "dk-not-scaled": Fault("backward_keys.cuh", "scale[2] = {float(p.scale), float(p.scale)}, one", "scale[2] = {1.0f, 1.0f}, one"),
    "hidden-pairs-weigh-in": Fault("backward_keys.cuh", "else if (!band.is_full(start_n, N, rows))", "else if (false)"),
    "dropout-missing-in-dk": Fault("backward_keys.cuh", "row.score_gradient(weight, d * kept)", "row.score_gradient(weight, d)"),
    "dropout-missing-in-dv": Fault("backward_keys.cuh", "x[0][i][e] = weight * kept", "x[0][i][e] = weight"),
    "softcap-not-differentiated-in-dk": Fault("backward_keys.cuh", "? d * steep[i][e] : d", "? d : d"),
    "softcap-not-differentiated-in-dq": Fault("backward_queries.cuh", "? d * steep[i][e] : d", "? d : d"),
    "k-and-v-not-awaited": Fault("backward_queries.cuh", "    wait_copies<1>();\n    sync_block();\n", "    sync_block();\n"),
    "stage-of-keys-overwritten": Fault("backward_queries.cuh", "    sync_block();  // nobody reads this stage any more\n", ""),
    "broken-keys-enter-dq": Fault("backward_queries.cuh", "if (masked && any_broken", "if (false && any_broken"),
    "dq-of-another-head-of-keys": Fault("backward_queries.cuh", "work.head / (p.heads / p.kv_heads)", "work.head % p.kv_heads"),
    "dropout-missing-in-dq": Fault("backward_queries.cuh", "d *= keeps ? float(p.dropout_scale) : 0.0f", "d *= 1.0f"),
    "absent-queries-weigh-in": Fault("backward_keys.cuh", "const float weight = here ?", "const float weight = true ?"),
    "delta-left-out": Fault("differentiate.cuh", "p * (dp - delta)", "p * dp"),
    "gradient-of-lse-left-out": Fault("differentiate.cuh", "if (p.dlse) sum -=", "if (false) sum -="),
    "half-of-delta": Fault("differentiate.cuh", "int lanes = 16;", "int lanes = 8;"),
}  # fmt: skip

# In every test run; the others under `make mutants`.
QUICK = ("no-barrier-for-v", "no-swizzle")
