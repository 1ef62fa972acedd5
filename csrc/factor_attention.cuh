// factor_attention's forward: every valid token of H is read from memory once, masked ones never.
//
// A cluster of 1 to 16 blocks serves a user, each block its share of the tokens; a block of a cluster of one goes on to
// the next user. Where a block has no room for a user's sums, 2 to 4 blocks have a part of the columns each of the same
// tokens: they add up their scores through distributed shared memory, and all else is every block's own. In a block, four producer warps look for valid tokens and bring tiles of 16, in chunks of columns,
// into a ring in shared memory by bulk copies of a row's chunk each, and run ahead into the next user. Eight worker
// warps compute from the same chunks first scores, then pooled sums: worker w owns strips of 16 columns, so scores are
// summed over the workers through shared memory, and everything else of the softmax is done by every worker alike, in
// the same order. The sums [D, 8] or [D, 16] stay in registers over all tiles. Blocks of a cluster combine theirs through
// distributed shared memory. Every order is fixed.
#pragma once
#include "factor_attention_producer.cuh"

namespace flr {

// One of the worker warps. Lane 4 g + t / 2 holds of scores and weights: factor g of each group of eight; of sums:
// columns g and g + 8 of every strip, factors t and t + 1 of each group.
template <class T, class C>
struct Worker : Place<Task, C::kSplit> {
  using Here = Place<Task, C::kSplit>;
  using Here::task;
  static constexpr int kChunks = C::kChunks, kStrips = C::kStrips, kAll = kChunks * kStrips;
  static constexpr int kGroups = C::kGroups, kSecond = kGroups - 1;
  static constexpr bool kInRegisters = C::kQueriesInRegisters;
  typename C::Control& control;
  const uint16_t *ring, *queries;
  float* sums_of_block;  // the ring, when it is no longer one
  int warp, lane;
  Slot slot;
  int turn = 0;
  uint32_t crossings = 0;

  float sums[kAll][kGroups][4], pairs[kGroups][4], top[kGroups], total[kGroups], below[kGroups];
  uint32_t query[kInRegisters ? kAll : 1][2];

  FLR_DEVICE Worker(const Task& task, typename C::Control& control, uint16_t* ring, const uint16_t* queries, int warp,
                    int lane, int rank)
      : Here(task, rank), control(control), ring(ring), queries(queries),
        sums_of_block(reinterpret_cast<float*>(ring)), warp(warp), lane(lane) {}

  FLR_DEVICE int g() const { return lane / 4; }
  FLR_DEVICE int t() const { return lane % 4 * 2; }
  // Column of strip i's first, of this worker.
  FLR_DEVICE int column(int i) const { return i / kStrips * C::CHUNK + (warp * kStrips + i % kStrips) * 16; }

  FLR_DEVICE Slot slot_of(int chunk) const { return slot.after(chunk, task.plan.stages); }
  FLR_DEVICE const uint16_t* rows(const Slot& s) const {  // where this lane's row of ldmatrix is
    return ring + s.index * C::kSlot + (lane % 8 + lane / 16 * 8) * C::kPitch + lane / 8 % 2 * 8 + column(0);
  }

  // The tensor core's rows are factors, of one group alone 8 to 15 of them zero; rows from K on repeat factor 0 and
  // nobody looks at them.
  FLR_DEVICE void load_query(const uint16_t* from, int i, uint32_t& low, uint32_t& high) const {
    const uint16_t* at = from + (g() < task.p.factors ? g() : 0) * task.plan.query_pitch + column(i) + t();
    low = *reinterpret_cast<const uint32_t*>(at), high = *reinterpret_cast<const uint32_t*>(at + 8);
  }
  FLR_DEVICE void query_of(const uint16_t* from, int i, uint32_t (&q)[4]) const {
    q[1] = q[3] = 0;
    if (kGroups > 1) {
      const int row = lane % 16 < task.p.factors ? lane % 16 : 0;
      ldmatrix<false>(q, from + row * task.plan.query_pitch + column(i) + lane / 16 * 8);
    } else if (kInRegisters) {
      q[0] = query[i][0], q[2] = query[i][1];
    } else {
      load_query(from, i, q[0], q[2]);
    }
  }

  FLR_DEVICE void start_user(const uint16_t* from) {
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
#pragma unroll
      for (int n = 0; n < kGroups; ++n) sums[i][n][0] = sums[i][n][1] = sums[i][n][2] = sums[i][n][3] = 0;
      if (kInRegisters && i / kStrips < task.plan.chunks) load_query(from, i, query[i][0], query[i][1]);
    }
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      pairs[n][0] = pairs[n][1] = pairs[n][2] = pairs[n][3] = 0;
      top[n] = -INFINITY, total[n] = below[n] = 0;
    }
  }

  // Scores of a tile: s[n][j] is factor 8 n + g's of token t + j % 2 + 8 (j / 2); -inf from `count` on.
  FLR_DEVICE void scores(float (&s)[kGroups][4], const uint16_t* from, int count) {
    float s0[4] = {}, s1[4] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c >= task.plan.chunks) break;
      const Slot here = slot_of(c);
      mbar_wait(&control.full[here.index], here.phase);
      const uint16_t* at = rows(here);
#pragma unroll
      for (int i = 0; i < kStrips; ++i) {
        uint32_t x[4], q[4];
        query_of(from, c * kStrips + i, q);
        ldmatrix<false>(x, at + 16 * i);
        T::mma(s0, q[0], q[1], q[2], q[3], x[0], x[1]);
        T::mma(s1, q[0], q[1], q[2], q[3], x[2], x[3]);
      }
    }
    Quad(&all)[kWorkers][kGroups][32] = control.scores[turn];
    turn ^= 1;
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
      all[warp][n][lane] = Quad{s0[2 * n], s0[2 * n + 1], s1[2 * n], s1[2 * n + 1]};
    bar_sync<1, kWorkerThreads>();
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
      for (int w = 0; w < kWorkers; ++w) {
        const Quad x = all[w][n][lane];
        s[n][0] += x.x, s[n][1] += x.y, s[n][2] += x.z, s[n][3] += x.w;
      }
    }
    if constexpr (C::kSplit) cross(*this, control, crossings, warp, lane, s);
#pragma unroll
    for (int i = 0; i < 4 * kGroups; ++i)
      if (t() + (i & 1) + i / 2 % 2 * 8 >= count) s[i / 4][i % 4] = -INFINITY;
  }

  // Moves the maxima, and turns scores into weights relative to them.
  FLR_DEVICE void softmax(float (&s)[kGroups][4]) {
    float r[kGroups], a[kGroups], b[kGroups];
    bool moved = false;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      float high = fmaxf(fmaxf(s[n][0], s[n][1]), fmaxf(s[n][2], s[n][3]));
      high = fmaxf(high, shuffle_xor(high, 1));
      high = fmaxf(fmaxf(high, shuffle_xor(high, 2)), top[n]);
      moved = moved || high > top[n];
      const float shift = top[n] == -INFINITY ? 0.f : top[n] - high;
      r[n] = top[n] == -INFINITY ? 0.f : exp2_fast(shift * kLog2e);
      below[n] = r[n] * (below[n] + shift * total[n]), total[n] *= r[n], top[n] = high;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float x = s[n][j] - top[n];
        s[n][j] = exp2_fast(x * kLog2e);
        total[n] += s[n][j], below[n] += s[n][j] > 0 ? s[n][j] * x : 0.f;
      }
    }
    if (ballot(moved) == 0) return;  // the same in every worker
#pragma unroll
    for (int n = 0; n < kGroups; ++n) a[n] = shuffle(r[n], 4 * t()), b[n] = shuffle(r[n], 4 * t() + 4);
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
#pragma unroll
      for (int n = 0; n < kGroups; ++n)
        sums[i][n][0] *= a[n], sums[i][n][1] *= b[n], sums[i][n][2] *= a[n], sums[i][n][3] *= b[n];
    }
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      pairs[n][0] *= r[0] * a[n], pairs[n][1] *= r[0] * b[n];
      if (kGroups > 1) pairs[n][2] *= r[kSecond] * a[n], pairs[n][3] *= r[kSecond] * b[n];
    }
  }

  // pairs += A Bᵀ of weights; rows of one group alone leave the tensor core's second eight zero.
  FLR_DEVICE void multiply_pairs(const uint32_t (&a)[kGroups][2], const uint32_t (&b)[kGroups][2]) {
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
      T::mma(pairs[n], a[0][0], kGroups > 1 ? a[kSecond][0] : 0, a[0][1], kGroups > 1 ? a[kSecond][1] : 0, b[n][0],
             b[n][1]);
  }

  // Weights as two 16-bit numbers each, high and rest; the chunks are free afterwards.
  FLR_DEVICE void pool(const float (&s)[kGroups][4]) {
    uint32_t high[kGroups][2], low[kGroups][2];
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) {
      const float x = s[i / 2][i % 2 * 2] * T::kScale, y = s[i / 2][i % 2 * 2 + 1] * T::kScale;
      const uint32_t h = high[i / 2][i % 2] = T::pack(x, y);
      const auto rounded = T::unpack(h);
      low[i / 2][i % 2] = T::pack(x - rounded.x, y - rounded.y);
    }
    if (warp == 0) multiply_pairs(high, high), multiply_pairs(high, low), multiply_pairs(low, high);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c >= task.plan.chunks) break;
      const Slot here = slot_of(c);
      const uint16_t* at = rows(here);
#pragma unroll
      for (int i = 0; i < kStrips; ++i) {
        uint32_t x[4];
        ldmatrix<true>(x, at + 16 * i);
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
          T::mma(sums[c * kStrips + i][n], x[0], x[1], x[2], x[3], high[n][0], high[n][1]);
          T::mma(sums[c * kStrips + i][n], x[0], x[1], x[2], x[3], low[n][0], low[n][1]);
        }
      }
      release(lane, &control.empty[here.index]);
    }
    slot.advance(task.plan.chunks, task.plan.stages);
  }

  FLR_DEVICE void tiles(const uint16_t* from) {
    for (bool last = false; !last;) {
      mbar_wait(&control.full[slot.index], slot.phase);
      const int tile = control.tile[slot.index], count = tile & 255;
      last = tile > 255;
      if (count == 0) {  // a user, or a block's share of one, without a valid token
        release(lane, &control.empty[slot.index]);
        slot.advance(1, task.plan.stages);
        return;
      }
      float s[kGroups][4];
      scores(s, from, count);
      softmax(s);
      pool(s);
    }
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      total[n] += shuffle_xor(total[n], 1), total[n] += shuffle_xor(total[n], 2);
      below[n] += shuffle_xor(below[n], 1), below[n] += shuffle_xor(below[n], 2);
    }
  }

  // A whole user was here: results straight from registers.
  FLR_DEVICE void store(int64_t user) {
    const auto& p = task.p;
    float inverse[kGroups], a[kGroups], b[kGroups];
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      inverse[n] = total[n] == 0 ? 0.f : 1 / total[n];
      a[n] = shuffle(inverse[n], 4 * t()), b[n] = shuffle(inverse[n], 4 * t() + 4);
      const int k = 8 * n + t(), size = Here::size();
      float *even = p.context + (user * p.factors + k) * p.size + Here::first_column(), *odd = even + p.size;
#pragma unroll
      for (int i = 0; i < kAll; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int d = column(i) + g() + 8 * j;
          if (d >= size) continue;
          if (k < p.factors) even[d] = sums[i][n][2 * j] * (a[n] / T::kScale);
          if (k + 1 < p.factors) odd[d] = sums[i][n][2 * j + 1] * (b[n] / T::kScale);
        }
      }
    }
    if (warp != 0 || Here::part() != 0) return;
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
      if (8 * m + g() >= p.factors) return;
      const int64_t factor = user * p.factors + 8 * m + g();
      const float scale = inverse[m] / (T::kScale * T::kScale);
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        const int k = 8 * n + t();
        if (k < p.factors) p.overlap[factor * p.factors + k] = pairs[n][2 * m] * scale * a[n];
        if (k + 1 < p.factors) p.overlap[factor * p.factors + k + 1] = pairs[n][2 * m + 1] * scale * b[n];
      }
      if (t() != 0) continue;
      p.lse[factor] = total[m] == 0 ? -INFINITY : top[m] + logf(total[m]);
      p.entropy[factor] = total[m] == 0 ? 0.f : logf(total[m]) - below[m] * inverse[m];
    }
  }

  // Statistics of factor k over the cluster, and every block's weight.
  FLR_DEVICE void combine_factor(int64_t user, int k) {
    constexpr int kApart = 8 * kGroups;
    const int shares = Here::shares();
    float high = -INFINITY, sum = 0, logits = 0;
    for (int q = 0; q < shares; ++q) high = fmaxf(high, remote(&control.stats[0][k], Here::of_share(q))[0]);
    for (int q = 0; q < shares; ++q) {
      const float* stats = remote(&control.stats[0][k], Here::of_share(q));
      const float shift = stats[0] == -INFINITY ? 0.f : stats[0] - high;
      const float weight = stats[0] == -INFINITY ? 0.f : expf(shift);
      control.weights[q][k] = weight;
      sum += weight * stats[kApart], logits += weight * (stats[2 * kApart] + shift * stats[kApart]);
    }
    const float inverse = sum == 0 ? 0.f : 1 / sum;
    for (int q = 0; q < shares; ++q) control.weights[q][k] *= inverse / T::kScale;
    if (Here::rank != 0) return;
    const int64_t factor = user * task.p.factors + k;
    task.p.lse[factor] = sum == 0 ? -INFINITY : high + logf(sum);
    task.p.entropy[factor] = sum == 0 ? 0.f : logf(sum) - logits * inverse;
  }

  // Puts sums and statistics where the cluster's other blocks find them.
  FLR_DEVICE void publish(int pitch) {
    const auto& p = task.p;
    bar_sync<1, kWorkerThreads>();  // no worker needs the ring any more
#pragma unroll
    for (int i = 0; i < kAll * kGroups; ++i) {
      const int strip = i / kGroups, n = i % kGroups, k = 8 * n + t();
      if (strip / kStrips >= task.plan.chunks) break;
      float* at = sums_of_block + k * pitch + column(strip) + g();
      if (k < p.factors) at[0] = sums[strip][n][0], at[8] = sums[strip][n][2];
      if (k + 1 < p.factors) at[pitch] = sums[strip][n][1], at[pitch + 8] = sums[strip][n][3];
    }
    if (warp != 0) return;
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
      const int row = 8 * m + g();
      if (t() == 0) control.stats[0][row] = top[m], control.stats[1][row] = total[m], control.stats[2][row] = below[m];
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        float* at = &control.pairs[row][8 * n + t()];
        at[0] = pairs[n][2 * m], at[1] = pairs[n][2 * m + 1];
      }
    }
  }

  // Each block writes its share of its columns.
  FLR_DEVICE void combine(int64_t user) {
    const auto& p = task.p;
    const int pitch = task.plan.chunks * C::CHUNK + 4, shares = Here::shares(), thread = 32 * warp + lane;
    publish(pitch);
    cluster_sync();
    if (thread < p.factors) combine_factor(user, thread);
    bar_sync<1, kWorkerThreads>();
    const int quads = Here::size() / 4, each = (quads + shares - 1) / shares;
    for (int i = thread; i < p.factors * each; i += kWorkerThreads) {
      const int k = i / each, quad = Here::share() * each + i % each, d = 4 * quad;
      if (quad >= quads) continue;
      Quad sum{0, 0, 0, 0};
      for (int q = 0; q < shares; ++q) {
        const Quad x = *remote(reinterpret_cast<const Quad*>(sums_of_block + k * pitch + d), Here::of_share(q));
        const float weight = control.weights[q][k];
        sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
      }
      *reinterpret_cast<Quad*>(p.context + (user * p.factors + k) * p.size + Here::first_column() + d) = sum;
    }
    if (Here::rank == 0 && thread < p.factors * p.factors) {
      const int k = thread / p.factors, j = thread % p.factors;
      float sum = 0;
      for (int q = 0; q < shares; ++q)
        sum += control.weights[q][k] * control.weights[q][j] * remote(&control.pairs[k][j], Here::of_share(q))[0];
      p.overlap[(user * p.factors + k) * p.factors + j] = sum;
    }
    // nobody leaves while others read from it
    cluster_sync();
  }

  FLR_DEVICE void run() {
    int served = 0;
    for (Users users(task); users.more(); users.index += users.step, ++served) {
      const int buffer = served % task.plan.buffers;
      const uint16_t* from = queries + buffer * task.p.factors * task.plan.query_pitch;
      mbar_wait(&control.queries_full[buffer], served / task.plan.buffers & 1);
      start_user(from);
      if (kInRegisters) release(lane, &control.queries_empty[buffer]);
      tiles(from);
      if (!kInRegisters) release(lane, &control.queries_empty[buffer]);
      if (Here::shares() > 1) combine(users.user());
      else store(users.user());
    }
  }
};

template <class T, class C>
__global__ void __launch_bounds__(kThreads, 1) factor_attention_forward(const __grid_constant__ Task task) {
  FLR_DYNAMIC_SHARED(memory);
  auto& control = *reinterpret_cast<typename C::Control*>(memory);
  uint16_t* ring = reinterpret_cast<uint16_t*>(memory + sizeof(typename C::Control));
  uint16_t* queries = ring + task.plan.stages * C::kSlot;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = int(cluster_rank());
  if (threadIdx.x == 0) {
    for (int i = 0; i < task.plan.stages; ++i) {
      mbar_init(&control.full[i], kProducers);
      mbar_init(&control.empty[i], kWorkers);
    }
    for (int i = 0; i < task.plan.buffers; ++i) {
      mbar_init(&control.queries_full[i], kProducers);
      mbar_init(&control.queries_empty[i], kWorkers);
    }
    if constexpr (C::kSplit)
      for (auto& barrier : control.crossed) mbar_init(&barrier, task.plan.split);
    mbar_fence();
  }
  if (C::kChunks == 1) {  // columns from D on, of every slot's rows
    const int size = Place<Task, C::kSplit>(task, rank).size(), pieces = (C::CHUNK - size) / 8;
    for (int i = threadIdx.x; i < task.plan.stages * kTokens * pieces; i += kThreads)
      reinterpret_cast<Quad*>(ring + i / pieces * C::kPitch + size)[i % pieces] = Quad{0, 0, 0, 0};
  }
  __syncthreads();
  if (C::kSplit) {  // nobody arrives at a barrier that is not there yet
    cluster_sync();
  }
  if (warp >= kWorkers) {
    fewer_registers<kProducerRegisters>();
    Producer<C>(task, control, ring, queries, warp - kWorkers, lane, rank).run();
  } else {
    more_registers<kWorkerRegisters>();
    Worker<T, C>(task, control, ring, queries, warp, lane, rank).run();
  }
}

}  // namespace flr
