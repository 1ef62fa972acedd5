// Launches factor_attention.cuh, for the smallest number of columns that has room for the problem's.
#include <cuda_runtime.h>

#include "factor_attention.cuh"

namespace flr {
namespace {

constexpr int kMaxDevices = 64;

int multiprocessors[kMaxDevices];  // asked once; the caller holds Python's lock

template <class T, class C>
cudaError_t launch(const AttentionProblem& p, int device, cudaStream_t stream) {
  const auto kernel = factor_attention_forward<T, C>;
  static bool ready[kMaxDevices];
  if (!ready[device]) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit);
    if (error != cudaSuccess) return error;
    ready[device] = true;
  }
  const Task task{p, make_plan<C>(p, multiprocessors[device])};
  cudaLaunchAttribute cluster[1] = {};
  cluster[0].id = cudaLaunchAttributeClusterDimension;
  cluster[0].val.clusterDim.x = unsigned(task.plan.cluster);
  cluster[0].val.clusterDim.y = cluster[0].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(task.plan.grid)), config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(task.plan.shared_bytes), config.stream = stream;
  config.attrs = cluster, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, task);
}

template <class T>
cudaError_t launch(const AttentionProblem& p, int device, cudaStream_t stream) {
  if (p.size <= 1024) return launch<T, Columns<1024, 1024>>(p, device, stream);
  if (p.size <= 1536) return launch<T, Columns<1536, 1536>>(p, device, stream);
  if (p.size <= 2048) return launch<T, Columns<2048, 1024>>(p, device, stream);
  if (p.size <= 3072) return launch<T, Columns<3072, 1024>>(p, device, stream);
  if (p.factors <= 4) return launch<T, Columns<4096, 1024, 4>>(p, device, stream);
  return launch<T, Columns<4096, 512>>(p, device, stream);  // of 8 factors' queries and larger chunks no tile fits
}

cudaError_t start(const AttentionProblem& p, int device, cudaStream_t stream) {
  cudaError_t error = cudaSetDevice(device);  // of this library's own copy of the runtime
  if (error != cudaSuccess || p.users == 0 || p.factors == 0) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (multiprocessors[device] == 0) {
    error = cudaDeviceGetAttribute(&multiprocessors[device], cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
  }
  return p.is_half ? launch<Float16>(p, device, stream) : launch<Bfloat16>(p, device, stream);
}

}  // namespace

const char* factor_attention_cuda(const AttentionProblem& p, int device, void* stream) {
  const cudaError_t error = start(p, device, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace flr
