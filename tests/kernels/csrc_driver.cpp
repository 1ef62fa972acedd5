// Runs the host twin over awkward sizes under the sanitizers (tests/kernels/test_csrc.py): buffers of exactly the right
// size, results against plain loops in long double. Exit status 1 and a line on the first difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/group_advantage.cuh"
#include "../../csrc/log_normaliser.h"

using namespace flr;

static std::mt19937_64 engine(1);
static double uniform() { return std::uniform_real_distribution<double>(0, 1)(engine); }

static void expect(const char* what, long double actual, long double wanted) {
  if (fabsl(actual - wanted) <= 1e-12L * (1 + fabsl(wanted))) return;
  std::printf("%s: %.17Lg, expected %.17Lg\n", what, actual, wanted);
  std::exit(1);
}

// A team of real threads, standing in for a warp or a block: who does what, and that all meet at every sum.
struct Meeting {
  explicit Meeting(int n) : size(n), slots(n) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const int64_t mine = phase;
    if (++arrived == size) {
      arrived = 0, ++phase;
      condition.notify_all();
    } else {
      condition.wait(lock, [&] { return phase != mine; });
    }
  }
  const int size;
  std::vector<double> slots;
  std::mutex mutex;
  std::condition_variable condition;
  int arrived = 0;
  int64_t phase = 0;
};

struct Member {
  Meeting* meeting;
  int rank_, width_;
  int rank() const { return rank_; }
  int size() const { return meeting->size; }
  int width() const { return width_; }
  int lane() const { return rank_ % width_; }
  int segment() const { return rank_ / width_; }
  int segments() const { return meeting->size / width_; }
  double sum_of(double x, int first, int count) const {
    meeting->slots[rank_] = x;
    meeting->wait();
    double total = 0;
    for (int i = first; i < first + count; ++i) total += meeting->slots[i];
    meeting->wait();
    return total;
  }
  double segment_sum(double x) const { return sum_of(x, segment() * width_, width_); }
  double sum(double x) const { return sum_of(x, 0, meeting->size); }
  void sync() const { meeting->wait(); }
};

static void run_team(const Problem& p, int size, int width) {
  Meeting meeting(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      const Member member{&meeting, rank, width};
      for (int64_t b = 0; b < p.groups; ++b) group<double>(member, p, b);
      if (p.kind != Kind::latentr3) return;
      member.sync();
      const Partial partial = batch_partial<double>(member, p);
      const Scale scale = batch_scale(member, &partial, 1, p.size, p.eps);
      batch_advantages(static_cast<const double*>(p.rewards), static_cast<double*>(p.advantages), scale, rank, size,
                       p.groups * p.size);
    });
  for (auto& thread : threads) thread.join();
}

static void run(int64_t groups, int64_t size, int64_t length, Kind kind, Reward reward, bool masked, int team = 1,
                int width = 1) {
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
  if (team == 1) group_advantage_host(p);
  else run_team(p, team, width);

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

static void normaliser(int64_t rows, int64_t size, int64_t stride) {
  std::vector<float> logits(rows > 0 ? (rows - 1) * stride + size : 0), out(rows);
  for (float& x : logits) x = float(40 * uniform() - 20);
  if (rows > 0 && size > 2) logits[size / 2] = -INFINITY, logits[size - 1] = 1e4f;
  log_normaliser_host(logits.data(), rows, size, stride, out.data());
  for (int64_t row = 0; row < rows; ++row) {
    long double top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < size; ++i) top = std::max(top, (long double)logits[row * stride + i]);
    for (int64_t i = 0; i < size; ++i) sum += expl(logits[row * stride + i] - top);
    const long double wanted = top + logl(sum);
    if (fabsl(out[row] - wanted) > 1e-6L * (1 + fabsl(wanted))) expect("log_normaliser", out[row], wanted);
  }
}

int main() {
  int cases = 0;
  for (int64_t size : {1, 2, 15, 16, 17, 63, 64, 65, 2047, 2048, 2049, 5000})
    for (int64_t rows : {0, 1, 3})
      for (int64_t gap : {0, 5}) normaliser(rows, size, size + gap), ++cases;
  for (int64_t groups : {0, 1, 3, 17})
    for (int64_t size : {1, 2, 7, 33})
      for (int64_t length : {0, 1, 5, 31, 70})
        for (int kind = 0; kind < 4; ++kind)
          for (int reward = 0; reward < 2; ++reward)
            for (bool masked : {false, true}) run(groups, size, length, Kind(kind), Reward(reward), masked), ++cases;
  for (int kind = 0; kind < 4; ++kind) run(5, 3, 1, Kind(kind), Reward::given, false), ++cases;
  for (int width : {1, 2, 8})
    for (int64_t size : {1, 5, 33})
      for (int64_t length : {1, 7, 40})
        for (int kind : {0, 3}) run(3, size, length, Kind(kind), Reward::neg_perplexity, true, 8, width), ++cases;
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
