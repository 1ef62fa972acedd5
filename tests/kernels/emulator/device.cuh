// csrc/device.cuh on a CPU: the same names, with what the PTX does written out.
#pragma once
#include <cuda_runtime.h>

#include <cmath>

#define FLR_DEVICE inline
#define FLR_DYNAMIC_SHARED(name) char* name = emu::self().block->memory()

namespace flr {

struct Pair { float x, y; };

inline float widen16(uint16_t bits, bool half) {
  if (half) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return float(value);
  }
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline uint16_t narrow16(float value, bool half) {  // to nearest even
  uint16_t bits;
  if (half) {
    const _Float16 narrow = _Float16(value);
    std::memcpy(&bits, &narrow, 2);
    return bits;
  }
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  return value != value ? 0x7fff : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

template <bool half>
struct Tensor16 {
  static uint32_t pack(float low, float high) {
    return narrow16(low, half) | uint32_t(narrow16(high, half)) << 16;
  }
  static Pair unpack(uint32_t pair) { return {widen16(uint16_t(pair), half), widen16(uint16_t(pair >> 16), half)}; }
  static void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const auto& given = emu::exchange<6>({a0, a1, a2, a3, b0, b1});
    const int lane = emu::self().threadIdx.x % 32;
    for (int j = 0; j < 4; ++j) {
      const int row = lane / 4 + j / 2 * 8, column = lane % 4 * 2 + (j & 1);
      float sum = 0;
      for (int k = 0; k < 16; ++k) {  // A's row is held by lanes 4 (row % 8) .., B's column by lanes 4 column ..
        const Pair a = unpack(uint32_t(given[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2]));
        const Pair b = unpack(uint32_t(given[column * 4 + k % 8 / 2][4 + k / 8]));
        sum += k & 1 ? a.y * b.y : a.x * b.x;
      }
      c[j] += sum;
    }
  }
  static void mma_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) { mma(c, a0, a1, 0, 0, b0, 0); }
};
struct Bfloat16 : Tensor16<false> { static constexpr float kScale = 1; };
struct Float16 : Tensor16<true> { static constexpr float kScale = 16384; };

inline float exp2_fast(float x) { return std::exp2(x); }

struct alignas(16) Mbarrier {
  int32_t bytes;
  uint16_t arrivals, pending;
  uint32_t phase;
};
inline void mbar_change(Mbarrier* m, int bytes, int arrivals) {
  static std::mutex mutexes[64];
  std::lock_guard<std::mutex> lock(mutexes[uintptr_t(m) / 16 % 64]);
  if (arrivals > m->pending) emu::fail("more arrivals at an mbarrier than it expects");
  m->bytes += bytes, m->pending = uint16_t(m->pending - arrivals);
  if (m->pending != 0 || m->bytes != 0) return;
  m->pending = m->arrivals;
  std::atomic_ref<uint32_t> phase(m->phase);
  phase.store(m->phase ^ 1);
}
inline void mbar_init(Mbarrier* m, uint32_t arrivals) { *m = {0, uint16_t(arrivals), uint16_t(arrivals), 0}; }
inline void mbar_fence() {}
inline void mbar_expect(Mbarrier* m, uint32_t bytes) { mbar_change(m, int(bytes), 1); }
inline void mbar_arrive(Mbarrier* m) { mbar_change(m, 0, 1); }
inline void mbar_wait(Mbarrier* m, uint32_t parity) {
  emu::wait_while(m->phase, parity);
}
template <class T>
T* remote(T* p, unsigned rank);
inline void mbar_arrive_remote(Mbarrier* m, unsigned rank) { mbar_arrive(remote(m, rank)); }
inline void mbar_wait_remote(Mbarrier* m, uint32_t parity) { mbar_wait(m, parity), emu::dawdle(); }

// Copies are done by fibers of their own, one for each of a block's barriers, once nothing else is left to do and what
// came last first; those to global memory by another few.
class CopyEngine {
 public:
  struct Copy {
    void* to;
    const void* from;
    uint32_t bytes;
    Mbarrier* barrier;
    std::atomic<int>* pending;  // of the thread that stores
  };
  static CopyEngine& of(const Mbarrier* m) {
    static CopyEngine engines[29];  // more than a block has barriers
    return engines[uintptr_t(m) / sizeof(Mbarrier) % 29];
  }
  static CopyEngine& of_stores(int lane) {
    static CopyEngine engines[4];
    return engines[lane % 4];
  }
  void add(const Copy& copy) {
    std::lock_guard<std::mutex> lock(mutex_);
    copies_.push_back(copy);
    helper_.wake();
  }

 private:
  void work() {
    std::vector<Copy> copies;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      copies.swap(copies_);
    }
    for (auto copy = copies.rbegin(); copy != copies.rend(); ++copy) {
      std::memcpy(copy->to, copy->from, copy->bytes);
      if (copy->barrier != nullptr) mbar_change(copy->barrier, -int(copy->bytes), 0);
      else --*copy->pending;
    }
  }
  std::mutex mutex_;
  std::vector<Copy> copies_;
  emu::Helper helper_{[this] { work(); }};
};
inline void bulk_copy(void* to, const void* from, uint32_t bytes, Mbarrier* m) {
  if ((uintptr_t(to) | uintptr_t(from) | bytes) % 16 || bytes == 0) emu::fail("a bulk copy that is not aligned");
  CopyEngine::of(m).add({to, from, bytes, m, nullptr});
}
inline void bulk_store(void* to, const void* from, uint32_t bytes) {
  if ((uintptr_t(to) | uintptr_t(from) | bytes) % 16 || bytes == 0) emu::fail("a bulk copy that is not aligned");
  auto& pending = emu::self().pending_stores;
  ++pending;
  CopyEngine::of_stores(int(emu::self().threadIdx.x)).add({to, from, bytes, nullptr, &pending});
}
inline void bulk_wait_read() {
  auto& pending = emu::self().pending_stores;
  for (int now = pending; now != 0; now = pending) emu::wait_while(pending, now);
}
inline void bulk_wait_written() { bulk_wait_read(); }
inline void fence_async() {}

template <int id, int threads>
void bar_sync() {
  emu::Barrier* barrier;
  {
    std::lock_guard<std::mutex> lock(emu::self().block->mutex);
    auto& named = emu::self().block->named[id];
    if (!named) named.reset(new emu::Barrier(threads));
    barrier = named.get();
  }
  barrier->wait();
  emu::dawdle();
}

inline float shuffle_xor(float x, int step) { return __shfl_xor_sync(~0u, x, step); }
template <class X>
X shuffle(X x, int lane) {
  uint64_t word[1] = {};
  std::memcpy(word, &x, sizeof x);
  std::memcpy(&x, emu::exchange(word)[lane], sizeof x);
  return x;
}
inline unsigned ballot(bool x) {
  unsigned bits = 0;
  const auto& given = emu::exchange<1>({uint64_t(x)});
  for (int i = 0; i < 32; ++i) bits |= unsigned(given[i][0]) << i;
  return bits;
}
inline int ones(unsigned x) { return __builtin_popcount(x); }

template <bool transposed>
void ldmatrix(uint32_t (&r)[4], const uint16_t* row) {
  if (uintptr_t(row) % 16) emu::fail("a row for ldmatrix that is not aligned");
  const auto& rows = emu::exchange<1>({uint64_t(row)});
  const int lane = emu::self().threadIdx.x % 32, g = lane / 4, t = lane % 4 * 2;
  const auto at = [&](int matrix, int i, int j) {
    return reinterpret_cast<const uint16_t*>(rows[8 * matrix + i][0])[j];
  };
  for (int j = 0; j < 4; ++j) {
    const uint16_t low = transposed ? at(j, t, g) : at(j, g, t), high = transposed ? at(j, t + 1, g) : at(j, g, t + 1);
    r[j] = low | uint32_t(high) << 16;
  }
}

template <bool transposed, int matrices = 4>
void stmatrix(uint16_t* row, const uint32_t (&r)[4]) {
  const auto& given = emu::exchange<5>({uint64_t(row), r[0], r[1], r[2], r[3]});
  const int lane = emu::self().threadIdx.x % 32, matrix = lane / 8, i = lane % 8;
  if (matrix >= matrices) return;
  if (uintptr_t(row) % 16) emu::fail("a row for stmatrix that is not aligned");
  for (int j = 0; j < 8; ++j) {  // element [x, y] of a matrix is held by lane 4 x + y / 2
    const int x = transposed ? j : i, y = transposed ? i : j;
    row[j] = uint16_t(given[4 * x + y / 2][1 + matrix] >> (y % 2 * 16));
  }
}
inline void stmatrix_2_transposed(uint16_t* row, const uint32_t (&r)[4]) { stmatrix<true, 2>(row, r); }

inline unsigned cluster_rank() {
#ifdef __SANITIZE_THREAD__  // every second block starts late: when another waits for it, or nothing else is left to do
  if (emu::self().rank % 2 == 1 && emu::self().threadIdx.x == 0) emu::self().cluster->barrier.late(emu::self().blockDim.x);
#endif
  return emu::self().rank;
}
inline void cluster_sync() { emu::self().cluster->barrier.wait(), emu::dawdle(); }
template <class T>
T* remote(T* p, unsigned rank) {
  const auto offset = reinterpret_cast<const char*>(p) - emu::self().block->memory();
  return reinterpret_cast<T*>(emu::self().cluster->blocks[rank]->memory() + offset);
}

template <int count> void fewer_registers() {}
template <int count> void more_registers() {}

}  // namespace flr
