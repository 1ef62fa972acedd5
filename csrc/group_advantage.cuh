// Rewards and group-relative advantages: the arithmetic, shared by the CUDA kernel and its host twin. The formulas are
// in flr_kernels/ops/group_advantage/op.py, the definition in reference.py beside it. Shapes: B groups, G members
// (size), S tokens (length). Every sum is taken in double, of differences to one of the summed values where values can
// be large and close.
//
// A Team is the threads that work on one group: a warp, a block, or on the host one thread. It has a rank and a size,
// is cut into segments of `width` threads (one sequence each at a time), and sums over a segment or over all, in fixed
// order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FLR_HD __host__ __device__ __forceinline__
#else
#define FLR_HD inline
#endif

namespace flr {

enum class Dtype { float32, float64, bfloat16, float16 };
enum class Kind { grpo, dr_grpo, rloo, latentr3 };
enum class Reward { neg_perplexity, log_likelihood, given };

// Strides in elements. Outputs are contiguous, in float (double for float64 input).
struct Problem {
  const void* token_logprobs;  // [B G, S]
  const uint8_t* mask;         // [B G, S] or null
  void* rewards;               // [B, G]
  void* advantages;            // [B, G]
  void* mean;                  // [B]
  void* std;                   // [B]
  double* batch;               // [4], latentr3 only: see batch_partial
  double* scratch;             // [2 B + 1], latentr3 only: mean and squared deviations of each group; a counter
  int64_t row_stride, column_stride, mask_row_stride, mask_column_stride;
  int64_t groups, size, length;
  double eps;
  Dtype dtype;
  Kind kind;
  Reward reward;
};

// Advantages of latentr3 from what every process found: see batch_scale.
struct BatchProblem {
  const void* rewards;     // [B, G]
  const double* partials;  // [P, 4]
  void* advantages;        // [B, G]
  int64_t groups, size, processes;
  double eps;
  bool is_double;
};

void group_advantage_host(const Problem& problem);
void batch_advantage_host(const BatchProblem& problem);
// Null, or what went wrong.
const char* group_advantage_cuda(const Problem& problem, int device, void* stream);
const char* batch_advantage_cuda(const BatchProblem& problem, int device, void* stream);
const char* driver_problem();

// 16-bit floats as they lie in memory; widening is exact.
struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

FLR_HD float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
FLR_HD double widen(float x) { return x; }
FLR_HD double widen(double x) { return x; }
FLR_HD double widen(bfloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
FLR_HD double widen(float16 x) {
  const uint32_t rest = x.bits & 0x7fffu, sign = uint32_t(x.bits & 0x8000u) << 16;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf, NaN
  return double(from_bits(sign | rest << 13)) * 0x1p112;  // rebias; subnormals become normal
}

template <class T> struct accumulator { using type = float; };
template <> struct accumulator<double> { using type = double; };

// Comparisons are false for NaN, so NaN passes through both.
FLR_HD double reward_of_mean(double mean, Reward reward) {
  mean = mean < -30.0 ? -30.0 : mean;
  return reward == Reward::neg_perplexity ? -exp(-mean) : mean;
}
FLR_HD double given_reward(double value) {
  const double limit = 10686474581524.463;  // exp(30)
  return value < -limit ? -limit : value > limit ? limit : value;
}

// Rewards, statistics and, but for latentr3, advantages of group b.
template <class T, class Team>
FLR_HD void group(const Team& team, const Problem& p, int64_t b) {
  using Acc = typename accumulator<T>::type;
  const T* logprobs = static_cast<const T*>(p.token_logprobs);
  Acc* rewards = static_cast<Acc*>(p.rewards) + b * p.size;
  for (int64_t start = 0; start < p.size; start += team.segments()) {
    const int64_t i = start + team.segment(), row = b * p.size + i;
    double total = 0, count = 0;
    if (i < p.size) {
      const T* values = logprobs + row * p.row_stride;
      const uint8_t* valid = p.mask == nullptr ? nullptr : p.mask + row * p.mask_row_stride;
      for (int64_t s = team.lane(); s < p.length; s += team.width()) {
        if (valid != nullptr && !valid[s * p.mask_column_stride]) continue;
        total += widen(values[s * p.column_stride]);
        count += 1;
      }
    }
    total = team.segment_sum(total);
    count = p.mask == nullptr ? double(p.length) : team.segment_sum(count);
    if (i < p.size && team.lane() == 0) {
      rewards[i] = Acc(p.reward == Reward::given ? given_reward(total)
                                                 : reward_of_mean(total / (count < 1 ? 1 : count), p.reward));
    }
  }
  team.sync();

  const double origin = rewards[0];
  double sum = 0;
  for (int64_t i = team.rank(); i < p.size; i += team.size()) sum += double(rewards[i]) - origin;
  const double shift = team.sum(sum) / double(p.size);
  double squares = 0;
  for (int64_t i = team.rank(); i < p.size; i += team.size()) {
    const double centred = double(rewards[i]) - origin - shift;
    squares += centred * centred;
  }
  squares = team.sum(squares);
  const double others = p.size > 1 ? double(p.size - 1) : 1.0, std = sqrt(squares / others);
  if (team.rank() == 0) {
    static_cast<Acc*>(p.mean)[b] = Acc(origin + shift);
    static_cast<Acc*>(p.std)[b] = Acc(std);
  }
  if (p.kind == Kind::latentr3) {
    if (team.rank() == 0) {
      p.scratch[2 * b] = origin + shift;
      p.scratch[2 * b + 1] = squares;
    }
    return;
  }
  Acc* advantages = static_cast<Acc*>(p.advantages) + b * p.size;
  for (int64_t i = team.rank(); i < p.size; i += team.size()) {
    const double centred = double(rewards[i]) - origin - shift;
    advantages[i] = Acc(p.kind == Kind::grpo   ? centred / (std + p.eps)
                        : p.kind == Kind::rloo ? centred * (double(p.size) / others)
                                               : centred);
  }
}

// Of all groups: number, mean of members 0, mean of all, sum of (R - mean of all)^2. The same on every thread.
struct Partial { double groups, baseline, overall, squares; };

template <class T, class Team>
FLR_HD Partial batch_partial(const Team& team, const Problem& p) {
  using Acc = typename accumulator<T>::type;
  if (p.groups == 0) return {0, 0, 0, 0};
  const Acc* rewards = static_cast<const Acc*>(p.rewards);
  const double clean0 = rewards[0], mean0 = p.scratch[0];
  double clean = 0, mean = 0, squares = 0;
  for (int64_t b = team.rank(); b < p.groups; b += team.size()) {
    clean += double(rewards[b * p.size]) - clean0;
    mean += p.scratch[2 * b] - mean0;
  }
  const double baseline = clean0 + team.sum(clean) / double(p.groups);
  const double overall = mean0 + team.sum(mean) / double(p.groups);
  for (int64_t b = team.rank(); b < p.groups; b += team.size()) {
    const double distance = p.scratch[2 * b] - overall;
    squares += p.scratch[2 * b + 1] + double(p.size) * distance * distance;
  }
  return {double(p.groups), baseline, overall, team.sum(squares)};
}

// m and norm + eps from every process's partial. All terms of the squared norm are positive: nothing cancels.
struct Scale { double m, divisor; };

template <class Team>
FLR_HD Scale batch_scale(const Team& team, const Partial* partials, int64_t processes, int64_t size, double eps) {
  double groups = 0, origin = 0, most = 0;
  for (int64_t q = 0; q < processes; ++q) {  // few: every thread looks at all
    groups += partials[q].groups;
    if (partials[q].groups > most) most = partials[q].groups, origin = partials[q].baseline;
  }
  double m = 0, squares = 0;
  for (int64_t q = team.rank(); q < processes; q += team.size())
    m += partials[q].groups * (partials[q].baseline - origin);
  m = origin + team.sum(m) / (groups < 1 ? 1 : groups);
  for (int64_t q = team.rank(); q < processes; q += team.size()) {
    const double distance = partials[q].overall - m;
    squares += partials[q].squares + partials[q].groups * double(size) * distance * distance;
  }
  return {m, sqrt(team.sum(squares)) + eps};
}

template <class Acc>
FLR_HD void batch_advantages(const Acc* rewards, Acc* advantages, Scale scale, int64_t first, int64_t stride,
                             int64_t count) {
  for (int64_t i = first; i < count; i += stride) advantages[i] = Acc((double(rewards[i]) - scale.m) / scale.divisor);
}

}  // namespace flr
