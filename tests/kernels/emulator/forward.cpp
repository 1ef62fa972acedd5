// csrc/factor_attention.cu on the emulator against sums in double. A line a case; the exit status is the number that
// failed. Arguments: users, tokens, columns, factors, half, multiprocessors, percent of tokens kept, gain of logits;
// any number of such eights.
#include "cases.h"
#include "factor_attention.cu"

using namespace flr;

namespace {

struct Case {
  int B, L, D, K, half, multiprocessors, keep, gain;
};

struct Data {
  int pitch;  // rows of h are apart by more than D
  std::vector<uint16_t> h, u;
  std::vector<uint8_t> mask;  // columns apart by 2
  double value(const Case& c, int b, int l, int d) const {
    return widen16(h[(size_t(b) * c.L + l) * pitch + d], c.half);
  }
};

Data make(const Case& c) {
  std::mt19937 random(unsigned(c.B + 7 * c.L + 31 * c.D + c.K));
  std::normal_distribution<float> normal;
  Data data{c.D + 8, {}, {}, {}};
  data.h.resize(size_t(c.B) * c.L * data.pitch), data.u.resize(size_t(c.B) * c.K * c.D);
  data.mask.resize(size_t(c.B) * c.L * 2);
  for (auto& x : data.h) x = narrow16(normal(random), c.half);
  for (auto& x : data.u) x = narrow16(normal(random) * float(c.gain) / std::sqrt(float(c.D)), c.half);
  for (int i = 0; i < c.B * c.L; ++i) {
    const bool empty = c.B > 1 && i / c.L == 1;  // user 1 has no valid token
    data.mask[2 * i] = !empty && int(random() % 100) < c.keep;
    for (int d = data.mask[2 * i] ? c.D : 0; d < data.pitch; ++d) data.h[size_t(i) * data.pitch + d] = 0x7fff;  // NaN
  }
  return data;
}

struct Worst {
  double context = 0, lse = 0, overlap = 0, entropy = 0;
  void of(double& worst, double got, double wanted, double scale = 1) {
    const double error = std::fabs(got - wanted) / scale;
    if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
  }
};

// Errors of user b's results.
void compare(const Case& c, const Data& data, int b, const float* context, const float* lse, const float* overlap,
             const float* entropy, Worst& worst) {
  std::vector<std::vector<double>> weights;
  std::vector<int> valid;
  for (int l = 0; l < c.L; ++l)
    if (data.mask[2 * (size_t(b) * c.L + l)]) valid.push_back(l);
  for (int k = 0; k < c.K; ++k) {
    std::vector<double> s;
    double top = -INFINITY, sum = 0, wanted = 0;
    for (int l : valid) {
      double x = 0;
      const uint16_t* u = &data.u[(size_t(b) * c.K + k) * c.D];
      for (int d = 0; d < c.D; ++d) x += data.value(c, b, l, d) * widen16(u[d], c.half);
      s.push_back(x), top = std::max(top, x);
    }
    for (double& x : s) sum += std::exp(x - top);
    const double expected = top + std::log(sum);
    for (double& x : s) {
      const double log_weight = x - expected;
      x = std::exp(log_weight), wanted -= x * log_weight;
    }
    if (valid.empty()) {
      if (lse[k] != -INFINITY) worst.lse = INFINITY;
    } else {
      worst.of(worst.lse, lse[k], expected, 1 + std::fabs(expected));
    }
    worst.of(worst.entropy, entropy[k], wanted);
    for (int d = 0; d < c.D; ++d) {
      double x = 0;
      for (size_t i = 0; i < valid.size(); ++i) x += s[i] * data.value(c, b, valid[i], d);
      worst.of(worst.context, context[size_t(k) * c.D + d], x);
    }
    weights.push_back(s);
  }
  for (int j = 0; j < c.K; ++j)
    for (int k = 0; k < c.K; ++k) {
      double x = 0;
      for (size_t i = 0; i < valid.size(); ++i) x += weights[j][i] * weights[k][i];
      worst.of(worst.overlap, overlap[j * c.K + k], x);
    }
}

bool run(const Case& c) {
  const Data data = make(c);
  const size_t B = size_t(c.B), K = size_t(c.K), D = size_t(c.D);
  std::vector<float> results[2];
  Worst worst;
  for (int i = 0; i < 2; ++i) {  // first to last, last to first: the same bits
    auto& out = results[i];
    out.assign(B * K * (D + K + 2), NAN);
    AttentionProblem p{};
    p.h = data.h.data(), p.u = data.u.data(), p.mask = data.mask.data();
    p.context = out.data(), p.lse = p.context + B * K * D, p.entropy = p.lse + B * K, p.overlap = p.entropy + B * K;
    p.h_b = int64_t(c.L) * data.pitch, p.h_l = data.pitch, p.u_b = c.K * c.D, p.u_k = c.D;
    p.mask_b = 2 * c.L, p.mask_l = 2, p.users = c.B, p.length = c.L;
    p.size = c.D, p.factors = c.K, p.is_half = c.half, p.last_first = i == 1;
    if (const char* error = factor_attention_cuda(p, c.multiprocessors, nullptr)) emu::fail(error);
    for (size_t b = 0; i == 0 && b < B; ++b)
      compare(c, data, int(b), p.context + b * K * D, p.lse + b * K, p.overlap + b * K * K, p.entropy + b * K, worst);
    if (emu::fault != 0) break;  // the first run shows it
  }
  const bool same = emu::fault != 0 || memcmp(results[0].data(), results[1].data(), results[0].size() * 4) == 0;
  const bool ok = same && worst.context < 5e-5 && worst.lse < 2e-6 && worst.overlap < 2e-5 && worst.entropy < 1e-4;
  std::printf("%s B %d L %d D %d K %d half %d multiprocessors %d keep %d gain %d: context %.1e lse %.1e overlap %.1e "
              "entropy %.1e%s\n", ok ? "ok  " : "FAIL", c.B, c.L, c.D, c.K, c.half, c.multiprocessors, c.keep, c.gain,
              worst.context, worst.lse, worst.overlap, worst.entropy, same ? "" : " order matters");
  std::fflush(stdout);
  return ok;
}

}  // namespace

int main(int count, char** arguments) { return run_cases<Case>(run, count, arguments); }
