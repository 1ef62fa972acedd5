// The host twin of group_advantage.cu: the same core, one thread.
#include "group_advantage.cuh"

namespace flr {
namespace {

struct Thread {
  int rank() const { return 0; }
  int size() const { return 1; }
  int width() const { return 1; }
  int lane() const { return 0; }
  int segment() const { return 0; }
  int segments() const { return 1; }
  double segment_sum(double x) const { return x; }
  double sum(double x) const { return x; }
  void sync() const {}
};

template <class T>
void run(const Problem& p) {
  using Acc = typename accumulator<T>::type;
  const Thread thread;
  for (int64_t b = 0; b < p.groups; ++b) group<T>(thread, p, b);
  if (p.kind != Kind::latentr3) return;
  const Partial partial = batch_partial<T>(thread, p);
  memcpy(p.batch, &partial, sizeof partial);
  const Scale scale = batch_scale(thread, &partial, 1, p.size, p.eps);
  batch_advantages(static_cast<const Acc*>(p.rewards), static_cast<Acc*>(p.advantages), scale, 0, 1, p.groups * p.size);
}

template <class Acc>
void run(const BatchProblem& p) {
  const auto* partials = reinterpret_cast<const Partial*>(p.partials);
  const Scale scale = batch_scale(Thread{}, partials, p.processes, p.size, p.eps);
  batch_advantages(static_cast<const Acc*>(p.rewards), static_cast<Acc*>(p.advantages), scale, 0, 1, p.groups * p.size);
}

}  // namespace

void group_advantage_host(const Problem& problem) {
  switch (problem.dtype) {
    case Dtype::float32: return run<float>(problem);
    case Dtype::float64: return run<double>(problem);
    case Dtype::bfloat16: return run<bfloat16>(problem);
    case Dtype::float16: return run<float16>(problem);
  }
}

void batch_advantage_host(const BatchProblem& problem) {
  if (problem.is_double) return run<double>(problem);
  run<float>(problem);
}

}  // namespace flr
