// Python's way in. No torch headers: a tensor comes as a tuple (address, dtype, device, shape, strides, bytes), with -1
// for the CPU's device and `bytes` what its storage holds from the address on. Everything is checked before it is read.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "factor_attention.h"
#include "group_advantage.cuh"
#include "log_normaliser.h"

namespace py = pybind11;
using namespace flr;

namespace {

using Sizes = std::vector<int64_t>;
using View = std::tuple<uintptr_t, std::string, int, Sizes, Sizes, int64_t>;

[[noreturn]] void refuse(const std::string& name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(name + ": expected " + expected + ", got " + got);
}

std::string text(const Sizes& sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + "]";
}

int64_t times(const std::string& name, int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product))
    refuse(name, "sizes below 2^63", std::to_string(a) + " x " + std::to_string(b));
  return product;
}

struct Array {
  void* data;
  std::string dtype;
  int64_t item;
  Sizes shape, strides;
};

int64_t item_size(const std::string& name, const std::string& dtype) {
  if (dtype == "float64") return 8;
  if (dtype == "float32") return 4;
  if (dtype == "bfloat16" || dtype == "float16") return 2;
  if (dtype == "bool") return 1;
  refuse(name, "float32, float64, bfloat16, float16 or bool", dtype);
}

// The view, if all its elements lie inside the storage and on the device.
Array check(const std::string& name, const View& view, int device, const Sizes& shape, const std::string& dtype = "") {
  const auto& [address, actual, place, sizes, strides, bytes] = view;
  if (!dtype.empty() && actual != dtype) refuse(name, dtype, actual);
  if (place != device) refuse(name, "device " + std::to_string(device), std::to_string(place));
  if (sizes != shape) refuse(name, "shape " + text(shape), text(sizes));
  if (strides.size() != sizes.size()) refuse(name, "a stride for every size", text(strides));
  const int64_t item = item_size(name, actual);
  int64_t last = 0;
  bool is_empty = false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] < 0 || strides[i] < 0) refuse(name, "sizes and strides >= 0", text(sizes) + " " + text(strides));
    is_empty = is_empty || sizes[i] == 0;
    if (!is_empty && __builtin_add_overflow(last, times(name, sizes[i] - 1, strides[i]), &last))
      refuse(name, "sizes below 2^63", text(sizes));
  }
  if (!is_empty) {
    if (last == std::numeric_limits<int64_t>::max() || times(name, last + 1, item) > bytes)
      refuse(name, std::to_string(last) + " elements and one more within its storage",
             std::to_string(bytes) + " bytes");
    if (address == 0 || address % uintptr_t(item)) refuse(name, "an aligned address", std::to_string(address));
  }
  return {reinterpret_cast<void*>(address), actual, item, sizes, strides};
}

Array contiguous(const std::string& name, const View& view, int device, const Sizes& shape, const std::string& dtype) {
  Array array = check(name, view, device, shape, dtype);
  int64_t expected = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    if (shape[i] > 1 && array.strides[i] != expected)
      refuse(name, "a contiguous tensor", "strides " + text(array.strides));
    expected = times(name, expected, shape[i] > 0 ? shape[i] : 1);
  }
  return array;
}

template <class Enum>
Enum choose(const char* name, const std::string& value, const std::vector<std::string>& names) {
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i] == value) return Enum(int(i));
  refuse(name, "a known name", value);
}

void raise_if(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}

void check_device(int device, int64_t group_size) {
  if (device < -1) refuse("device", "-1 or a device index", std::to_string(device));
  if (group_size < 1) refuse("group_size", "at least 1", std::to_string(group_size));
#ifndef FLR_CUDA
  if (device >= 0) refuse("device", "-1: this build has no CUDA half", std::to_string(device));
#endif
}

void group_advantage(const View& token_logprobs, const std::optional<View>& mask, const View& rewards,
                     const View& advantages, const View& mean, const View& std, const std::optional<View>& batch,
                     const std::optional<View>& scratch, int64_t group_size, const std::string& kind,
                     const std::string& reward, double eps, int device, uintptr_t stream) {
  check_device(device, group_size);
  Problem p{};
  p.kind = choose<Kind>("kind", kind, {"grpo", "dr_grpo", "rloo", "latentr3"});
  p.reward = choose<Reward>("reward", reward, {"neg_perplexity", "log_likelihood", "given"});
  const Sizes& sizes = std::get<3>(token_logprobs);
  const bool given = p.reward == Reward::given;
  if (sizes.size() != (given ? 1u : 2u)) refuse("token_logprobs", given ? "[BG]" : "[BG, S]", text(sizes));
  const Array logprobs = check("token_logprobs", token_logprobs, device, sizes);
  p.dtype = choose<Dtype>("token_logprobs", logprobs.dtype, {"float32", "float64", "bfloat16", "float16"});
  if (sizes[0] % group_size)
    refuse("group_size", "a divisor of " + std::to_string(sizes[0]), std::to_string(group_size));
  p.groups = sizes[0] / group_size, p.size = group_size, p.length = given ? 1 : sizes[1], p.eps = eps;
  times("token_logprobs", times("token_logprobs", sizes[0], p.length > 0 ? p.length : 1), 16);
  p.token_logprobs = logprobs.data, p.row_stride = logprobs.strides[0];
  p.column_stride = given ? 0 : logprobs.strides[1];
  if (mask.has_value()) {
    if (given) refuse("mask", "None for given rewards", "a tensor");
    const Array valid = check("mask", *mask, device, sizes, "bool");
    p.mask = static_cast<const uint8_t*>(valid.data);
    p.mask_row_stride = valid.strides[0], p.mask_column_stride = valid.strides[1];
    static const uint8_t nothing = 0;  // an empty mask is still a mask
    if (p.mask == nullptr) p.mask = &nothing;
  }
  const std::string acc = p.dtype == Dtype::float64 ? "float64" : "float32";
  p.rewards = contiguous("rewards", rewards, device, {p.groups, p.size}, acc).data;
  p.advantages = contiguous("advantages", advantages, device, {p.groups, p.size}, acc).data;
  p.mean = contiguous("mean", mean, device, {p.groups}, acc).data;
  p.std = contiguous("std", std, device, {p.groups}, acc).data;
  if (batch.has_value() != (p.kind == Kind::latentr3) || scratch.has_value() != batch.has_value())
    refuse("batch and scratch", "tensors for latentr3 only", kind);
  if (batch.has_value()) {
    p.batch = static_cast<double*>(contiguous("batch", *batch, device, {4}, "float64").data);
    p.scratch = static_cast<double*>(contiguous("scratch", *scratch, device, {2 * p.groups + 1}, "float64").data);
  }
  if (device < 0) return group_advantage_host(p);
#ifdef FLR_CUDA
  raise_if(group_advantage_cuda(p, device, reinterpret_cast<void*>(stream)));
#endif
}

void batch_advantage(const View& rewards, const View& partials, const View& advantages, double eps, int device,
                     uintptr_t stream) {
  const Sizes& sizes = std::get<3>(rewards);
  if (sizes.size() != 2) refuse("rewards", "[B, G]", text(sizes));
  check_device(device, sizes[1]);
  BatchProblem p{};
  const Array values = check("rewards", rewards, device, sizes);
  const Sizes& table = std::get<3>(partials);
  if (table.size() != 2 || table[1] != 4) refuse("partials", "[P, 4]", text(table));
  if (values.dtype != "float32" && values.dtype != "float64") refuse("rewards", "float32 or float64", values.dtype);
  p.rewards = contiguous("rewards", rewards, device, sizes, values.dtype).data;
  p.partials = static_cast<double*>(contiguous("partials", partials, device, table, "float64").data);
  p.advantages = contiguous("advantages", advantages, device, sizes, values.dtype).data;
  p.groups = sizes[0], p.size = sizes[1], p.processes = table[0], p.eps = eps, p.is_double = values.dtype == "float64";
  times("rewards", times("rewards", p.groups, p.size), 16);
  if (device < 0) return batch_advantage_host(p);
#ifdef FLR_CUDA
  raise_if(batch_advantage_cuda(p, device, reinterpret_cast<void*>(stream)));
#endif
}

void log_normaliser(const View& logits, const View& out, int device, uintptr_t) {
  if (device != -1) refuse("device", "-1: this has no CUDA half", std::to_string(device));
  const Sizes& sizes = std::get<3>(logits);
  if (sizes.size() != 2 || sizes[1] < 1) refuse("logits", "[R, V] with V >= 1", text(sizes));
  const Array rows = check("logits", logits, device, sizes, "float32");
  if (sizes[1] > 1 && rows.strides[1] != 1)
    refuse("logits", "a contiguous last dimension", "strides " + text(rows.strides));
  float* result = static_cast<float*>(contiguous("out", out, device, {sizes[0]}, "float32").data);
  log_normaliser_host(static_cast<const float*>(rows.data), sizes[0], sizes[1], rows.strides[0], result);
}

// Rows of `array` [.., .., size] as the kernel's 16-byte copies need them.
void check_rows(const std::string& name, const Array& array) {
  if (array.strides[2] != 1 && array.shape[2] > 1)
    refuse(name, "a contiguous last dimension", "strides " + text(array.strides));
  const auto address = reinterpret_cast<uintptr_t>(array.data);
  for (int i = 0; i < 2; ++i)
    if (address % 16 || (array.shape[i] > 1 && array.strides[i] % 8))
      refuse(name, "rows at multiples of 16 bytes", std::to_string(address) + ", strides " + text(array.strides));
}

// Addresses of context, lse, overlap and entropy of a problem [B, K, D], or of their gradients.
void attention_results(const std::string& prefix, const std::vector<View>& views, const Sizes& sizes, int device,
                       float** (&places)[4]) {
  const std::string names[] = {prefix + "context", prefix + "lse", prefix + "overlap", prefix + "entropy"};
  const Sizes scalars{sizes[0], sizes[1]}, shapes[] = {sizes, scalars, {sizes[0], sizes[1], sizes[1]}, scalars};
  if (views.size() != 4) refuse(prefix + "context", "four tensors", std::to_string(views.size()));
  for (size_t i = 0; i < 4; ++i)
    *places[i] = static_cast<float*>(contiguous(names[i], views[i], device, shapes[i], "float32").data);
  if (reinterpret_cast<uintptr_t>(*places[0]) % 16) refuse(names[0], "an address that 16 divides", "another");
}

// What both directions of factor_attention are given; `results` are the forward's, of which the backward reads.
AttentionProblem attention_problem(const View& h, const View& u, const std::optional<View>& mask,
                                   const std::vector<View>& results, int max_factors, int step, int device) {
#ifdef FLR_SM90A
  if (device < 0) refuse("device", "a device index: this has no host twin", std::to_string(device));
#else
  refuse("device", "none: this build has no code for compute capability 9.0", std::to_string(device));
#endif
  const Sizes &sizes = std::get<3>(h), &queries = std::get<3>(u);
  if (sizes.size() != 3 || sizes[1] < 1) refuse("h", "[B, L, D] with L >= 1", text(sizes));
  const int64_t users = sizes[0], size = sizes[2];
  if (size < step || size > kMaxColumns || size % step) {
    const std::string least = std::to_string(step);
    refuse("h", "D a multiple of " + least + " from " + least + " to " + std::to_string(kMaxColumns), text(sizes));
  }
  if (users > kMaxUsers || sizes[1] > kMaxTokens) refuse("h", "at most 2^27 users of 2^30 tokens", text(sizes));
  if (queries.size() != 3 || queries[1] < 1 || queries[1] > max_factors)
    refuse("u", "[B, K, D] with K from 1 to " + std::to_string(max_factors), text(queries));
  const int64_t factors = queries[1];
  const Array history = check("h", h, device, sizes);
  const Array query = check("u", u, device, {users, factors, size}, history.dtype);
  if (history.dtype != "bfloat16" && history.dtype != "float16") refuse("h", "bfloat16 or float16", history.dtype);
  check_rows("h", history);
  check_rows("u", query);
  AttentionProblem p{};
  p.h = history.data, p.h_b = history.strides[0], p.h_l = history.strides[1];
  p.u = query.data, p.u_b = query.strides[0], p.u_k = query.strides[1];
  if (mask.has_value()) {
    const Array valid = check("mask", *mask, device, {users, sizes[1]}, "bool");
    p.mask = static_cast<const uint8_t*>(valid.data), p.mask_b = valid.strides[0], p.mask_l = valid.strides[1];
  }
  float** places[4] = {&p.context, &p.lse, &p.overlap, &p.entropy};
  attention_results("", results, {users, factors, size}, device, places);
  p.users = users, p.length = sizes[1], p.size = int(size), p.factors = int(factors);
  p.is_half = history.dtype == "float16";
  return p;
}

void factor_attention(const View& h, const View& u, const std::optional<View>& mask, const View& context,
                      const View& lse, const View& overlap, const View& entropy, bool last_first, int device,
                      uintptr_t stream) {
  AttentionProblem p = attention_problem(h, u, mask, {context, lse, overlap, entropy}, kMaxFactors, kColumnStep, device);
  p.last_first = last_first;
#ifdef FLR_SM90A
  raise_if(factor_attention_cuda(p, device, reinterpret_cast<void*>(stream)));
#else
  (void)stream;
#endif
}

// `results` and `gradients`: context, lse, overlap, entropy. `dh` may be None.
void factor_attention_backward(const View& h, const View& u, const std::optional<View>& mask,
                               const std::vector<View>& results, const std::vector<View>& gradients,
                               const std::optional<View>& dh, const View& du, int device, uintptr_t stream) {
  const AttentionProblem p = attention_problem(h, u, mask, results, kGradientFactors, kGradientStep, device);
  if (p.is_half) refuse("h", "bfloat16", "float16");
  AttentionGradients d{};
  float* found[4];
  float** places[4] = {&found[0], &found[1], &found[2], &found[3]};
  attention_results("d_", gradients, {p.users, p.factors, p.size}, device, places);
  d.context = found[0], d.lse = found[1], d.overlap = found[2], d.entropy = found[3];
  const auto result = [&](const char* name, const View& view, const Sizes& shape) {
    const Array array = contiguous(name, view, device, shape, "bfloat16");
    if (reinterpret_cast<uintptr_t>(array.data) % 16) refuse(name, "an address that 16 divides", "another");
    return array.data;
  };
  if (dh.has_value()) d.dh = result("dh", *dh, {p.users, p.length, p.size});
  d.du = result("du", du, {p.users, p.factors, p.size});
#ifdef FLR_SM90A
  raise_if(factor_attention_backward_cuda(p, d, device, reinterpret_cast<void*>(stream)));
#else
  (void)stream;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled half of flr_kernels; see csrc/ and flr_kernels/backends/extension.py.";
  module.attr("source_hash") = FLR_SOURCE_HASH;
  module.attr("architectures") = FLR_ARCHITECTURES;  // "8.0 9.0 12.0+PTX"; empty without the CUDA half
#ifdef FLR_SM90A
  module.attr("has_factor_attention") = true;  // for compute capability 9.0 exactly
#else
  module.attr("has_factor_attention") = false;
#endif
  module.def("factor_attention", &factor_attention);
  module.def("factor_attention_backward", &factor_attention_backward);
  module.def("group_advantage", &group_advantage);
  module.def("batch_advantage", &batch_advantage);
  module.def("log_normaliser", &log_normaliser);
#ifdef FLR_CUDA
  module.def("driver_problem", [] {
    const char* problem = driver_problem();
    return problem == nullptr ? std::optional<std::string>() : problem;
  });
#endif
}
