// A tile's weights as the tensor core takes them, for factor_attention_backward.cuh.
#pragma once
#include "device.cuh"

namespace flr {

// Operands of a tile that every strip is multiplied with.
struct Weights {
  uint32_t ds[2], high[4], low[4];
};

// ds as a [16 or 8 tokens, 8] operand: column g is factor g's high half, column g + 4 what it leaves.
template <class T, bool kWide>
FLR_DEVICE void by_factor(int lane, const float (&ds)[2], uint32_t (&b)[2]) {
  const bool is_upper = lane >= 16;
  const float x = kWide ? ds[0] : shuffle_xor(ds[0], 16), y = kWide ? ds[1] : shuffle_xor(ds[1], 16);
  const float values[2][2] = {{is_upper ? x : ds[0], is_upper ? y : ds[1]},
                              {is_upper ? ds[0] : x, is_upper ? ds[1] : y}};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t high = T::pack(values[i][0], values[i][1]);
    const auto rounded = T::unpack(high);
    b[i] = is_upper ? T::pack(values[i][0] - rounded.x, values[i][1] - rounded.y) : high;
  }
}

// Weights as an operand of tokens g (and g + 8) and pairs of rows t, t + 1 (and t + 8, t + 9): ds, α and α; from what
// a lane has, pairs of tokens.
template <bool kWide>
FLR_DEVICE void by_token(int lane, uint32_t ds, uint32_t weight, uint32_t (&a)[4]) {
  const int g = lane / 4;
  const int first = lane % 2 * 2;  // of two factors
  const bool is_weight = lane % 4 >= 2;
#pragma unroll
  for (int i = 0; i < (kWide ? 1 : 2); ++i) {
    const int from = 4 * (first + 4 * i) + g / 2;
    const uint32_t x = shuffle(ds, from), y = shuffle(ds, from + 4);
    const uint32_t z = shuffle(weight, from), w = shuffle(weight, from + 4);
    const uint32_t low = is_weight ? z : x, high = is_weight ? w : y;
    a[i] = g % 2 ? (low >> 16) | (high & 0xffff0000u) : (low & 0xffffu) | (high << 16);
    const uint32_t other = kWide ? 0 : shuffle(a[i], lane ^ 2);
    a[2 + i] = is_weight ? 0 : other;
  }
}

// From what a lane has of a tile: weights and ds of its factor and two tokens. kWide: tiles of eight tokens.
template <class T, bool kWide>
FLR_DEVICE Weights operands(int lane, const float (&weight)[2], const float (&ds)[2]) {
  Weights out;
  by_factor<T, kWide>(lane, ds, out.ds);
  const uint32_t d = T::pack(ds[0], ds[1]), w = T::pack(weight[0], weight[1]);
  const auto x = T::unpack(d), y = T::unpack(w);
  by_token<kWide>(lane, d, w, out.high);
  const uint32_t d_rest = T::pack(ds[0] - x.x, ds[1] - x.y), w_rest = T::pack(weight[0] - y.x, weight[1] - y.y);
  by_token<kWide>(lane, d_rest, w_rest, out.low);
  return out;
}

}  // namespace flr
