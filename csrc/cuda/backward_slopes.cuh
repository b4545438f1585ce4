// Fused attention, backward, the gradients of ALiBi slopes: of each head the sum over the rows of a batch member, in an
// order that is always the same.
#pragma once

#include "cuda/differentiate.cuh"

// What the lanes that share two rows have found, to the place of each row.
DEVICE void store_slope_gradients(float* to, float (&sum)[2], int first_row, int rows) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += shuffle_xor(sum[r], 1);
    sum[r] += shuffle_xor(sum[r], 2);
    if (lane_index() % 4 == 0 && first_row + fragment_row(r) < rows)
      store_global(to + first_row + fragment_row(r), sum[r]);
  }
}

struct SlopeConfig {
  static constexpr int kThreads = 128, kShared = kThreads / 32 * 4;
};

// A block adds up one head of a member.
template <class C>
KERNEL(C::kThreads)
slope_kernel(ARGUMENT AttentionParams p) {
  SHARED(memory);
  const Member member = member_of(p, block_index() / p.heads);
  const int64_t head = block_index() % p.heads;
  const float* const rows = static_cast<const float*>(p.row_dslopes) + row_number(p, member, head);
  float sum = 0.0f;
  for (int64_t row = thread_index(); row < member.seqlen_q; row += C::kThreads) sum += load_global<float>(rows + row);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  if (lane_index() == 0) store_shared(memory + warp_index() * 4, sum);
  sync_block();
  if (thread_index() != 0) return;
  for (int warp = 1; warp < C::kThreads / 32; ++warp) sum += load_shared<float>(memory + warp * 4);
  store_global(static_cast<float*>(p.dslopes) + block_index(), sum);
}
