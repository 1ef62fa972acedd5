// Enough of CUDA on a CPU to run csrc/*.cu in tests: every CUDA thread is a thread of the system, so that
// ThreadSanitizer sees what two of them do without a barrier in between. Blocks of a cluster run side by side.
//
// Emulated: blocks, clusters, barriers, shuffles, atomics, shared memory (NaN until written, and NaN again once its
// block is gone). Not emulated: lockstep, proxies, a memory model weaker than the host's, limits on registers.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

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
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

[[noreturn]] inline void fail(const char* what) {
  std::printf("FAIL emulator: %s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

// Fails where for ten seconds no thread has come past a barrier or ended.
class Watchdog {
 public:
  static Watchdog& instance() {
    static Watchdog watchdog;
    return watchdog;
  }
  unsigned count() const { return count_.load(std::memory_order_relaxed); }
  void progress() { count_.fetch_add(1, std::memory_order_relaxed); }
  ~Watchdog() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      over_ = true;
    }
    condition_.notify_one();
    thread_.join();
  }

 private:
  void watch() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (unsigned before = count_; !over_; before = count_)
      if (!condition_.wait_for(lock, std::chrono::seconds(10), [&] { return over_; }) && before == count_)
        fail("all threads wait");
  }
  std::atomic<unsigned> count_{0};
  std::mutex mutex_;
  std::condition_variable condition_;
  bool over_ = false;
  std::thread thread_{[this] { watch(); }};
};

// `leave` takes a thread out: the others no longer wait for it.
class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}
  void wait() { await(arrive()); }
  unsigned arrive() {
    mutex_.lock();
    const unsigned mine = round_.load();
    if (++here_ == threads_) release();
    else mutex_.unlock();
    return mine;
  }
  void await(unsigned mine) { round_.wait(mine); }
  unsigned leave() {
    mutex_.lock();
    const unsigned left = --threads_;
    if (left == here_ && here_ > 0) release();
    else mutex_.unlock();
    return left;
  }
  unsigned waiting() {
    std::lock_guard<std::mutex> lock(mutex_);
    return here_;
  }

 private:
  void release() {
    here_ = 0;
    ++round_;
    mutex_.unlock();
    round_.notify_all();
    Watchdog::instance().progress();
  }
  std::mutex mutex_;
  std::atomic<unsigned> round_{0};
  unsigned threads_, here_ = 0;
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
  Warp& warp() { return *warps[threadIdx.x / 32]; }
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
  explicit Cluster(unsigned threads) : barrier(threads) {}
};

inline thread_local Block* block;
inline thread_local Cluster* cluster;
inline thread_local unsigned rank, turn;
// Which of the faults that test_emulator.py plants is there; 0: none.
inline const int fault = std::getenv("EMULATED_FAULT") ? std::atoi(std::getenv("EMULATED_FAULT")) : 0;
inline int multiprocessors = 1;  // of the current device; device n has n

template <class T, int id>
T& shared() {
  std::lock_guard<std::mutex> lock(block->mutex);
  auto& bytes = block->fixed[id];
  if (bytes.empty()) bytes.assign(sizeof(T), char(0xff));
  return *reinterpret_cast<T*>(bytes.data());
}

// What every lane of the warp gave, by lane. Two slots: the next write cannot meet this read.
template <int words>
const uint64_t (&exchange(const uint64_t (&mine)[words]))[32][kWords] {
  Warp& warp = block->warp();
  auto& slots = warp.slots[turn++ & 1];
  std::copy(mine, mine + words, slots[threadIdx.x % 32]);
  warp.barrier.wait();
  return slots;
}

// Threads that stay from one launch to the next.
class Pool {
 public:
  static Pool& instance() {
    static Pool pool;
    return pool;
  }
  void run(unsigned count, const std::function<void(unsigned)>& job) {
    while (seats_.size() < count) {
      seats_.emplace_back(new Seat);
      seats_.back()->thread = std::thread([this, seat = seats_.back().get(), i = unsigned(seats_.size() - 1)] {
        work(*seat, i);
      });
    }
    job_ = &job, left_ = count;
    call(count);
    for (unsigned left = left_; left != 0; left = left_) left_.wait(left);
  }
  ~Pool() {
    job_ = nullptr;
    call(unsigned(seats_.size()));
    for (auto& seat : seats_) seat->thread.join();
  }

 private:
  struct Seat {
    std::thread thread;
    std::atomic<unsigned> ticket{0};
  };
  void call(unsigned count) {
    for (unsigned i = 0; i < count; ++i) ++seats_[i]->ticket, seats_[i]->ticket.notify_one();
  }
  void work(Seat& seat, unsigned index) {
    for (unsigned seen = 0;; ++seen) {
      seat.ticket.wait(seen);
      if (job_ == nullptr) return;
      (*job_)(index);
      if (--left_ == 0) left_.notify_one();
    }
  }
  std::vector<std::unique_ptr<Seat>> seats_;
  const std::function<void(unsigned)>* job_ = nullptr;
  std::atomic<unsigned> left_{0};
};

// Behind a barrier some warps wait until the others come no further without them: what relies on luck has none.
inline void dawdle() {
#ifdef __SANITIZE_THREAD__
  static thread_local uint32_t state = 1;
  state = (state + threadIdx.x / 32 * 0x9e3779b9u) * 1664525 + 1013904223;
  if (state >> 28 > 1) return;
  unsigned before = 0;
  for (int i = 0; i < 20 && before != Watchdog::instance().count(); ++i) {
    before = Watchdog::instance().count();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
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
    Pool::instance().run(unsigned(clusters.size()) * a_cluster, [&](unsigned i) {
      cluster = clusters[i / a_cluster].get(), rank = i % a_cluster / threads, turn = 0;
      block = cluster->blocks[rank].get();
      threadIdx = dim3(i % threads), blockIdx = dim3(first + i / threads), blockDim = dim3(threads);
      gridDim = dim3(grid);
      kernel();
      if (block->alive.leave() == 0) std::fill(block->dynamic.begin(), block->dynamic.end(), char(0xff));
      cluster->barrier.leave();
    });
  }
}

}  // namespace emu

inline void __syncthreads() {
  emu::block->all.wait();
  emu::dawdle();
}
inline void __syncwarp() { emu::block->warp().barrier.wait(); }
inline void __threadfence() {}
template <class T>
T __shfl_xor_sync(unsigned, T x, int step) {
  uint64_t word[1] = {};
  std::memcpy(word, &x, sizeof x);
  std::memcpy(&x, emu::exchange(word)[threadIdx.x % 32 ^ unsigned(step)], sizeof x);
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
