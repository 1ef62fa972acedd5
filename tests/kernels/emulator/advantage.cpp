// csrc/group_advantage.cu on the emulator against its host twin, every float to the bit. A line a problem that differs;
// the exit status says whether one did. With an argument: few problems.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "group_advantage.cuh"

using namespace flr;

namespace {

struct Shape { int64_t groups, size, length; };

template <class Acc>
struct Results {
  std::vector<Acc> values;
  std::vector<double> batch, scratch;
  explicit Results(const Shape& s)
      : values(size_t(2 * s.groups * (s.size + 1)), NAN), batch(4, NAN), scratch(size_t(2 * s.groups + 1), NAN) {}
  void into(Problem& p) {
    p.rewards = values.data(), p.advantages = values.data() + p.groups * p.size;
    p.mean = values.data() + 2 * p.groups * p.size, p.std = values.data() + (2 * p.size + 1) * p.groups;
    p.batch = batch.data(), p.scratch = scratch.data();
  }
};

template <class T>
std::vector<T> numbers(size_t count, Dtype dtype, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-3, 0);
  std::vector<T> x(count);
  for (auto& value : x) {
    if constexpr (sizeof(T) == 2) {  // of either 16-bit kind, in [-3, 0]
      value.bits = uint16_t((dtype == Dtype::bfloat16 ? 0xbf00 : 0xb800) + random() % 0x80);
    } else {
      value = T(uniform(random));
    }
  }
  return x;
}

template <class T>
bool differs(Dtype dtype, const Shape& s, Kind kind, Reward reward, bool has_mask) {
  using Acc = typename accumulator<T>::type;
  std::mt19937 random(unsigned(s.groups + 7 * int(kind)));
  const auto logprobs = numbers<T>(size_t(s.groups * s.size * s.length), dtype, random);
  std::vector<uint8_t> mask(logprobs.size());
  for (auto& valid : mask) valid = random() % 4 != 0;
  Problem p{};
  p.token_logprobs = logprobs.data(), p.mask = has_mask ? mask.data() : nullptr;
  p.row_stride = p.mask_row_stride = s.length, p.column_stride = p.mask_column_stride = reward == Reward::given ? 0 : 1;
  p.groups = s.groups, p.size = s.size, p.length = s.length, p.eps = 1e-4;
  p.dtype = dtype, p.kind = kind, p.reward = reward;
  Results<Acc> host(s), device(s);
  host.into(p);
  group_advantage_host(p);
  device.into(p);
  const char* error = group_advantage_cuda(p, 0, nullptr);
  const size_t bytes = host.values.size() * sizeof(Acc);
  bool same = error == nullptr && memcmp(host.values.data(), device.values.data(), bytes) == 0;
  for (size_t i = 0; kind == Kind::latentr3 && i < 4; ++i)  // sums over groups in double, in another order
    same = same && std::fabs(host.batch[i] - device.batch[i]) <= 1e-12 * std::fabs(host.batch[i]);
  if (!same)
    std::printf("FAIL dtype %d B %ld G %ld S %ld kind %d reward %d mask %d\n", int(dtype), long(s.groups), long(s.size),
                long(s.length), int(kind), int(reward), int(has_mask));
  return !same;
}

// The small launch that finishes latentr3 from several processes' partials.
template <class Acc>
bool batch_differs(bool is_double) {
  std::mt19937 random(1);
  std::uniform_real_distribution<double> uniform(-3, 0);
  std::vector<Acc> rewards(5 * 70), host(rewards.size(), NAN), device(rewards.size(), NAN);
  std::vector<double> partials = {5, -1.5, -1.4, 30, 0, 0, 0, 0, 7, -1.25, -1.6, 55};
  for (auto& value : rewards) value = Acc(uniform(random));
  BatchProblem p{};
  p.rewards = rewards.data(), p.partials = partials.data(), p.groups = 5, p.size = 70, p.processes = 3;
  p.eps = 1e-4, p.is_double = is_double;
  p.advantages = host.data();
  batch_advantage_host(p);
  p.advantages = device.data();
  const char* error = batch_advantage_cuda(p, 0, nullptr);
  if (error == nullptr && memcmp(host.data(), device.data(), host.size() * sizeof(Acc)) == 0) return false;
  std::printf("FAIL batch_advantage, double %d\n", int(is_double));
  return true;
}

}  // namespace

int main(int count, char**) {
  std::vector<Shape> shapes = {{9, 4, 5}, {2, 33, 3}, {10, 4, 512}};
  if (count == 1) shapes = {{1, 1, 1}, {5, 8, 16}, {2, 33, 3}, {2, 5, 420}, {10, 4, 512}};
  int failed = 0, problems = 0;
  for (const Shape& s : shapes) {
    for (int k = 0; k < 4; ++k) {
      const Kind kind = Kind(k);
      // several blocks, the last of which finishes
      if ((s.length > 500 && kind != Kind::latentr3) || (count > 1 && s.length < 500 && kind != Kind::grpo)) continue;
      failed += differs<float>(Dtype::float32, s, kind, Reward(k % 2), k % 2), ++problems;
      if (count > 1 || s.length > 500) continue;
      failed += differs<bfloat16>(Dtype::bfloat16, s, kind, Reward::log_likelihood, true), ++problems;
      failed += differs<float16>(Dtype::float16, s, kind, Reward::neg_perplexity, true), ++problems;
      failed += differs<float>(Dtype::float32, {s.groups, s.size, 1}, kind, Reward::given, false), ++problems;
    }
  }
  failed += batch_differs<float>(false) + batch_differs<double>(true), problems += 2;
  std::printf("%d problems\n", problems);
  return failed != 0;
}
