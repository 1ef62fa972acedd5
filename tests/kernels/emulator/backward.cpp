// csrc/factor_attention_backward.cu on the emulator against sums in double. A line a case; the exit status is the
// number that failed. Arguments: users, tokens, columns, factors, whether dH is wanted, multiprocessors, percent of
// tokens kept, gain of logits; any number of such eights.
#include "cases.h"
#include "factor_attention_backward.cu"

using namespace flr;

namespace {

struct Case {
  int B, L, D, K, needs_dh, multiprocessors, keep, gain;
};

struct Data {
  int pitch;  // rows of h are apart by more than D
  std::vector<uint16_t> h, u;
  std::vector<uint8_t> mask;  // columns apart by 2
  std::vector<float> saved, grads;  // context, lse, overlap, entropy, one after the other
};

std::vector<double> doubles(const uint16_t* x, int count) {
  std::vector<double> out;
  for (int i = 0; i < count; ++i) out.push_back(widen16(x[i], false));
  return out;
}

Data make(const Case& c) {
  std::mt19937 random(unsigned(c.B + 7 * c.L + 31 * c.D + c.K));
  std::normal_distribution<float> normal;
  Data data{c.D + 8, {}, {}, {}, {}, {}};
  data.h.resize(size_t(c.B) * c.L * data.pitch), data.u.resize(size_t(c.B) * c.K * c.D);
  data.mask.resize(size_t(c.B) * c.L * 2);
  for (auto& x : data.h) x = narrow16(normal(random), false);
  for (auto& x : data.u) x = narrow16(normal(random) * float(c.gain) / std::sqrt(float(c.D)), false);
  for (int i = 0; i < c.B * c.L; ++i) {
    const bool empty = c.B > 1 && i / c.L == 1;  // user 1 has no valid token
    data.mask[2 * i] = !empty && int(random() % 100) < c.keep;
    for (int d = data.mask[2 * i] ? c.D : 0; d < data.pitch; ++d) data.h[size_t(i) * data.pitch + d] = 0x7fff;  // NaN
  }
  const size_t count = size_t(c.B) * c.K * (c.D + c.K + 2);
  data.saved.resize(count), data.grads.resize(count);
  for (auto& x : data.grads) x = normal(random);
  for (size_t i = 0; c.D > kExactColumns && i < size_t(c.B) * c.K * c.D; ++i)  // where the kernel rounds gradients of context
    data.grads[i] = widen16(narrow16(data.grads[i], false), false);
  return data;
}

// Where user b's context, lse, overlap and entropy are in `saved` and `grads`.
struct Places {
  size_t context, lse, overlap, entropy;
};
Places places(const Case& c, int b) {
  const size_t B = size_t(c.B), K = size_t(c.K), D = size_t(c.D), lse = B * K * D, overlap = lse + B * K;
  return {b * K * D, lse + b * K, overlap + b * K * K, overlap + B * K * K + b * K};
}

struct Expected {
  std::vector<std::vector<double>> dh, du;
};

// One user, by the formulas of ops/factor_attention/op.py; `saved` is filled in.
Expected expect(const Case& c, Data& data, int b) {
  const Places at = places(c, b);
  const int K = c.K, L = c.L, D = c.D;
  std::vector<std::vector<double>> h, u, a(K), logs(K);
  std::vector<int> valid;
  for (int l = 0; l < L; ++l) {
    if (!data.mask[2 * (size_t(b) * L + l)]) continue;
    valid.push_back(l), h.push_back(doubles(&data.h[(size_t(b) * L + l) * data.pitch], D));
  }
  const int n = int(valid.size());
  const float *dc = &data.grads[at.context], *d_overlap = &data.grads[at.overlap];
  for (int k = 0; k < K; ++k) {
    u.push_back(doubles(&data.u[(size_t(b) * K + k) * D], D));
    double top = -INFINITY, sum = 0, entropy = 0;
    for (int i = 0; i < n; ++i) {
      double s = 0;
      for (int d = 0; d < D; ++d) s += u[k][d] * h[i][d];
      logs[k].push_back(s), top = std::max(top, s);
    }
    for (double s : logs[k]) sum += std::exp(s - top);
    const float lse = n ? float(top + std::log(sum)) : -INFINITY;  // as the forward leaves it
    for (double& s : logs[k]) s -= top + std::log(sum), a[k].push_back(std::exp(s)), entropy -= a[k].back() * s;
    data.saved[at.lse + k] = lse, data.saved[at.entropy + k] = float(entropy);
    for (int d = 0; d < D; ++d) {
      double x = 0;
      for (int i = 0; i < n; ++i) x += a[k][i] * h[i][d];
      data.saved[at.context + size_t(k) * D + d] = float(x);
    }
  }
  for (int j = 0; j < K; ++j)
    for (int k = 0; k < K; ++k) {
      double x = 0;
      for (int i = 0; i < n; ++i) x += a[j][i] * a[k][i];
      data.saved[at.overlap + j * K + k] = float(x);
    }
  Expected out{std::vector<std::vector<double>>(L, std::vector<double>(D)),
               std::vector<std::vector<double>>(K, std::vector<double>(D))};
  for (int k = 0; k < K; ++k) {
    const double d_entropy = data.grads[at.entropy + k];
    std::vector<double> dp(n);
    double delta = -data.grads[at.lse + k];  // of the weights themselves, so that nothing depends on what is saved
    for (int i = 0; i < n; ++i) {
      for (int d = 0; d < D; ++d) dp[i] += dc[size_t(k) * D + d] * h[i][d];
      for (int j = 0; j < K; ++j) dp[i] += (d_overlap[k * K + j] + d_overlap[j * K + k]) * a[j][i];
      dp[i] -= d_entropy * logs[k][i];
      delta += a[k][i] * dp[i];
    }
    for (int i = 0; i < n; ++i) {
      const double ds = a[k][i] * (dp[i] - delta);
      for (int d = 0; d < D; ++d) {
        out.dh[valid[i]][d] += a[k][i] * dc[size_t(k) * D + d] + ds * u[k][d];
        out.du[k][d] += ds * h[i][d];
      }
    }
  }
  return out;
}

// The largest difference of a row, over its largest value; a bfloat16 result has 2^-9 of its own.
double error(const std::vector<double>& wanted, const uint16_t* got) {
  double worst = 0, largest = 1e-3;
  for (size_t d = 0; d < wanted.size(); ++d) {
    const double difference = std::fabs(widen16(got[d], false) - wanted[d]);
    if (!(difference <= worst)) worst = std::isnan(difference) ? INFINITY : difference;
    largest = std::max(largest, std::fabs(wanted[d]));
  }
  return worst / largest;
}

bool run(const Case& c) {
  Data data = make(c);
  const size_t B = size_t(c.B), L = size_t(c.L), K = size_t(c.K), D = size_t(c.D);
  std::vector<Expected> expected;
  for (int b = 0; b < c.B; ++b) expected.push_back(expect(c, data, b));
  std::vector<uint16_t> results[2];
  double worst_dh = 0, worst_du = 0;
  for (int i = 0; i < 2; ++i) {  // twice: the same bits
    auto& out = results[i];
    out.assign((L + K) * B * D, 0x7fff);
    const Places at = places(c, 0);
    AttentionProblem p{};
    p.h = data.h.data(), p.u = data.u.data(), p.mask = data.mask.data();
    p.context = &data.saved[at.context], p.lse = &data.saved[at.lse];
    p.overlap = &data.saved[at.overlap], p.entropy = &data.saved[at.entropy];
    p.h_b = int64_t(c.L) * data.pitch, p.h_l = data.pitch, p.u_b = c.K * c.D, p.u_k = c.D;
    p.mask_b = 2 * c.L, p.mask_l = 2, p.users = c.B, p.length = c.L, p.size = c.D, p.factors = c.K;
    AttentionGradients d{&data.grads[at.context], &data.grads[at.lse], &data.grads[at.overlap],
                         &data.grads[at.entropy], c.needs_dh ? &out[K * B * D] : nullptr, out.data()};
    if (const char* problem = factor_attention_backward_cuda(p, d, c.multiprocessors, nullptr)) emu::fail(problem);
    for (size_t b = 0; i == 0 && b < B; ++b) {
      for (size_t k = 0; k < K; ++k) worst_du = std::max(worst_du, error(expected[b].du[k], &out[(b * K + k) * D]));
      for (size_t l = 0; c.needs_dh && l < L; ++l)
        worst_dh = std::max(worst_dh, error(expected[b].dh[l], &out[(K * B + b * L + l) * D]));
    }
    if (emu::fault != 0) break;  // the first run shows it
  }
  const bool same = emu::fault != 0 || results[0] == results[1];
  const double bound = c.gain > 100 ? 8e-3 : 4e-3;  // ds of one token of weight 1 is a difference of large numbers
  const bool ok = same && worst_dh < bound && worst_du < bound;
  std::printf("%s B %d L %d D %d K %d dh %d multiprocessors %d keep %d gain %d: dh %.1e du %.1e%s\n",
              ok ? "ok  " : "FAIL", c.B, c.L, c.D, c.K, c.needs_dh, c.multiprocessors, c.keep, c.gain, worst_dh,
              worst_du, same ? "" : " runs differ");
  std::fflush(stdout);
  return ok;
}

}  // namespace

int main(int count, char** arguments) { return run_cases<Case>(run, count, arguments); }
