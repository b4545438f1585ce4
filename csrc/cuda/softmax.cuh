// Online softmax of rows that a fragment holds: start, update tile by tile, finish.
//
//   row_max' = max(row_max, max(x))     rescale = exp(row_max - row_max')
//   row_sum' = rescale row_sum + sum(exp(x - row_max'))
//
// The plain kernels leave x unscaled, which takes a scale above 0; with options x are natural scores.
// Source: Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022.
#pragma once

#include "cuda/tile.cuh"

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <int TILES, bool OPTIONS>
struct OnlineSoftmax {
  float unit;  // x times it are scores in base 2
  float row_max[TILES][2];
  float row_sum[TILES][2];  // of the lane's own columns, until the end

  DEVICE explicit OnlineSoftmax(float unit) : unit(unit) {
#pragma unroll
    for (int t = 0; t < TILES; ++t) row_max[t][0] = row_max[t][1] = -infinity(), row_sum[t][0] = row_sum[t][1] = 0.0f;
  }

  // A sink is one more logit, of no key.
  DEVICE void start_with(float sink) {
    const bool counts = lane_index() % 4 == 0 && sink != -infinity();
#pragma unroll
    for (int t = 0; t < TILES; ++t)
      row_max[t][0] = row_max[t][1] = sink, row_sum[t][0] = row_sum[t][1] = counts ? 1.0f : 0.0f;
  }

  // The difference first: of the largest score it is exactly 0. In a fused multiply-add the rounding of pivot * unit
  // would stay, add up where tiles are rescaled, and at 1e10 be an exponent of 512.
  DEVICE float exponential(float x, float pivot) const { return power_of_2((x - pivot) * unit); }

  // -inf - -inf would be nan: a row that has seen no key keeps a finite pivot.
  DEVICE static float finite_pivot(float row_max) { return row_max == -infinity() ? 0.0f : row_max; }

  // x of row r of tile t becomes p; returns rescale.
  template <int N>
  DEVICE float update(int t, int r, float (&x)[N][4]) {
    float highest = row_max[t][r];
#pragma unroll
    for (int i = 0; i < N; ++i) highest = fmaxf(highest, fmaxf(x[i][2 * r], x[i][2 * r + 1]));
    highest = fmaxf(highest, shuffle_xor(highest, 1));
    highest = fmaxf(highest, shuffle_xor(highest, 2));
    const float pivot = finite_pivot(highest), rescale = exponential(row_max[t][r], pivot);
    float sum = row_sum[t][r] * rescale;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) sum += x[i][e] = exponential(x[i][e], pivot);
    row_max[t][r] = highest, row_sum[t][r] = sum;
    return rescale;
  }

  // lse in natural units; row_sum becomes what the row is divided by.
  DEVICE float finish(int t, int r) {
    float sum = row_sum[t][r];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    row_sum[t][r] = sum == 0.0f ? 1.0f : sum;
    const float pivot = finite_pivot(row_max[t][r]) * (OPTIONS ? 1.0f : unit * kLn2);
    return sum == 0.0f ? -infinity() : pivot + logf(sum);
  }
};
