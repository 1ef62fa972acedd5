// Two strips of a tile at a time, for factor_attention_backward.cuh: what the tensor core makes of their columns. With
// tiles of sixteen tokens a strip's columns fill one fragment; with tiles of eight both strips share one. `two`: whether
// the second strip has columns.
#pragma once
#include "factor_attention_backward_producer.cuh"
#include "factor_attention_backward_weights.cuh"

namespace flr {

template <class C>
struct StripPair {
  using T = Bfloat16;
  using Fragment = uint32_t[4];
  static constexpr int kApart = 16 * kWorkers;  // columns from a worker's strip to its next
  static constexpr bool kWide = C::kWide;

  // Products with the rows: s[0] and s[1] are of the first and second eight tokens, or, with tiles of eight, of the two
  // strips.
  static FLR_DEVICE void multiply(float (&s)[4][4], const uint16_t* at, const uint16_t* rows, bool two) {
    Fragment q, x, r, y;
    if (kWide) {
      ldmatrix<false>(q, rows), ldmatrix<false>(x, at);
      T::mma(s[0], q[0], 0, q[1], 0, x[0], x[1]);
      if (two) T::mma(s[1], q[2], 0, q[3], 0, x[2], x[3]);
      return;
    }
    ldmatrix<false>(q, rows), ldmatrix<false>(x, at);
    if (two) ldmatrix<false>(r, rows + kApart), ldmatrix<false>(y, at + kApart);
    T::mma(s[0], q[0], q[1], q[2], q[3], x[0], x[1]);
    T::mma(s[1], q[0], q[1], q[2], q[3], x[2], x[3]);
    if (!two) return;
    T::mma(s[2], r[0], r[1], r[2], r[3], y[0], y[1]);
    T::mma(s[3], r[0], r[1], r[2], r[3], y[2], y[3]);
  }

  static FLR_DEVICE void load(Fragment (&h)[2], Fragment (&q)[2], const uint16_t* at, const uint16_t* rows, bool two) {
    ldmatrix<true>(h[0], at), ldmatrix<true>(q[0], rows);
    if (!kWide && two) ldmatrix<true>(h[1], at + kApart), ldmatrix<true>(q[1], rows + kApart);
  }

  // Gradients of the strips from their columns h and the rows' q: added to `sums`, and, with that of the history, written
  // over them.
  static FLR_DEVICE void use(const Weights& w, bool with_history, float (*sums)[4], const Fragment (&h)[2],
                             const Fragment (&q)[2], uint16_t* at, bool two) {
    if (kWide) use_8(w, with_history, sums, h[0], q[0], at, two);
    else use_16(w, with_history, sums, h, q, at, two);
  }

 private:
  static FLR_DEVICE void use_16(const Weights& w, bool with_history, float (*sums)[4], const Fragment (&h)[2],
                                const Fragment (&q)[2], uint16_t* at, bool two) {
    float left[2][4] = {}, right[2][4] = {};  // columns 0 to 7 and 8 to 15
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (j == 0 || two) T::mma(sums[j], h[j][0], h[j][1], h[j][2], h[j][3], w.ds[0], w.ds[1]);
    if (!with_history) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j == 1 && !two) break;
      T::mma(left[j], w.high[0], w.high[1], w.high[2], w.high[3], q[j][0], q[j][1]);
      T::mma(right[j], w.high[0], w.high[1], w.high[2], w.high[3], q[j][2], q[j][3]);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j == 1 && !two) break;
      T::mma(left[j], w.low[0], w.low[1], 0, 0, q[j][0], q[j][1]);
      T::mma(right[j], w.low[0], w.low[1], 0, 0, q[j][2], q[j][3]);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j == 1 && !two) break;
      const Fragment out = {T::pack(left[j][0], left[j][1]), T::pack(right[j][0], right[j][1]),
                            T::pack(left[j][2], left[j][3]), T::pack(right[j][2], right[j][3])};
      stmatrix<false>(at + j * kApart, out);
    }
  }
  // dH comes transposed.
  static FLR_DEVICE void use_8(const Weights& w, bool with_history, float (*sums)[4], const Fragment& h,
                               const Fragment& q, uint16_t* at, bool two) {
    float out[2][4] = {};
    T::mma_8(sums[0], h[0], h[1], w.ds[0]);
    if (two) T::mma_8(sums[1], h[2], h[3], w.ds[0]);
    if (!with_history) return;
    T::mma_8(out[0], q[0], q[1], w.high[0]);
    if (two) T::mma_8(out[1], q[2], q[3], w.high[0]);
    T::mma_8(out[0], q[0], q[1], w.low[0]);
    if (two) T::mma_8(out[1], q[2], q[3], w.low[0]);
    const Fragment packed = {T::pack(out[0][0], out[0][1]), T::pack(out[0][2], out[0][3]),
                             T::pack(out[1][0], out[1][1]), T::pack(out[1][2], out[1][3])};
    if (two) stmatrix<true>(at, packed);
    else stmatrix_2_transposed(at, packed);
  }
};

}  // namespace flr
