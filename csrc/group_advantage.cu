// One launch from token log-probabilities to advantages: a warp a group where groups are small, else a block.
//
// latentr3 looks at the whole batch. The block that finishes last (an integer counter) reads every group's statistics,
// sums them in fixed order and writes the advantages; a small batch runs in one block and needs no counter.
#include <cuda_runtime.h>

#include "group_advantage.cuh"

namespace flr {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kMaxGrid = 1 << 20;

__device__ __forceinline__ double shuffle_sum(double x, int width) {
  for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

struct Warp {
  int width_;
  __device__ int rank() const { return threadIdx.x % 32; }
  __device__ int size() const { return 32; }
  __device__ int width() const { return width_; }
  __device__ int lane() const { return rank() % width_; }
  __device__ int segment() const { return rank() / width_; }
  __device__ int segments() const { return 32 / width_; }
  __device__ double segment_sum(double x) const { return shuffle_sum(x, width_); }
  __device__ double sum(double x) const { return shuffle_sum(x, 32); }
  __device__ void sync() const { __syncwarp(); }
};

struct Block {
  double* buffer;  // shared, one a warp
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ int width() const { return 32; }
  __device__ int lane() const { return threadIdx.x % 32; }
  __device__ int segment() const { return threadIdx.x / 32; }
  __device__ int segments() const { return blockDim.x / 32; }
  __device__ double segment_sum(double x) const { return shuffle_sum(x, 32); }
  __device__ double sum(double x) const {
    x = shuffle_sum(x, 32);
    if (lane() == 0) buffer[segment()] = x;
    __syncthreads();
    double total = 0;
    for (int w = 0; w < segments(); ++w) total += buffer[w];
    __syncthreads();  // buffer may be written again
    return total;
  }
  __device__ void sync() const { __syncthreads(); }
};

// Whether this block is the last of the grid to get here; then it sees what all others have written.
__device__ bool is_last_block(unsigned* counter) {
  __shared__ bool last;
  if (gridDim.x == 1) {
    __syncthreads();
    return true;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counter, 1u) == gridDim.x - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

template <class T, bool block_per_group>
__global__ void __launch_bounds__(1024, 1) group_advantage_kernel(Problem p, int width) {
  using Acc = typename accumulator<T>::type;
  __shared__ double buffer[32];
  const Block block{buffer};
  if (block_per_group) {
    for (int64_t b = blockIdx.x; b < p.groups; b += gridDim.x) group<T>(block, p, b);
  } else {
    const int64_t warps = blockDim.x / 32, first = blockIdx.x * warps + threadIdx.x / 32;
    for (int64_t b = first; b < p.groups; b += gridDim.x * warps) group<T>(Warp{width}, p, b);
  }
  if (p.kind != Kind::latentr3 || !is_last_block(reinterpret_cast<unsigned*>(p.scratch + 2 * p.groups))) return;
  const Partial partial = batch_partial<T>(block, p);
  if (threadIdx.x == 0) *reinterpret_cast<Partial*>(p.batch) = partial;
  const Scale scale = batch_scale(block, &partial, 1, p.size, p.eps);
  batch_advantages(static_cast<const Acc*>(p.rewards), static_cast<Acc*>(p.advantages), scale, threadIdx.x, blockDim.x,
                   p.groups * p.size);
}

template <class Acc>
__global__ void __launch_bounds__(256) batch_advantage_kernel(BatchProblem p) {
  __shared__ double buffer[32];
  const auto* partials = reinterpret_cast<const Partial*>(p.partials);
  const Scale scale = batch_scale(Block{buffer}, partials, p.processes, p.size, p.eps);
  batch_advantages(static_cast<const Acc*>(p.rewards), static_cast<Acc*>(p.advantages), scale,
                   int64_t(blockIdx.x) * blockDim.x + threadIdx.x, int64_t(gridDim.x) * blockDim.x, p.groups * p.size);
}

int64_t blocks(int64_t work, int64_t a_block) {
  const int64_t count = (work + a_block - 1) / a_block;
  return count < kMaxGrid ? count : kMaxGrid;
}

template <class T>
cudaError_t launch(const Problem& p, cudaStream_t stream) {
  const bool whole_batch = p.kind == Kind::latentr3;
  if (p.groups == 0) return whole_batch ? cudaMemsetAsync(p.batch, 0, sizeof(Partial), stream) : cudaSuccess;
  const int64_t tokens = p.size * p.length;
  const bool block_per_group = p.size > 32 || tokens > 2048;
  int threads = block_per_group ? 256 : 128, width = 1;
  while (width < 32 && width < p.length) width *= 2;
  int64_t grid = block_per_group ? blocks(p.groups, 1) : blocks(p.groups, threads / 32);
  if (whole_batch && p.groups * tokens <= 16384) threads = 1024, grid = 1;
  if (whole_batch && grid > 1) {
    const cudaError_t error = cudaMemsetAsync(p.scratch + 2 * p.groups, 0, sizeof(double), stream);
    if (error != cudaSuccess) return error;
  }
  if (block_per_group) {
    group_advantage_kernel<T, true><<<unsigned(grid), threads, 0, stream>>>(p, 32);
  } else {
    group_advantage_kernel<T, false><<<unsigned(grid), threads, 0, stream>>>(p, width);
  }
  return cudaGetLastError();
}

const char* describe(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* group_advantage_cuda(const Problem& p, int device, void* stream_handle) {
  const cudaError_t error = cudaSetDevice(device);  // of this library's own copy of the runtime
  if (error != cudaSuccess) return describe(error);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  switch (p.dtype) {
    case Dtype::float32: return describe(launch<float>(p, stream));
    case Dtype::float64: return describe(launch<double>(p, stream));
    case Dtype::bfloat16: return describe(launch<bfloat16>(p, stream));
    case Dtype::float16: return describe(launch<float16>(p, stream));
  }
  return "unknown dtype";
}

const char* batch_advantage_cuda(const BatchProblem& p, int device, void* stream_handle) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || p.groups == 0) return describe(error);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const auto grid = unsigned(blocks(p.groups * p.size, 256));
  if (p.is_double) {
    batch_advantage_kernel<double><<<grid, 256, 0, stream>>>(p);
  } else {
    batch_advantage_kernel<float><<<grid, 256, 0, stream>>>(p);
  }
  return describe(cudaGetLastError());
}

const char* driver_problem() {
  int count = 0;
  return describe(cudaGetDeviceCount(&count));
}

}  // namespace flr
