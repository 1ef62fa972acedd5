// Launches factor_attention.cuh, for the smallest number of columns that has room for the problem's.
#include "factor_attention.cuh"
#include "factor_attention_launch.cuh"

namespace flr {
namespace {

template <class T, class C>
cudaError_t launch(const AttentionProblem& p, int device, cudaStream_t stream) {
  static Room rooms[kMaxDevices];  // the caller holds Python's lock
  return launch_kernel(factor_attention_forward<T, C>, rooms[device], device, stream,
                       [&](const Room& room) { return Task{p, make_plan<C>(p, room)}; });
}

template <class T>
cudaError_t launch(const AttentionProblem& p, int device, cudaStream_t stream) {
  if (p.factors > 8) {
    if (p.size <= 1024) return launch<T, Columns<1024, 1024, 16>>(p, device, stream);
    if (p.size <= 2048) return launch<T, Columns<2048, 1024, 16>>(p, device, stream);
    return launch<T, Columns<2048, 1024, 16, 4>>(p, device, stream);
  }
  if (p.size <= 1024) return launch<T, Columns<1024, 1024>>(p, device, stream);
  if (p.size <= 1536) return launch<T, Columns<1536, 1536>>(p, device, stream);
  if (p.size <= 2048) return launch<T, Columns<2048, 1024>>(p, device, stream);
  if (p.size <= 3072) return launch<T, Columns<3072, 1024>>(p, device, stream);
  // of 8 factors' queries and larger chunks no tile fits
  if (p.size <= 4096 && p.factors > 4) return launch<T, Columns<4096, 512>>(p, device, stream);
  if (p.size <= 4096) return launch<T, Columns<4096, 1024, 4>>(p, device, stream);
  if (p.factors > 4) return launch<T, Columns<4096, 512, 8, 2>>(p, device, stream);
  return launch<T, Columns<4096, 1024, 4, 2>>(p, device, stream);
}

cudaError_t start(const AttentionProblem& p, int device, cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);  // of this library's own copy of the runtime
  if (error != cudaSuccess || p.users == 0 || p.factors == 0) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  return p.is_half ? launch<Float16>(p, device, stream) : launch<Bfloat16>(p, device, stream);
}

}  // namespace

const char* factor_attention_cuda(const AttentionProblem& p, int device, void* stream) {
  const cudaError_t error = start(p, device, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace flr
