// One read of memory: a block of a row is looked at twice, for its largest value and for the sum of exponentials
// relative to the largest so far, the second time in the L1 cache. Written with GCC's vector types, compiled for
// several instruction sets; the loader picks one. Sums of blocks are kept in double.
#include "log_normaliser.h"

#include <cmath>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define FLR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FLR_CLONES
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only

namespace flr {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kBlock = 2048;  // 8 KB
constexpr float kInf = std::numeric_limits<float>::infinity();
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));

#define FLR_INLINE static inline __attribute__((always_inline))

FLR_INLINE Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// exp(x) for x <= 0, 2^-126 below -87.3, NaN for NaN: 2^t = 2^n p(t - n), n = round(t), p the Taylor polynomial of
// degree 6, relative error 1.2e-7 at the ends of [-1/2, 1/2], beside rounding.
FLR_INLINE Floats exp_of(const Floats& x) {
  Floats t = x * 1.44269504088896341f;
  t = t < -126.0f ? Floats{} - 126.0f : t;
  const Floats shifted = t + 12582912.0f;  // 1.5 * 2^23: the integer stands in the low bits
  const Floats f = t - (shifted - 12582912.0f);
  Floats p = 1.5403530e-4f * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  Bits n;
  std::memcpy(&n, &shifted, sizeof n);
  n = (n + 127u) << 23;
  Floats power;
  std::memcpy(&power, &n, sizeof power);
  return p * power;
}

FLR_CLONES float normaliser(const float* x, int64_t size) {
  float top = -kInf;
  double sum = 0;
  for (int64_t start = 0; start < size; start += kBlock) {
    const float* block = x + start;
    const int64_t length = size - start < kBlock ? size - start : kBlock, whole = length / kLanes * kLanes;
    float rest[kLanes];
    for (int i = 0; i < kLanes; ++i) rest[i] = i < length - whole ? block[whole + i] : -kInf;
    Floats largest = load(rest);
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Floats value = load(block + i);
      largest = value > largest ? value : largest;
    }
    float now = top;
    for (int i = 0; i < kLanes; ++i) now = largest[i] > now ? largest[i] : now;
    if (now > top) sum *= std::exp(double(top) - double(now)), top = now;
    const float base = top == -kInf ? 0.0f : top;  // -inf - -inf would be NaN
    Floats a{}, b{}, c{}, d{};                      // four chains of additions
    int64_t i = 0;
    for (; i + 4 * kLanes <= whole; i += 4 * kLanes) {
      a += exp_of(load(block + i) - base);
      b += exp_of(load(block + i + kLanes) - base);
      c += exp_of(load(block + i + 2 * kLanes) - base);
      d += exp_of(load(block + i + 3 * kLanes) - base);
    }
    for (; i < whole; i += kLanes) a += exp_of(load(block + i) - base);
    b += exp_of(load(rest) - base);
    a = (a + b) + (c + d);
    for (int lane = 0; lane < kLanes; ++lane) sum += a[lane];
  }
  return top == -kInf && sum == sum ? top : top + float(std::log(sum));
}

}  // namespace

void log_normaliser_host(const float* logits, int64_t rows, int64_t size, int64_t stride, float* out) {
  for (int64_t row = 0; row < rows; ++row) out[row] = normaliser(logits + row * stride, size);
}

}  // namespace flr
