// Enough of CUDA on a CPU to run csrc/*.cu in tests: every CUDA thread is a fiber, which ThreadSanitizer takes for a
// thread, so that it sees what two of them do without a barrier in between. Blocks of a cluster run side by side.
//
// Emulated: blocks, clusters, barriers, shuffles, atomics, shared memory (NaN until written, and NaN again once its
// block is gone). Not emulated: lockstep, proxies, a memory model weaker than the host's, limits on registers.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "fibers.h"

#define __CUDACC__ 1
#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
namespace emu {

struct Block;
struct Cluster;
// What a CUDA thread has of its own.
struct Thread {
  dim3 threadIdx, blockIdx, blockDim, gridDim;
  Block* block = nullptr;
  Cluster* cluster = nullptr;
  unsigned rank = 0, turn = 0;
  uint32_t luck = 1;
  std::atomic<int> pending_stores{0};
};
inline Thread& self() { return *static_cast<Thread*>(Fiber::current().own()); }

// `leave` takes a thread out: the others no longer wait for it. All of one round is before all that follows it; two words
// in turn tell ThreadSanitizer so, because who is fast comes to the next round while others leave this one.
class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}
  EMU_UNSEEN void wait() {
    const unsigned mine = round_;
    __tsan_release(&order_[mine % 2]);
    if (++here_ == threads_) here_ = 0, ++round_;
    else Fiber::current().step_aside(Fiber::State::other, &round_, mine);
    __tsan_acquire(&order_[mine % 2]);
  }
  EMU_UNSEEN unsigned leave() {
    __tsan_release(&order_[round_ % 2]);
    __tsan_acquire(&order_[round_ % 2]);
    const unsigned left = --threads_;
    if (left == here_ && here_ > 0) here_ = 0, ++round_;
    return left;
  }
  // Sleeps until so many are here, or nothing else is left to do.
  EMU_UNSEEN void late(unsigned threads) { Fiber::current().step_aside(Fiber::State::late, &here_, threads); }

 private:
  unsigned round_ = 0, threads_, here_ = 0;
  char order_[2] = {};
};

constexpr int kWords = 6;
struct Warp {
  Barrier barrier{32};
  uint64_t slots[2][32][kWords];
};

struct Block {
  Barrier all, alive;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<char> dynamic;
  std::mutex mutex;
  std::map<int, std::vector<char>> fixed;  // __shared__ variables
  std::map<int, std::unique_ptr<Barrier>> named;
  Block(unsigned threads, size_t bytes) : all(threads), alive(threads), dynamic(bytes + 128, char(0xff)) {
    for (unsigned i = 0; i < threads; i += 32) warps.emplace_back(new Warp);
  }
  char* memory() { return reinterpret_cast<char*>((uintptr_t(dynamic.data()) + 127) / 128 * 128); }
  Warp& warp() { return *warps[self().threadIdx.x / 32]; }
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
  explicit Cluster(unsigned threads) : barrier(threads) {}
};

// Which of the faults that test_emulator.py plants is there; 0: none.
inline const int fault = std::getenv("EMULATED_FAULT") ? std::atoi(std::getenv("EMULATED_FAULT")) : 0;
inline int multiprocessors = 1;  // of the current device; device n has n

template <class T, int id>
T& shared() {
  Block& block = *self().block;
  std::lock_guard<std::mutex> lock(block.mutex);
  auto& bytes = block.fixed[id];
  if (bytes.empty()) bytes.assign(sizeof(T), char(0xff));
  return *reinterpret_cast<T*>(bytes.data());
}

// What every lane of the warp gave, by lane. Two slots: the next write cannot meet this read.
template <int words>
const uint64_t (&exchange(const uint64_t (&mine)[words]))[32][kWords] {
  Thread& me = self();
  Warp& warp = me.block->warp();
  auto& slots = warp.slots[me.turn++ & 1];
  std::copy(mine, mine + words, slots[me.threadIdx.x % 32]);
  warp.barrier.wait();
  return slots;
}

// Behind a barrier some warps wait until the others come no further without them: what relies on luck has none.
inline void dawdle() {
#ifdef __SANITIZE_THREAD__
  Thread& me = self();
  me.luck = (me.luck + me.threadIdx.x / 32 * 0x9e3779b9u) * 1664525 + 1013904223;
  if (me.luck >> 28 <= 1) Fiber::current().step_aside(Fiber::State::last);
#endif
}

inline void run(unsigned grid, unsigned threads, unsigned cluster_size, size_t bytes,
                const std::function<void()>& kernel) {
  const unsigned a_cluster = cluster_size * threads, side = cluster_size > 1 ? 1 : 2;  // clusters at a time
  for (unsigned first = 0; first < grid; first += side * cluster_size) {
    std::vector<std::unique_ptr<Cluster>> clusters;
    for (unsigned b = first; b < grid && b < first + side * cluster_size; b += cluster_size) {
      clusters.emplace_back(new Cluster(a_cluster));
      for (unsigned q = 0; q < cluster_size; ++q) clusters.back()->blocks.emplace_back(new Block(threads, bytes));
    }
    Fibers<Thread>::instance().run(unsigned(clusters.size()) * a_cluster, [&](unsigned i) {
      Thread& me = self();
      me.cluster = clusters[i / a_cluster].get(), me.rank = i % a_cluster / threads, me.turn = 0;
      me.block = me.cluster->blocks[me.rank].get();
      me.threadIdx = dim3(i % threads), me.blockIdx = dim3(first + i / threads), me.blockDim = dim3(threads);
      me.gridDim = dim3(grid);
      kernel();
      if (me.block->alive.leave() == 0) std::fill(me.block->dynamic.begin(), me.block->dynamic.end(), char(0xff));
      me.cluster->barrier.leave();
    });
  }
}

}  // namespace emu

inline void __syncthreads() {
  emu::self().block->all.wait();
  emu::dawdle();
}
inline void __syncwarp() { emu::self().block->warp().barrier.wait(); }
inline void __threadfence() {}
template <class T>
T __shfl_xor_sync(unsigned, T x, int step) {
  uint64_t word[1] = {};
  std::memcpy(word, &x, sizeof x);
  std::memcpy(&x, emu::exchange(word)[emu::self().threadIdx.x % 32 ^ unsigned(step)], sizeof x);
  return x;
}
inline unsigned atomicAdd(unsigned* p, unsigned x) {
  return std::atomic_ref<unsigned>(*p).fetch_add(x, std::memory_order_acq_rel);
}

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess, cudaErrorInvalidDevice };
enum {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
  cudaDevAttrMultiProcessorCount,
  cudaLaunchAttributeClusterDimension
};
struct cudaLaunchAttribute {
  int id;
  struct {
    struct { unsigned x, y, z; } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline cudaError_t cudaSetDevice(int device) { return emu::multiprocessors = device, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int device) { return *value = device, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int attribute, int bytes) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && bytes > 227 * 1024)
    emu::fail("more shared memory than a block can have");
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel, const cudaLaunchConfig_t* config) {
  return *count = emu::multiprocessors / int(config->attrs[0].val.clusterDim.x), cudaSuccess;
}
template <class Kernel, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, A... arguments) {
  const unsigned cluster = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  if (config->gridDim.x % cluster || cluster > 16) emu::fail("a grid that is no multiple of the cluster, or above 16");
  if (config->dynamicSmemBytes > 227 * 1024) emu::fail("more shared memory than a block can have");
  emu::run(config->gridDim.x, config->blockDim.x, cluster, config->dynamicSmemBytes, [=] { kernel(arguments...); });
  return cudaSuccess;
}
template <class Kernel, class... A>  // kernel<<<grid, threads, 0, stream>>>(...)
void emulated_launch(Kernel kernel, unsigned grid, unsigned threads, cudaStream_t, A... arguments) {
  emu::run(grid, threads, 1, 0, [=] { kernel(arguments...); });
}
