// Launches a kernel of factor_attention; for its two sources.
#pragma once
#include <cuda_runtime.h>

#include "factor_attention_producer.cuh"

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
  for (int cluster = 2; cluster <= kMaxCluster; ++cluster) {
    cudaLaunchAttribute attribute = {};
    const cudaLaunchConfig_t config = configure(&attribute, cluster, cluster, kSharedLimit, nullptr);
    if (cluster > 8)  // more than every device of this compute capability has to run
      allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
    if (!allowed || cudaOccupancyMaxActiveClusters(&room->clusters[cluster], kernel, &config) != cudaSuccess) {
      room->clusters[cluster] = 0;
      cudaGetLastError();  // nobody else's
    }
  }
  return cudaSuccess;
}

// Finds the device's room at the first call, and launches kernel(make_task(room)).
template <class Kernel, class Make>
cudaError_t launch_kernel(Kernel kernel, Room& room, int device, cudaStream_t stream, const Make& make_task) {
  if (room.multiprocessors == 0) {
    Room found{};
    const cudaError_t error = prepare(kernel, device, &found);
    if (error != cudaSuccess) return error;
    room = found;
  }
  const auto task = make_task(room);
  cudaLaunchAttribute attribute = {};
  const cudaLaunchConfig_t config =
      configure(&attribute, task.plan.grid, task.plan.cluster, task.plan.shared_bytes, stream);
  return cudaLaunchKernelEx(&config, kernel, task);
}

}  // namespace
}  // namespace flr
