// factor_attention's backward: every valid token of H is read from memory once, and its gradient takes its place in
// the ring and goes to memory from there; masked tokens are never read, and get zeros.
//
// Blocks, clusters and the ring are the forward's (factor_attention.cuh). In shared memory lie twelve rows of D
// columns: queries u_k, and gradients dc_k of the context as two bfloat16 numbers, high and rest. One product of the
// tensor core of these rows with eight tokens has both s_kl = u_k · h_l and dc_k · h_l; one of a tile's weights, ds and
// α, with the same rows has dh_l = Σ_k α_kl dc_k + ds_kl u_k, which is written over the tile; one of the tile with ds
// has du_k = Σ_l ds_kl h_l, which stays in registers over all tiles. A worker owns every eighth strip of 16 columns, so
// nobody else reads what it overwrites. Every order is fixed. The formulas are in ops/factor_attention/op.py.
#pragma once
#include "factor_attention_producer.cuh"

namespace flr {

constexpr int kGradientRows = 3 * kGradientFactors;

struct alignas(128) GradientControl {
  Quad scores[2][kWorkers][32];  // of a tile, a worker's part each; two tiles in turn
  float delta[kWorkers][kGradientFactors];
  Mbarrier full[kMaxStages], empty[kMaxStages], drained;
  int64_t rows[kMaxStages][kTokens];  // where in dH a slot's rows go; -1: nowhere
  int columns[kMaxStages][kTokens];   // how many of them
  int tile[kMaxStages];               // number of tokens; 256 more for a user's last tile
  int tokens[kProducers][32 * kSearch + kTokens];
};

// Columns in registers, how many of them come in one copy, and tokens of a tile.
template <int D_, int CHUNK_, int TOKENS>
struct GradientColumns {
  static constexpr int D = D_, CHUNK = CHUNK_, kChunks = D / CHUNK, kStrips = CHUNK / 16 / kWorkers;
  static constexpr int kTile = TOKENS, kTileRows = kTile / kProducers;
  static constexpr int kPitch = CHUNK + 8, kSlot = kPitch * kTile;
  static constexpr int kQueryPitch = D + 8;
  static constexpr int kRoom = kSharedLimit - int(sizeof(GradientControl)) - 2 * kGradientRows * kQueryPitch;
  static constexpr int kStages = kRoom / (2 * kSlot) < kMaxStages ? kRoom / (2 * kSlot) : kMaxStages;
  static constexpr int kSharedBytes = kSharedLimit - kRoom + 2 * kSlot * kStages;
  static_assert(D % CHUNK == 0 && CHUNK % (16 * kWorkers) == 0 && CHUNK <= kMaxChunk);
  static_assert(kTile == 8 || kTile == 16);
  static_assert(kStages > kChunks, "a tile has to fit, and something of the next");
  static_assert(2 * kSlot * kStages >= 4 * kGradientFactors * (D + 4), "the sums have to fit where the ring was");
};

struct GradientTask {
  AttentionProblem p;
  AttentionGradients d;
  Plan plan;  // chunks, stages, cluster, grid and shared_bytes
};

template <class C>
Plan make_gradient_plan(const AttentionProblem& p, const Room& device) {
  Plan plan{};
  set_grid(plan, p, device);
  plan.chunks = (p.size + C::CHUNK - 1) / C::CHUNK;
  plan.stages = C::kStages, plan.shared_bytes = C::kSharedBytes;
  return plan;
}

// One of the warps that fill the ring and empty it: of every tile its kTileRows rows, a lane a row.
template <class C>
struct GradientProducer {
  const GradientTask& task;
  GradientControl& control;
  uint16_t* ring;
  int *tokens, warp, lane, rank, mine, masked = 0;
  Slot slot;

  FLR_DEVICE GradientProducer(const GradientTask& task, GradientControl& control, uint16_t* ring, int warp, int lane,
                              int rank)
      : task(task), control(control), ring(ring), tokens(control.tokens[warp]), warp(warp), lane(lane), rank(rank),
        mine(C::kTileRows * warp + lane) {
    if (lane < C::kTileRows)
      for (int i = 0; i < C::kStages; ++i) control.rows[i][mine] = -1;
  }

  FLR_DEVICE uint16_t* row() const { return ring + slot.index * C::kSlot + mine * C::kPitch; }

  // Waits until the workers are done with the slot; sends its gradients to memory, and waits until they are read.
  FLR_DEVICE void retire() {
    mbar_wait(&control.empty[slot.index], slot.phase ^ 1);
    __syncwarp();  // a lane that still waits must not miss this phase for the next
    if (task.d.dh == nullptr || lane >= C::kTileRows) return;
    const int64_t to = control.rows[slot.index][mine];
    if (to < 0) return;
    bulk_store(static_cast<uint16_t*>(task.d.dh) + to, row(), uint32_t(2 * control.columns[slot.index][mine]));
    bulk_wait_read();
  }

  // A tile of `count` tokens from the list, rows of zeros after them; without any, one slot that says so.
  FLR_DEVICE void send_tile(int64_t user, int first, int count, bool last) {
    const auto& p = task.p;
    const int chunks = count > 0 ? task.plan.chunks : 1;
    const bool is_row = lane < C::kTileRows, is_token = is_row && mine < count;
    const int token = is_token ? tokens[first + mine] : 0;
    const uint16_t* from = static_cast<const uint16_t*>(p.h) + user * p.h_b + token * p.h_l;
    for (int c = 0; c < chunks; ++c) {
      const int left = p.size - c * C::CHUNK, columns = left < C::CHUNK ? left : C::CHUNK;
      Mbarrier* full = &control.full[slot.index];
      retire();
      if (lane == 0) {
        if (c == 0 && warp == 0) control.tile[slot.index] = count | int(last) << 8;
        if (count > 0) mbar_expect(full, uint32_t(C::kTileRows * 2 * columns));
        else mbar_arrive(full);
      }
      __syncwarp();
      if (is_row) {
        control.rows[slot.index][mine] = is_token ? (user * p.length + token) * p.size + c * C::CHUNK : -1;
        control.columns[slot.index][mine] = columns;
        if (count > 0) bulk_copy(row(), is_token ? from + c * C::CHUNK : kZeros, uint32_t(2 * columns), full);
      }
      slot.advance(1, C::kStages);
    }
  }

  // Every fourth of the masked tokens is this warp's.
  FLR_DEVICE void clear(int64_t user, int base, unsigned bits) {
    if (task.d.dh == nullptr) return;
    for (; bits != 0; bits &= bits - 1) {
      if (masked++ % kProducers != warp) continue;
      const int64_t token = user * task.p.length + base + ones((bits & (~bits + 1)) - 1);
      Quad* to = reinterpret_cast<Quad*>(static_cast<uint16_t*>(task.d.dh) + token * task.p.size);
      for (int i = lane; i < task.p.size / 8; i += 32) to[i] = Quad{0, 0, 0, 0};
    }
  }

  FLR_DEVICE void run() {
    for (Users users(task); users.more(); users.index += users.step) {
      const int64_t user = users.user();
      walk_tokens<C::kTile>(
          task.p, user, rank, task.plan.cluster, lane, tokens,
          [&](int first, int count, bool last) { send_tile(user, first, count, last); },
          [&](int base, unsigned bits) { clear(user, base, bits); });
    }
    for (int i = 0; i < C::kStages; ++i) {
      retire();
      slot.advance(1, C::kStages);
    }
    __syncwarp();
    if (lane == 0) mbar_arrive(&control.drained);
    bulk_wait_written();
  }
};

// One of the worker warps. After the exchange lane 4 g + t / 2 holds of scores and weights: factor g % 4, tokens t and
// t + 1 of the tile's first eight (g < 4) or second; of sums: columns g and g + 8 of every strip, factors t and t + 1
// (t < 4) or what their high halves leave.
template <class C>
struct GradientWorker {
  using T = Bfloat16;
  static constexpr int kStrips = C::kStrips, kAll = C::kChunks * kStrips;
  static constexpr bool kTwo = C::kTile == 16;  // groups of eight tokens
  const GradientTask& task;
  GradientControl& control;
  uint16_t *ring, *queries;
  int warp, lane, rank, turn = 0;
  Slot slot;
  float sums[kAll][4], lse, delta, d_entropy, pairs[4];

  FLR_DEVICE GradientWorker(const GradientTask& task, GradientControl& control, uint16_t* ring, uint16_t* queries,
                            int warp, int lane, int rank)
      : task(task), control(control), ring(ring), queries(queries), warp(warp), lane(lane), rank(rank) {}

  FLR_DEVICE int g() const { return lane / 4; }
  FLR_DEVICE int t() const { return lane % 4 * 2; }
  FLR_DEVICE int factor() const { return g() % kGradientFactors; }
  FLR_DEVICE bool is_upper() const { return lane >= 16; }
  FLR_DEVICE int column(int i) const { return i / kStrips * C::CHUNK + (i % kStrips * kWorkers + warp) * 16; }

  FLR_DEVICE Slot slot_of(int chunk) const {
    Slot s = slot;
    s.advance(chunk, C::kStages);
    return s;
  }
  // Where this lane's row is for ldmatrix and stmatrix, of a slot's strip of column 0 and of the twelve rows.
  FLR_DEVICE uint16_t* history_rows(const Slot& s) const {
    return ring + s.index * C::kSlot + (lane % 8 + (kTwo ? lane / 16 * 8 : 0)) * C::kPitch + lane / 8 % 2 * 8;
  }
  FLR_DEVICE const uint16_t* query_rows() const {  // rows 12 to 15 have weight 0
    return queries + (lane % 8 + lane / 8 % 2 * 8) % kGradientRows * C::kQueryPitch + lane / 16 * 8;
  }
  FLR_DEVICE void release(Mbarrier* barrier) const {
    __syncwarp();
    if (lane == 0) mbar_arrive(barrier);
  }

  // Writes this thread's columns of factor k's three rows; its share of dc_k · c_k.
  FLR_DEVICE float load_factor(int64_t user, int k) {
    const auto& p = task.p;
    const int64_t row = (user * p.factors + k) * p.size;
    const bool real = k < p.factors;
    float product = 0;
    for (int d = (32 * warp + lane) * 4; d < p.size; d += 4 * kWorkerThreads) {
      Words *u = reinterpret_cast<Words*>(queries + k * C::kQueryPitch + d), zero{0, 0};
      Words *high = u + kGradientFactors * C::kQueryPitch / 4, *low = high + kGradientFactors * C::kQueryPitch / 4;
      if (!real) {
        *u = *high = *low = zero;
        continue;
      }
      const Quad x = *reinterpret_cast<const Quad*>(task.d.context + row + d);
      const Quad y = *reinterpret_cast<const Quad*>(p.context + row + d);
      product += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
      *u = *reinterpret_cast<const Words*>(static_cast<const uint16_t*>(p.u) + user * p.u_b + k * p.u_k + d);
      *high = Words{T::pack(x.x, x.y), T::pack(x.z, x.w)};
      const auto a = T::unpack(high->low), b = T::unpack(high->high);
      *low = Words{T::pack(x.x - a.x, x.y - a.y), T::pack(x.z - b.x, x.w - b.y)};
    }
    return product;
  }

  FLR_DEVICE void start_user(int64_t user) {
    const auto& p = task.p;
    // nobody reads the rows of the user before
    bar_sync<1, kWorkerThreads>();
#pragma unroll
    for (int k = 0; k < kGradientFactors; ++k) {
      float product = load_factor(user, k);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) product += shuffle_xor(product, step);
      if (lane == 0) control.delta[warp][k] = product;
    }
    bar_sync<1, kWorkerThreads>();
    const int k = factor(), last = p.factors - 1;
    const int64_t at = user * p.factors + (k < last ? k : last);
    lse = p.lse[at], d_entropy = task.d.entropy[at];
    delta = d_entropy * p.entropy[at] - task.d.lse[at];
#pragma unroll
    for (int w = 0; w < kWorkers; ++w) delta += control.delta[w][k];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // with factor k ^ i
      const int j = k ^ i;
      const bool real = k < p.factors && j < p.factors;
      const int64_t across = (user * p.factors + (real ? j : 0)) * p.factors + (real ? k : 0);
      const int64_t down = at * p.factors + (real ? j : 0);
      pairs[i] = real ? task.d.overlap[down] + task.d.overlap[across] : 0.f;
      delta += real ? pairs[i] * p.overlap[down] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kAll; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
  }

  // Scores and dc · h of a tile, those of this lane's factor and two tokens.
  FLR_DEVICE void products(float (&s)[2], float (&dp)[2]) {
    float s0[4] = {}, s1[4] = {};
#pragma unroll
    for (int c = 0; c < C::kChunks; ++c) {
      if (c >= task.plan.chunks) break;
      const Slot here = slot_of(c);
      mbar_wait(&control.full[here.index], here.phase);
      const uint16_t *at = history_rows(here), *rows = query_rows();
#pragma unroll
      for (int i = c * kStrips; i < (c + 1) * kStrips; ++i) {
        if (column(i) >= task.p.size) break;
        uint32_t q[4], x[4];
        ldmatrix<false>(q, rows + column(i));
        ldmatrix<false>(x, at + column(i) - c * C::CHUNK);
        T::mma(s0, q[0], q[1], q[2], q[3], x[0], x[1]);
        if (kTwo) T::mma(s1, q[0], q[1], q[2], q[3], x[2], x[3]);
      }
    }
    // rows g are u's below 4 and dc's high ones from there, rows g + 8 dc's low ones: a lane gives and takes half
    float given[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) given[j] = shuffle_xor(is_upper() ? s0[j] : s1[j], 16);
    Quad(&all)[kWorkers][32] = control.scores[turn];
    turn ^= 1;
    all[warp][lane] = is_upper() ? Quad{given[0], given[1], given[2] + s1[0], given[3] + s1[1]}
                                 : Quad{s0[0], s0[1], s0[2] + given[0], s0[3] + given[1]};
    bar_sync<1, kWorkerThreads>();
    s[0] = s[1] = dp[0] = dp[1] = 0;
#pragma unroll
    for (int w = 0; w < kWorkers; ++w) {
      const Quad x = all[w][lane];
      s[0] += x.x, s[1] += x.y, dp[0] += x.z, dp[1] += x.w;
    }
  }

  // s and dp become α and ds.
  FLR_DEVICE void weights(float (&s)[2], float (&dp)[2], int count) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const bool live = factor() < task.p.factors && g() / 4 * 8 + t() + j < count;
      const float log_weight = live ? s[j] - lse : 0.f, weight = live ? exp2_fast(log_weight * kLog2e) : 0.f;
      float x = dp[j] + pairs[0] * weight - (weight > 0 ? d_entropy * log_weight : 0.f);
#pragma unroll
      for (int i = 1; i < 4; ++i) x += pairs[i] * shuffle_xor(weight, 4 * i);
      s[j] = weight, dp[j] = live ? weight * (x - delta) : 0.f;
    }
  }

  // ds as a [16 tokens, 8] operand: column g is factor g's high half, column g + 4 what it leaves.
  FLR_DEVICE void by_factor(const float (&ds)[2], uint32_t (&b)[2]) const {
    const float x = shuffle_xor(ds[0], 16), y = shuffle_xor(ds[1], 16);
    const float values[2][2] = {{is_upper() ? x : ds[0], is_upper() ? y : ds[1]},
                                {is_upper() ? ds[0] : x, is_upper() ? ds[1] : y}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t high = T::pack(values[i][0], values[i][1]);
      const auto rounded = T::unpack(high);
      b[i] = is_upper() ? T::pack(values[i][0] - rounded.x, values[i][1] - rounded.y) : high;
    }
  }

  // Weights as a [16 tokens, 16] operand whose columns are the twelve rows': ds, α, α; from pairs of tokens a lane.
  FLR_DEVICE void by_token(uint32_t ds, uint32_t weight, uint32_t (&a)[4]) const {
    const int first = lane % 2 * 2;  // of two factors
    const bool is_weight = lane % 4 >= 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int from = 4 * (first + 4 * i) + g() / 2;
      const uint32_t x = shuffle(ds, from), y = shuffle(ds, from + 4);
      const uint32_t z = shuffle(weight, from), w = shuffle(weight, from + 4);
      const uint32_t low = is_weight ? z : x, high = is_weight ? w : y;
      a[i] = g() % 2 ? (low >> 16) | (high & 0xffff0000u) : (low & 0xffffu) | (high << 16);
      const uint32_t other = shuffle(a[i], lane ^ 2);
      a[2 + i] = is_weight ? 0 : other;
    }
  }

  FLR_DEVICE void gradients(const float (&weight)[2], const float (&ds)[2]) {
    uint32_t b[2], high[4], low[4];
    by_factor(ds, b);
    const uint32_t d = T::pack(ds[0], ds[1]), w = T::pack(weight[0], weight[1]);
    const auto x = T::unpack(d), y = T::unpack(w);
    by_token(d, w, high);
    by_token(T::pack(ds[0] - x.x, ds[1] - x.y), T::pack(weight[0] - y.x, weight[1] - y.y), low);
    const bool needs_dh = task.d.dh != nullptr;
#pragma unroll
    for (int c = 0; c < C::kChunks; ++c) {
      if (c >= task.plan.chunks) break;
      const Slot here = slot_of(c);
      uint16_t* at = history_rows(here);
      const uint16_t* rows = query_rows();
#pragma unroll
      for (int i = c * kStrips; i < (c + 1) * kStrips; ++i) {
        if (column(i) >= task.p.size) break;
        uint32_t h[4], q[4];
        ldmatrix<true>(h, at + column(i) - c * C::CHUNK);
        T::mma(sums[i], h[0], h[1], h[2], h[3], b[0], b[1]);
        if (!needs_dh) continue;
        float left[4] = {}, right[4] = {};  // columns 0 to 7 and 8 to 15
        ldmatrix<true>(q, rows + column(i));
        T::mma(left, high[0], high[1], high[2], high[3], q[0], q[1]);
        T::mma(right, high[0], high[1], high[2], high[3], q[2], q[3]);
        T::mma(left, low[0], low[1], 0, 0, q[0], q[1]);
        T::mma(right, low[0], low[1], 0, 0, q[2], q[3]);
        const uint32_t out[4] = {T::pack(left[0], left[1]), T::pack(right[0], right[1]), T::pack(left[2], left[3]),
                                 T::pack(right[2], right[3])};
        stmatrix<kTwo>(at + column(i) - c * C::CHUNK, out);
      }
      fence_async();  // what was written here is read by bulk copies
      release(&control.empty[here.index]);
    }
    slot.advance(task.plan.chunks, C::kStages);
  }

  FLR_DEVICE void tiles() {
    for (bool last = false; !last;) {
      mbar_wait(&control.full[slot.index], slot.phase);
      const int tile = control.tile[slot.index], count = tile & 255;
      last = tile > 255;
      if (count == 0) {  // a user, or a block's share of one, without a valid token
        release(&control.empty[slot.index]);
        slot.advance(1, C::kStages);
        return;
      }
      float s[2], dp[2];
      products(s, dp);
      weights(s, dp, count);
      gradients(s, dp);
    }
  }

  // High halves and rests together, in lanes of t < 4.
  FLR_DEVICE void add_rests() {
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] += shuffle_xor(sums[i][j], 2);
    }
  }

  // A whole user was here.
  FLR_DEVICE void store(int64_t user) {
    const auto& p = task.p;
    if (t() >= kGradientFactors) return;
    uint16_t* to = static_cast<uint16_t*>(task.d.du) + user * p.factors * p.size;
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      if (column(i) >= p.size) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = t() + j % 2;
        if (k < p.factors) to[k * p.size + column(i) + g() + j / 2 * 8] = uint16_t(T::pack(sums[i][j], 0));
      }
    }
  }

  // Each block of the cluster writes its share of the columns.
  FLR_DEVICE void combine(int64_t user) {
    constexpr int kPartPitch = C::D + 4;
    const auto& p = task.p;
    float* part = reinterpret_cast<float*>(ring);
    const int cluster = task.plan.cluster, thread = 32 * warp + lane;
    mbar_wait(&control.drained, 0);  // the ring is no longer one
    if (t() < kGradientFactors) {
#pragma unroll
      for (int i = 0; i < kAll; ++i) {
        if (column(i) >= p.size) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) part[(t() + j % 2) * kPartPitch + column(i) + g() + j / 2 * 8] = sums[i][j];
      }
    }
    cluster_sync();
    const int quads = p.size / 4, each = (quads + cluster - 1) / cluster;
    for (int i = thread; i < p.factors * each; i += kWorkerThreads) {
      const int k = i / each, quad = rank * each + i % each;
      if (quad >= quads) continue;
      Quad sum{0, 0, 0, 0};
      for (int q = 0; q < cluster; ++q) {
        const Quad x = *remote(reinterpret_cast<const Quad*>(part + k * kPartPitch + 4 * quad), q);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
      uint16_t* to = static_cast<uint16_t*>(task.d.du) + (user * p.factors + k) * p.size + 4 * quad;
      *reinterpret_cast<Words*>(to) = Words{T::pack(sum.x, sum.y), T::pack(sum.z, sum.w)};
    }
    // nobody leaves while others read from it
    cluster_sync();
  }

  FLR_DEVICE void run() {
    for (Users users(task); users.more(); users.index += users.step) {
      start_user(users.user());
      tiles();
      add_rests();
      if (task.plan.cluster > 1) combine(users.user());
      else store(users.user());
    }
  }
};

template <class C>
__global__ void __launch_bounds__(kThreads, 1) factor_attention_backward(const __grid_constant__ GradientTask task) {
  FLR_DYNAMIC_SHARED(memory);
  GradientControl& control = *reinterpret_cast<GradientControl*>(memory);
  uint16_t* ring = reinterpret_cast<uint16_t*>(memory + sizeof(GradientControl));
  uint16_t* queries = ring + C::kStages * C::kSlot;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = int(cluster_rank());
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      mbar_init(&control.full[i], kProducers);
      mbar_init(&control.empty[i], kWorkers);
    }
    mbar_init(&control.drained, kProducers);
    mbar_fence();
  }
  __syncthreads();
  if (warp >= kWorkers) {
    fewer_registers<kProducerRegisters>();
    GradientProducer<C>(task, control, ring, warp - kWorkers, lane, rank).run();
  } else {
    more_registers<kWorkerRegisters>();
    GradientWorker<C>(task, control, ring, queries, warp, lane, rank).run();
  }
}

}  // namespace flr
