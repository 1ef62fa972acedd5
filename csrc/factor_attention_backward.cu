// Launches factor_attention_backward.cuh, for the smallest number of columns that has room for the problem's.
#include "factor_attention_backward.cuh"
#include "factor_attention_launch.cuh"

namespace flr {
namespace {

template <class C>
cudaError_t launch(const AttentionProblem& p, const AttentionGradients& d, int device, cudaStream_t stream) {
  static Room rooms[kMaxDevices];  // the caller holds Python's lock
  return launch_kernel(factor_attention_backward<C>, rooms[device], device, stream,
                       [&](const Room& room) { return GradientTask{p, d, make_gradient_plan<C>(p, room)}; });
}

cudaError_t start(const AttentionProblem& p, const AttentionGradients& d, int device, cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);  // of this library's own copy of the runtime
  if (error != cudaSuccess || p.users == 0 || p.factors == 0) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (p.size <= 1024) return launch<GradientColumns<1024, 512, 16>>(p, d, device, stream);
  if (p.size <= 1536) return launch<GradientColumns<1536, 768, 16>>(p, d, device, stream);
  if (p.size <= kExactColumns) return launch<GradientColumns<kExactColumns, 1024, 16>>(p, d, device, stream);
  if (p.size <= 3072) return launch<GradientColumns<3072, 1024, 8>>(p, d, device, stream);
  if (p.size <= 4096) return launch<GradientColumns<4096, 1024, 8>>(p, d, device, stream);
  return launch<GradientColumns<4096, 1024, 8, 2>>(p, d, device, stream);
}

}  // namespace

const char* factor_attention_backward_cuda(const AttentionProblem& p, const AttentionGradients& d, int device,
                                           void* stream) {
  const cudaError_t error = start(p, d, device, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace flr
