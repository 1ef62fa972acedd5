// Launches factor_attention.cuh, for the smallest number of columns that has room for the problem's.
#include <cuda_runtime.h>

#include "factor_attention.cuh"

namespace flr {
namespace {

constexpr int kMaxDevices = 64;

cudaLaunchConfig_t configure(cudaLaunchAttribute* attribute, int64_t grid, int cluster, int shared_bytes,
                             cudaStream_t stream) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = unsigned(cluster);
  attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid)), config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(shared_bytes), config.stream = stream;
  config.attrs = attribute, config.numAttrs = 1;
  return config;
}

// Asks a device, and tells it what the kernel needs.
template <class Kernel>
cudaError_t prepare(Kernel kernel, int device, Room* room) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&room->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  bool allowed = true;
  for (int i = 0; i < 4; ++i) {
    const int cluster = 2 << i;
    cudaLaunchAttribute attribute = {};
    const cudaLaunchConfig_t config = configure(&attribute, cluster, cluster, kSharedLimit, nullptr);
    if (cluster > 8)  // more than every device of this compute capability has to run
      allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
    if (!allowed || cudaOccupancyMaxActiveClusters(&room->clusters[i], kernel, &config) != cudaSuccess) {
      room->clusters[i] = 0;
      cudaGetLastError();  // nobody else's
    }
  }
  return cudaSuccess;
}

template <class T, class C>
cudaError_t launch(const AttentionProblem& p, int device, cudaStream_t stream) {
  const auto kernel = factor_attention_forward<T, C>;
  static Room rooms[kMaxDevices];  // the caller holds Python's lock
  Room& room = rooms[device];
  if (room.multiprocessors == 0) {
    Room found{};
    const cudaError_t error = prepare(kernel, device, &found);
    if (error != cudaSuccess) return error;
    room = found;
  }
  const Task task{p, make_plan<C>(p, room)};
  cudaLaunchAttribute attribute = {};
  const cudaLaunchConfig_t config =
      configure(&attribute, task.plan.grid, task.plan.cluster, task.plan.shared_bytes, stream);
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
