// factor_attention's forward: every valid token of H is read from memory once, masked ones never.
//
// A cluster of 1 to 16 blocks serves a user, each block its share of the tokens; a block of a cluster of one goes on to
// the next user. In a block, four producer warps look for valid tokens and bring tiles of 16, in chunks of columns,
// into a ring in shared memory by bulk copies of a row's chunk each, and run ahead into the next user. Eight worker
// warps compute from the same chunks first scores, then pooled sums: worker w owns strips of 16 columns, so scores are
// summed over the workers through shared memory, and everything else of the softmax is done by every worker alike, in
// the same order. The sums [D, 8] stay in registers over all tiles. Blocks of a cluster combine theirs through
// distributed shared memory. Every order is fixed.
#pragma once
#include "factor_attention_producer.cuh"

namespace flr {

// One of the worker warps. Lane 4 g + t / 2 holds of scores and weights: factor g; of sums: columns g and g + 8 of
// every strip, factors t and t + 1.
template <class T, class C>
struct Worker {
  static constexpr int kChunks = C::kChunks, kStrips = C::kStrips, kAll = kChunks * kStrips;
  static constexpr bool kInRegisters = C::kQueriesInRegisters;
  const Task& task;
  Control& control;
  const uint16_t *ring, *queries;
  float* part;  // the ring, when it is no longer one
  int warp, lane, rank;
  Slot slot;
  int turn = 0;

  float sums[kAll][4], pairs[4], top, total, below;
  uint32_t query[kInRegisters ? kAll : 1][2];

  FLR_DEVICE Worker(const Task& task, Control& control, uint16_t* ring, const uint16_t* queries, int warp, int lane,
                    int rank)
      : task(task), control(control), ring(ring), queries(queries), part(reinterpret_cast<float*>(ring)), warp(warp),
        lane(lane), rank(rank) {}

  FLR_DEVICE int g() const { return lane / 4; }
  FLR_DEVICE int t() const { return lane % 4 * 2; }
  // Column of strip i's first, of this worker.
  FLR_DEVICE int column(int i) const { return i / kStrips * C::CHUNK + (warp * kStrips + i % kStrips) * 16; }

  FLR_DEVICE Slot slot_of(int chunk) const { return slot.after(chunk, task.plan.stages); }
  FLR_DEVICE const uint16_t* rows(const Slot& s) const {  // where this lane's row of ldmatrix is
    return ring + s.index * C::kSlot + (lane % 8 + lane / 16 * 8) * C::kPitch + lane / 8 % 2 * 8 + column(0);
  }

  // The tensor core's rows are factors, 8 to 15 of them zero; rows from K on repeat factor 0 and nobody looks at them.
  FLR_DEVICE void load_query(const uint16_t* from, int i, uint32_t& low, uint32_t& high) const {
    const uint16_t* at = from + (g() < task.p.factors ? g() : 0) * task.plan.query_pitch + column(i) + t();
    low = *reinterpret_cast<const uint32_t*>(at), high = *reinterpret_cast<const uint32_t*>(at + 8);
  }

  FLR_DEVICE void start_user(const uint16_t* from) {
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
      if (kInRegisters && i / kStrips < task.plan.chunks) load_query(from, i, query[i][0], query[i][1]);
    }
    pairs[0] = pairs[1] = pairs[2] = pairs[3] = 0;
    top = -INFINITY, total = below = 0;
  }

  // Scores of a tile: s[j] is factor g's of token t + j % 2 + 8 (j / 2); -inf from `count` on.
  FLR_DEVICE void scores(float (&s)[4], const uint16_t* from, int count) {
    float s0[4] = {}, s1[4] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c >= task.plan.chunks) break;
      const Slot here = slot_of(c);
      mbar_wait(&control.full[here.index], here.phase);
      const uint16_t* at = rows(here);
#pragma unroll
      for (int i = 0; i < kStrips; ++i) {
        uint32_t x[4], low, high;
        if (kInRegisters) low = query[c * kStrips + i][0], high = query[c * kStrips + i][1];
        else load_query(from, c * kStrips + i, low, high);
        ldmatrix<false>(x, at + 16 * i);
        T::mma(s0, low, 0, high, 0, x[0], x[1]);
        T::mma(s1, low, 0, high, 0, x[2], x[3]);
      }
    }
    Quad(&all)[kWorkers][32] = control.scores[turn];
    turn ^= 1;
    all[warp][lane] = Quad{s0[0], s0[1], s1[0], s1[1]};
    bar_sync<1, kWorkerThreads>();
    s[0] = s[1] = s[2] = s[3] = 0;
#pragma unroll
    for (int w = 0; w < kWorkers; ++w) {
      const Quad x = all[w][lane];
      s[0] += x.x, s[1] += x.y, s[2] += x.z, s[3] += x.w;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (t() + (j & 1) + j / 2 * 8 >= count) s[j] = -INFINITY;
  }

  // Moves the maximum, and turns scores into weights relative to it.
  FLR_DEVICE void softmax(float (&s)[4]) {
    float high = fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3]));
    high = fmaxf(high, shuffle_xor(high, 1));
    high = fmaxf(fmaxf(high, shuffle_xor(high, 2)), top);
    const bool moved = high > top;
    const float shift = top == -INFINITY ? 0.f : top - high;
    const float r = top == -INFINITY ? 0.f : exp2_fast(shift * kLog2e);
    below = r * (below + shift * total), total *= r, top = high;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float x = s[j] - top;
      s[j] = exp2_fast(x * kLog2e);
      total += s[j], below += s[j] > 0 ? s[j] * x : 0.f;
    }
    if (ballot(moved) == 0) return;  // the same in every worker
    const float a = shuffle(r, 4 * t()), b = shuffle(r, 4 * t() + 4);
#pragma unroll
    for (int i = 0; i < kAll; ++i) sums[i][0] *= a, sums[i][1] *= b, sums[i][2] *= a, sums[i][3] *= b;
    pairs[0] *= r * a, pairs[1] *= r * b;
  }

  // Weights as two 16-bit numbers each, high and rest; the chunks are free afterwards.
  FLR_DEVICE void pool(const float (&s)[4]) {
    float q[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) q[j] = s[j] * T::kScale;
    const uint32_t h0 = T::pack(q[0], q[1]), h1 = T::pack(q[2], q[3]);
    const auto a = T::unpack(h0), b = T::unpack(h1);
    const uint32_t l0 = T::pack(q[0] - a.x, q[1] - a.y), l1 = T::pack(q[2] - b.x, q[3] - b.y);
    if (warp == 0) {
      T::mma(pairs, h0, 0, h1, 0, h0, h1);
      T::mma(pairs, h0, 0, h1, 0, l0, l1);
      T::mma(pairs, l0, 0, l1, 0, h0, h1);
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c >= task.plan.chunks) break;
      const Slot here = slot_of(c);
      const uint16_t* at = rows(here);
#pragma unroll
      for (int i = 0; i < kStrips; ++i) {
        uint32_t x[4];
        ldmatrix<true>(x, at + 16 * i);
        T::mma(sums[c * kStrips + i], x[0], x[1], x[2], x[3], h0, h1);
        T::mma(sums[c * kStrips + i], x[0], x[1], x[2], x[3], l0, l1);
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
      float s[4];
      scores(s, from, count);
      softmax(s);
      pool(s);
    }
    total += shuffle_xor(total, 1), total += shuffle_xor(total, 2);
    below += shuffle_xor(below, 1), below += shuffle_xor(below, 2);
  }

  // A whole user was here: results straight from registers.
  FLR_DEVICE void store(int64_t user) {
    const auto& p = task.p;
    const float inverse = total == 0 ? 0.f : 1 / total;
    const float a = shuffle(inverse, 4 * t()), b = shuffle(inverse, 4 * t() + 4);
    float *even = p.context + (user * p.factors + t()) * p.size, *odd = even + p.size;
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int d = column(i) + g() + 8 * j;
        if (d >= p.size) continue;
        if (t() < p.factors) even[d] = sums[i][2 * j] * (a / T::kScale);
        if (t() + 1 < p.factors) odd[d] = sums[i][2 * j + 1] * (b / T::kScale);
      }
    }
    if (warp != 0 || g() >= p.factors) return;
    const int64_t factor = user * p.factors + g();
    const float scale = inverse / (T::kScale * T::kScale);
    if (t() < p.factors) p.overlap[factor * p.factors + t()] = pairs[0] * scale * a;
    if (t() + 1 < p.factors) p.overlap[factor * p.factors + t() + 1] = pairs[1] * scale * b;
    if (t() != 0) return;
    p.lse[factor] = total == 0 ? -INFINITY : top + logf(total);
    p.entropy[factor] = total == 0 ? 0.f : logf(total) - below * inverse;
  }

  // Statistics of factor k over the cluster, and every block's weight.
  FLR_DEVICE void combine_factor(int64_t user, int k) {
    const int cluster = task.plan.cluster;
    float high = -INFINITY, sum = 0, logits = 0;
    for (int q = 0; q < cluster; ++q) high = fmaxf(high, remote(&control.stats[0][k], q)[0]);
    for (int q = 0; q < cluster; ++q) {
      const float* stats = remote(&control.stats[0][k], q);  // then every eighth
      const float shift = stats[0] == -INFINITY ? 0.f : stats[0] - high;
      const float weight = stats[0] == -INFINITY ? 0.f : expf(shift);
      control.weights[q][k] = weight;
      sum += weight * stats[8], logits += weight * (stats[16] + shift * stats[8]);
    }
    const float inverse = sum == 0 ? 0.f : 1 / sum;
    for (int q = 0; q < cluster; ++q) control.weights[q][k] *= inverse / T::kScale;
    if (rank != 0) return;
    const int64_t factor = user * task.p.factors + k;
    task.p.lse[factor] = sum == 0 ? -INFINITY : high + logf(sum);
    task.p.entropy[factor] = sum == 0 ? 0.f : logf(sum) - logits * inverse;
  }

  // Each block of the cluster writes its share of the columns.
  FLR_DEVICE void combine(int64_t user) {
    const auto& p = task.p;
    const int pitch = task.plan.chunks * C::CHUNK + 4, cluster = task.plan.cluster, thread = 32 * warp + lane;
    bar_sync<1, kWorkerThreads>();  // no worker needs the ring any more
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      if (i / kStrips >= task.plan.chunks) break;
      float* at = part + t() * pitch + column(i) + g();
      if (t() < p.factors) at[0] = sums[i][0], at[8] = sums[i][2];
      if (t() + 1 < p.factors) at[pitch] = sums[i][1], at[pitch + 8] = sums[i][3];
    }
    if (warp == 0) {
      if (t() == 0) control.stats[0][g()] = top, control.stats[1][g()] = total, control.stats[2][g()] = below;
      control.pairs[g()][t()] = pairs[0], control.pairs[g()][t() + 1] = pairs[1];
    }
    cluster_sync();
    if (thread < p.factors) combine_factor(user, thread);
    bar_sync<1, kWorkerThreads>();
    const int quads = p.size / 4, each = (quads + cluster - 1) / cluster;
    for (int i = thread; i < p.factors * each; i += kWorkerThreads) {
      const int k = i / each, quad = rank * each + i % each, d = 4 * quad;
      if (quad >= quads) continue;
      Quad sum{0, 0, 0, 0};
      for (int q = 0; q < cluster; ++q) {
        const Quad x = *remote(reinterpret_cast<const Quad*>(part + k * pitch + d), q);
        const float weight = control.weights[q][k];
        sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
      }
      *reinterpret_cast<Quad*>(p.context + (user * p.factors + k) * p.size + d) = sum;
    }
    if (rank == 0 && thread < p.factors * p.factors) {
      const int k = thread / p.factors, j = thread % p.factors;
      float sum = 0;
      for (int q = 0; q < cluster; ++q)
        sum += control.weights[q][k] * control.weights[q][j] * remote(&control.pairs[k][j], q)[0];
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
      if (task.plan.cluster > 1) combine(users.user());
      else store(users.user());
    }
  }
};

template <class T, class C>
__global__ void __launch_bounds__(kThreads, 1) factor_attention_forward(const __grid_constant__ Task task) {
  FLR_DYNAMIC_SHARED(memory);
  Control& control = *reinterpret_cast<Control*>(memory);
  uint16_t* ring = reinterpret_cast<uint16_t*>(memory + sizeof(Control));
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
    mbar_fence();
  }
  if (C::kChunks == 1) {  // columns from D on, of every slot's rows
    const int pieces = (C::CHUNK - task.p.size) / 8;
    for (int i = threadIdx.x; i < task.plan.stages * kTokens * pieces; i += kThreads)
      reinterpret_cast<Quad*>(ring + i / pieces * C::kPitch + task.p.size)[i % pieces] = Quad{0, 0, 0, 0};
  }
  __syncthreads();
  if (warp >= kWorkers) {
    fewer_registers<kProducerRegisters>();
    Producer<C>(task, control, ring, queries, warp - kWorkers, lane, rank).run();
  } else {
    more_registers<kWorkerRegisters>();
    Worker<T, C>(task, control, ring, queries, warp, lane, rank).run();
  }
}

}  // namespace flr
