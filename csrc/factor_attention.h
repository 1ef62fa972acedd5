// factor_attention on a GPU of compute capability 9.0; flr_kernels.factor_attention's backend "cuda". The definition is
// in flr_kernels/ops/factor_attention/reference.py, the kernels in factor_attention.cuh and _backward.cuh.
#pragma once
#include <cstdint>

namespace flr {

// Shapes: B users, L tokens (length), K factors, D columns (size). Strides in elements; results are contiguous.
struct AttentionProblem {
  const void* h;        // [B, L, D] bfloat16 or float16; every row at a multiple of 16 bytes
  const void* u;        // [B, K, D] of the same dtype, aligned likewise
  const uint8_t* mask;  // [B, L] or null
  float* context;       // [B, K, D]
  float* lse;           // [B, K]
  float* overlap;       // [B, K, K]
  float* entropy;       // [B, K]
  int64_t h_b, h_l, u_b, u_k, mask_b, mask_l;
  int64_t users, length;
  int size, factors;
  bool is_half, last_first;
};

// Gradients of the results, contiguous, and where those of the inputs go. The problem beside them has the results.
struct AttentionGradients {
  const float *context, *lse, *overlap, *entropy;
  void* dh;  // [B, L, D] of h's dtype, contiguous; null where nobody needs it
  void* du;  // [B, K, D]
};

constexpr int kGradientFactors = 4, kGradientStep = 16;  // the backward's most factors, and what divides its columns
constexpr int kExactColumns = 2048;  // beyond them the backward rounds the context's gradients to bfloat16 first
constexpr int kMaxFactors = 16, kMaxColumns = 8192, kColumnStep = 8;
constexpr int64_t kMaxUsers = int64_t(1) << 27, kMaxTokens = int64_t(1) << 30;

// Null, or what went wrong. They check nothing. The backward takes bfloat16 alone.
const char* factor_attention_cuda(const AttentionProblem& problem, int device, void* stream);
const char* factor_attention_backward_cuda(const AttentionProblem& problem, const AttentionGradients& gradients,
                                           int device, void* stream);

}  // namespace flr
