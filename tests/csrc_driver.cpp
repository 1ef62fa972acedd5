// Runs the host twin over awkward sizes under the sanitizers (tests/test_csrc.py): buffers of exactly the right size, results
// against plain loops in long double. Exit status 1 and a line on the first difference.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../csrc/group_advantage.cuh"

using namespace flr;

static std::mt19937_64 engine(1);
static double uniform() { return std::uniform_real_distribution<double>(0, 1)(engine); }

static void expect(const char* what, long double actual, long double wanted) {
  if (fabsl(actual - wanted) <= 1e-12L * (1 + fabsl(wanted))) return;
  std::printf("%s: %.17Lg, expected %.17Lg\n", what, actual, wanted);
  std::exit(1);
}

static void run(int64_t groups, int64_t size, int64_t length, Kind kind, Reward reward, bool masked) {
  const int64_t rows = groups * size, n = rows * length;
  std::vector<double> logprobs(n), rewards(rows), advantages(rows), mean(groups), std(groups), batch(4);
  std::vector<double> scratch(2 * groups + 1);
  std::vector<uint8_t> mask(n);
  for (auto& x : logprobs) x = -3 * uniform();
  for (auto& m : mask) m = uniform() < 0.6;
  Problem p{};
  p.token_logprobs = logprobs.data(), p.mask = masked ? mask.data() : nullptr;
  p.rewards = rewards.data(), p.advantages = advantages.data(), p.mean = mean.data(), p.std = std.data();
  if (kind == Kind::latentr3) p.batch = batch.data(), p.scratch = scratch.data();
  p.row_stride = p.mask_row_stride = length, p.column_stride = p.mask_column_stride = 1;
  p.groups = groups, p.size = size, p.length = length, p.eps = 1e-4;
  p.dtype = Dtype::float64, p.kind = kind, p.reward = reward;
  group_advantage_host(p);

  long double clean = 0, norm = 0;
  std::vector<long double> wanted(rows);
  for (int64_t i = 0; i < rows; ++i) {
    long double total = 0, count = 0;
    for (int64_t s = 0; s < length; ++s)
      if (!masked || mask[i * length + s]) total += logprobs[i * length + s], count += 1;
    const long double average = total / (count < 1 ? 1 : count);
    wanted[i] = reward == Reward::given ? total : reward == Reward::log_likelihood ? average : -expl(-average);
    expect("reward", rewards[i], wanted[i]);
    if (i % size == 0) clean += wanted[i] / groups;
  }
  for (auto r : wanted) norm += (r - clean) * (r - clean);
  for (int64_t b = 0; b < groups; ++b) {
    long double m = 0, squares = 0;
    for (int64_t i = 0; i < size; ++i) m += wanted[b * size + i] / size;
    for (int64_t i = 0; i < size; ++i) squares += (wanted[b * size + i] - m) * (wanted[b * size + i] - m);
    const long double others = size > 1 ? size - 1 : 1, deviation = sqrtl(squares / others);
    expect("mean", mean[b], m);
    expect("std", std[b], deviation);
    for (int64_t i = 0; i < size; ++i) {
      const long double centred = wanted[b * size + i] - m;
      const long double advantage = kind == Kind::grpo     ? centred / (deviation + 1e-4L)
                                    : kind == Kind::rloo   ? centred * size / others
                                    : kind == Kind::dr_grpo ? centred
                                                            : (wanted[b * size + i] - clean) / (sqrtl(norm) + 1e-4L);
      expect("advantage", advantages[b * size + i], advantage);
    }
  }
}

int main() {
  int cases = 0;
  for (int64_t groups : {0, 1, 3, 17})
    for (int64_t size : {1, 2, 7, 33})
      for (int64_t length : {0, 1, 5, 31, 70})
        for (int kind = 0; kind < 4; ++kind)
          for (int reward = 0; reward < 2; ++reward)
            for (bool masked : {false, true}) run(groups, size, length, Kind(kind), Reward(reward), masked), ++cases;
  for (int kind = 0; kind < 4; ++kind) run(5, 3, 1, Kind(kind), Reward::given, false), ++cases;
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) {  // widening of every 16-bit float, against its fields
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double sign = bits & 0x8000 ? -1 : 1, value = widen(float16{uint16_t(bits)});
    if (exponent == 31 ? (fraction ? value == value : value != sign * HUGE_VAL)
                       : value != sign * std::ldexp(exponent ? 1024 + fraction : fraction, int(exponent ? exponent : 1) - 25)) {
      std::printf("float16 %04x: %g\n", bits, value);
      return 1;
    }
  }
  std::printf("%d cases\n", cases);
}
