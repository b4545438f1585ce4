// Scores of pairs from the products q k^T, in natural units, and which pairs are hidden.
//
//   score = softcap(scale q k^T) - slope |i + offset - j| + bias,     softcap(x) = c tanh(x / c),     hidden pairs -inf
#pragma once

#include "cuda/products.cuh"

// A number of the caller's, in any floating type.
DEVICE float load_real(Float32, const char* at) { return load_global<float>(at); }
DEVICE float load_real(double, const char* at) { return float(load_global<double>(at)); }
template <class T>
DEVICE float load_real(T, const char* at) {
  return widen(T(), load_global<uint16_t>(at));
}

DEVICE float load_real(const View& x, const char* at) {
  return x.element == Element::kFloat32    ? load_real(Float32(), at)
         : x.element == Element::kFloat64  ? load_real(double(), at)
         : x.element == Element::kBFloat16 ? load_real(BFloat16(), at)
                                           : load_real(Float16(), at);
}

// The reverse.
template <class U>
DEVICE void store_real(U, char* at, float x) {
  store_global(at, uint16_t(pack(U(), x, 0.0f)));
}
DEVICE void store_real(Float32, char* at, float x) { store_global(at, x); }
DEVICE void store_real(double, char* at, float x) { store_global(at, double(x)); }

// What the rows of a tile see, in 32 bits, for registers are few.
//
//   row r sees [max(start, r + first), min(end, r + last + 1))
struct Band {
  int start, end, first, last;

  // Rows count from start_m. Beyond 2^30 a bound hides all keys or none, and stays so.
  DEVICE Band(const Visibility& sees, int64_t start_m)
      : start(int(sees.start)),
        end(int(sees.end)),
        first(int(clamp(sees.first + start_m, -kFar, kFar))),
        last(int(clamp(sees.last + start_m, -kFar, kFar))) {}

  DEVICE int begin_of(int row) const { return max(start, row + first); }
  DEVICE int end_of(int row) const { return min(end, row + last + 1); }

  // Whether all of the first `rows` rows see all of these keys.
  DEVICE bool is_full(int start_n, int keys, int rows) const {
    return begin_of(rows - 1) <= start_n && start_n + keys <= end_of(0);
  }

 private:
  static constexpr int64_t kFar = int64_t{1} << 30;
};

// How a fragment holds pairs: 16 queries a row of keys each, or transposed.
template <bool TRANSPOSED>
struct Pairs {
  // f(number, query, key) for every pair that a lane holds, counted from the tile's first; `row` is the fragment's
  // first.
  template <int N, class F>
  DEVICE static void each(float (&x)[N][4], int row, F&& f) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int place = row + fragment_row(e / 2), column = fragment_column(i, e);
        f(x[i][e], TRANSPOSED ? column : place, TRANSPOSED ? place : column);
      }
  }
};

// -inf for the hidden pairs of 16 rows from `row` on and the keys from start_n on.
template <int N>
DEVICE void hide(float (&x)[N][4], const Band& band, int row, int start_n) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int lo = band.begin_of(row + fragment_row(r)) - start_n, hi = band.end_of(row + fragment_row(r)) - start_n;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        const int column = fragment_column(i, e);
        if (column < lo || column >= hi) x[i][e] = -infinity();
      }
  }
}

// The same of 16 keys from `row` on of a tile that begins at start_n, and all queries of the band's tile.
template <int N>
DEVICE void hide_transposed(float (&x)[N][4], const Band& band, int row, int start_n) {
  Pairs<true>::each(x, row, [&](float& s, int query, int key) {
    if (start_n + key < band.begin_of(query) || start_n + key >= band.end_of(query)) s = -infinity();
  });
}

constexpr float kLargest = 3.4028234e38f;

// What the options make of the products of one head.
struct PairOptions {
  const AttentionParams& p;
  int64_t batch, head;
  float scale, softcap, slope, offset;
  float bend;  // what a softcap's tanh has its products multiplied with; finite, for 0 times it must be 0

  DEVICE PairOptions(const AttentionParams& params, const Visibility& sees, int64_t batch, int64_t head)
      : p(params),
        batch(batch),
        head(head),
        scale(float(p.scale)),
        softcap(float(p.softcap)),
        offset(float(sees.offset)) {
    bend = softcap == 0.0f ? 0.0f : fmaxf(-kLargest, fminf(scale / softcap, kLargest));
    slope = p.slopes ? load_global<float>(static_cast<const float*>(p.slopes) + batch * p.slopes_batch + head) : 0.0f;
  }

  // Whether a pair of any tile may be hidden.
  DEVICE bool hide_pairs() const { return p.mask.data || p.bias.data; }

  // The softcap's derivative, of products; 1 without one.
  template <int N>
  DEVICE void steepness(const float (&x)[N][4], float (&steep)[N][4]) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float bent = softcap == 0.0f ? 0.0f : tanhf(x[i][e] * bend);
        steep[i][e] = 1.0f - bent * bent;
      }
  }

  // Products to scores, in place, -inf where a pair is hidden, of 16 rows from `row` on of a tile that begins at
  // start_m and has `rows` rows, and the keys from start_n on. One option at a time: a branch a pair would cost more
  // code than it saves.
  template <bool TRANSPOSED = false, int N>
  DEVICE void apply(float (&x)[N][4], const Band& band, int64_t start_m, int rows, int row, int start_n) const {
    if (softcap == 0.0f)
      Pairs<TRANSPOSED>::each(x, row, [&](float& s, int, int) { s *= scale; });
    else
      Pairs<TRANSPOSED>::each(x, row, [&](float& s, int, int) { s = softcap * tanhf(s * bend); });
    if (p.slopes) {
      const int first = int(start_m) - start_n;
      Pairs<TRANSPOSED>::each(x, row, [&](float& s, int i, int j) { s -= slope * distance(first + i - j); });
    }
    TRANSPOSED ? hide_transposed(x, band, row, start_n) : hide(x, band, row, start_n);
    if (p.bias.data) {
      if (p.bias.element == Element::kFloat32)
        add<TRANSPOSED, Float32>(x, start_m, rows, row, start_n);
      else if (p.bias.element == Element::kFloat64)
        add<TRANSPOSED, double>(x, start_m, rows, row, start_n);
      else if (p.bias.element == Element::kBFloat16)
        add<TRANSPOSED, BFloat16>(x, start_m, rows, row, start_n);
      else
        add<TRANSPOSED, Float16>(x, start_m, rows, row, start_n);
    }
    if (p.mask.data) {
      const char* const from = row_of(p.mask, batch, head, start_m) + start_n * p.mask.dim;
      Pairs<TRANSPOSED>::each(x, row, [&](float& s, int i, int j) {
        if (s != -infinity() && i < rows && !load_global<uint8_t>(from + i * p.mask.seq + j * p.mask.dim))
          s = -infinity();
      });
    }
  }

  // The same of one pair, whose query and key count from their first.
  DEVICE float score(float product, const Band& band, int query, int key) const {
    if (key < band.begin_of(query) || key >= band.end_of(query)) return -infinity();
    float s = softcap == 0.0f ? product * scale : softcap * tanhf(product * bend);
    if (p.slopes) s -= slope * distance(query - key);
    if (p.bias.data) {
      const float added = load_real(p.bias, row_of(p.bias, batch, head, query) + key * p.bias.dim);
      s = added == -infinity() ? added : s + added;
    }
    if (p.mask.data && !load_global<uint8_t>(row_of(p.mask, batch, head, query) + key * p.mask.dim)) s = -infinity();
    return s;
  }

  // To the sums of a lane's two rows, of the gradients of scores.
  template <int N>
  DEVICE void add_slope_gradient(float (&sum)[2], float (&ds)[N][4], int64_t start_m, int row, int start_n) const {
    const int first = int(start_m) - start_n + row;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sum[e / 2] -= ds[i][e] * distance(first + fragment_row(e / 2) - fragment_column(i, e));
  }

 private:
  DEVICE float distance(int difference) const { return fabsf(offset + float(difference)); }

  template <bool TRANSPOSED, class U, int N>
  DEVICE void add(float (&x)[N][4], int64_t start_m, int rows, int row, int start_n) const {
    const char* const from = row_of(p.bias, batch, head, start_m) + start_n * p.bias.dim;
    Pairs<TRANSPOSED>::each(x, row, [&](float& s, int i, int j) {
      if (s == -infinity() || i >= rows) return;
      const float added = load_real(U(), from + i * p.bias.seq + j * p.bias.dim);
      s = added == -infinity() ? added : s + added;  // not nan, of a key that is not a number either
    });
  }
};
