// factor_attention's backward: every valid token of H is read from memory once, and its gradient takes its place in
// the ring and goes to memory from there; masked tokens are never read, and get zeros.
//
// Blocks, clusters and the ring are the forward's (factor_attention.cuh). In shared memory lie rows of D columns: four
// queries u_k, and four gradients dc_k of the context as bfloat16 numbers and, up to 2048 columns, what those leave.
// One product of the tensor core of these rows with eight tokens has both s_kl = u_k · h_l and dc_k · h_l; one of a
// tile's weights, ds and α, with the same rows has dh_l = Σ_k α_kl dc_k + ds_kl u_k, which is written over the tile; one
// of the tile with ds has du_k = Σ_l ds_kl h_l, which stays in registers over all tiles. A worker owns every eighth
// strip of 16 columns, so nobody else reads what it overwrites; it loads strips in pairs, the next before it stores.
// Beyond 2048 columns tiles have eight tokens: a second one has to fit beside the rows. Every order is fixed. The
// formulas are in ops/factor_attention/op.py.
#pragma once
#include "factor_attention_backward_pair.cuh"

namespace flr {

// One of the worker warps. After the exchange lane 4 g + t / 2 holds of scores and weights: factor g % 4, tokens t and
// t + 1 of the tile's first eight (g < 4) or second, if it has them; of sums: columns g and g + 8 of every strip, factors
// t and t + 1 (t < 4) or what their high halves leave.
template <class C>
struct GradientWorker : Place<GradientTask, C::kSplit> {
  using Here = Place<GradientTask, C::kSplit>;
  using Here::task;
  using T = Bfloat16;
  using Pair = StripPair<C>;
  using Fragment = typename Pair::Fragment;
  static constexpr int kStrips = C::kStrips, kAll = C::kChunks * kStrips, kApart = Pair::kApart;
  static constexpr bool kWide = C::kWide;
  typename C::Control& control;
  uint16_t *ring, *queries;
  int warp, lane, turn = 0;
  uint32_t crossings = 0;
  Slot slot;
  float sums[kAll][4], lse, delta, d_entropy, pairs[4];

  FLR_DEVICE GradientWorker(const GradientTask& task, typename C::Control& control, uint16_t* ring, uint16_t* queries,
                            int warp, int lane, int rank)
      : Here(task, rank), control(control), ring(ring), queries(queries), warp(warp), lane(lane) {}

  FLR_DEVICE int g() const { return lane / 4; }
  FLR_DEVICE int t() const { return lane % 4 * 2; }
  FLR_DEVICE int factor() const { return g() % kGradientFactors; }
  FLR_DEVICE bool is_upper() const { return lane >= 16; }
  FLR_DEVICE int column(int i) const { return i / kStrips * C::CHUNK + i % kStrips * kApart + 16 * warp; }

  FLR_DEVICE Slot slot_of(int chunk) const { return slot.after(chunk, C::kStages); }
  // This lane's row of a slot's first strip and of the rows': with tiles of sixteen tokens of one strip, [16, 16]; with
  // tiles of eight of two strips, [8, 16] each.
  FLR_DEVICE uint16_t* history_rows(const Slot& s) const {
    const int row = lane % 8 + (kWide ? 0 : lane / 16 * 8), strip = kWide ? lane / 16 : 0;
    return ring + s.index * C::kSlot + row * C::kPitch + lane / 8 % 2 * 8 + strip * kApart + 16 * warp;
  }
  FLR_DEVICE const uint16_t* query_rows() const {  // rows 12 to 15 have weight 0; 4 to 7 are of other banks than 8 to 11
    if (kWide) return queries + lane % 8 * C::kQueryPitch + lane / 8 % 2 * 8 + lane / 16 * kApart + 16 * warp;
    const int row = lane % 16 < C::kRows ? lane % 16 : lane % 16 - 8;
    return queries + row * C::kQueryPitch + lane / 16 * 8 + 16 * warp;
  }

  // Writes this thread's columns of the rows, and its shares of dc_k · c_k.
  FLR_DEVICE void load_rows(int64_t user, float (&products)[kGradientFactors]) {
    const auto& p = task.p;
    const int first = Here::first_column(), size = Here::size();
    for (int d = (32 * warp + lane) * 4; d < size; d += 4 * kWorkerThreads) {
      Quad x[kGradientFactors], y[kGradientFactors];
      Words u[kGradientFactors];
#pragma unroll
      for (int k = 0; k < kGradientFactors; ++k) {  // all loads in flight
        x[k] = y[k] = Quad{0, 0, 0, 0}, u[k] = Words{0, 0};
        if (k >= p.factors) continue;
        const int64_t at = (user * p.factors + k) * p.size + first + d;
        x[k] = *reinterpret_cast<const Quad*>(task.d.context + at);
        y[k] = *reinterpret_cast<const Quad*>(p.context + at);
        const uint16_t* row = static_cast<const uint16_t*>(p.u) + user * p.u_b + k * p.u_k + first;
        u[k] = *reinterpret_cast<const Words*>(row + d);
      }
#pragma unroll
      for (int k = 0; k < kGradientFactors; ++k) {
        uint16_t *to = queries + k * C::kQueryPitch + d, *high = to + kGradientFactors * C::kQueryPitch;
        const Words rounded{T::pack(x[k].x, x[k].y), T::pack(x[k].z, x[k].w)};
        const auto a = T::unpack(rounded.low), b = T::unpack(rounded.high);
        const Quad rest{x[k].x - a.x, x[k].y - a.y, x[k].z - b.x, x[k].w - b.y};
        *reinterpret_cast<Words*>(to) = u[k], *reinterpret_cast<Words*>(high) = rounded;
        products[k] += a.x * y[k].x + a.y * y[k].y + b.x * y[k].z + b.y * y[k].w;
        if (kWide) continue;
        *reinterpret_cast<Words*>(high + kGradientFactors * C::kQueryPitch) =
            Words{T::pack(rest.x, rest.y), T::pack(rest.z, rest.w)};
        products[k] += rest.x * y[k].x + rest.y * y[k].y + rest.z * y[k].z + rest.w * y[k].w;
      }
    }
  }

  FLR_DEVICE void start_user(int64_t user) {
    const auto& p = task.p;
    float products[kGradientFactors] = {};
    // nobody reads the rows of the user before
    bar_sync<1, kWorkerThreads>();
    load_rows(user, products);
#pragma unroll
    for (int k = 0; k < kGradientFactors; ++k) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) products[k] += shuffle_xor(products[k], step);
      if (lane == 0) control.delta[warp][k] = products[k];
    }
    bar_sync<1, kWorkerThreads>();
    const int k = factor(), last = p.factors - 1;
    const int64_t at = user * p.factors + (k < last ? k : last);
    lse = p.lse[at], d_entropy = task.d.entropy[at];
    delta = d_entropy * p.entropy[at] - task.d.lse[at];
    if constexpr (C::kSplit) {
      float sum[1][4] = {};
#pragma unroll
      for (int w = 0; w < kWorkers; ++w) sum[0][0] += control.delta[w][k];
      cross(*this, control, crossings, warp, lane, sum);
      delta += sum[0][0];
    } else {
#pragma unroll
      for (int w = 0; w < kWorkers; ++w) delta += control.delta[w][k];
    }
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
    float part[4][4] = {};
#pragma unroll
    for (int c = 0; c < C::kChunks; ++c) {
      if (c >= task.plan.chunks) break;
      const Slot here = slot_of(c);
      mbar_wait(&control.full[here.index], here.phase);
      const uint16_t *at = history_rows(here), *rows = query_rows() + c * C::CHUNK;
      if ((c + 1) * C::CHUNK <= Here::size()) {
#pragma unroll
        for (int i = 0; i < kStrips; i += 2) Pair::multiply(part, at + i * kApart, rows + i * kApart, true);
      } else {
        for (int i = 0; i < kStrips && column(c * kStrips + i) < Here::size(); i += 2)
          Pair::multiply(part, at + i * kApart, rows + i * kApart, column(c * kStrips + i + 1) < Here::size());
      }
    }
    Quad(&all)[kWorkers][32] = control.scores[turn];
    turn ^= 1;
    all[warp][lane] = kWide ? gather(part[0], part[1]) : gather_two(part);
    bar_sync<1, kWorkerThreads>();
    s[0] = s[1] = dp[0] = dp[1] = 0;
#pragma unroll
    for (int w = 0; w < kWorkers; ++w) {
      const Quad x = all[w][lane];
      s[0] += x.x, s[1] += x.y, dp[0] += x.z, dp[1] += x.w;
    }
    if constexpr (C::kSplit) {
      float both[1][4] = {{s[0], s[1], dp[0], dp[1]}};
      cross(*this, control, crossings, warp, lane, both);
      s[0] = both[0][0], s[1] = both[0][1], dp[0] = both[0][2], dp[1] = both[0][3];
    }
  }

  // Rows g are u's below 4 and dc's from there: the halves of a warp give each other theirs.
  FLR_DEVICE Quad gather(const float (&a)[4], const float (&b)[4]) const {
    const float x = a[0] + b[0], y = a[1] + b[1], z = shuffle_xor(x, 16), w = shuffle_xor(y, 16);
    return is_upper() ? Quad{z, w, x, y} : Quad{x, y, z, w};
  }
  // Rows g + 8 are dc's rests, and the upper half is for the second eight tokens.
  FLR_DEVICE Quad gather_two(const float (&part)[4][4]) const {
    float a[4], b[4], given[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      a[j] = part[0][j] + part[2][j], b[j] = part[1][j] + part[3][j];
      given[j] = shuffle_xor(is_upper() ? a[j] : b[j], 16);
    }
    return is_upper() ? Quad{given[0], given[1], given[2] + b[0], given[3] + b[1]}
                      : Quad{a[0], a[1], a[2] + given[0], a[3] + given[1]};
  }

  // s and dp become α and ds.
  FLR_DEVICE void weights(float (&s)[2], float (&dp)[2], int count) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const bool live = factor() < task.p.factors && (kWide ? 0 : g() / 4 * 8) + t() + j < count;
      const float log_weight = live ? s[j] - lse : 0.f, weight = live ? exp2_fast(log_weight * kLog2e) : 0.f;
      float x = dp[j] + pairs[0] * weight - (weight > 0 ? d_entropy * log_weight : 0.f);
#pragma unroll
      for (int i = 1; i < 4; ++i) x += pairs[i] * shuffle_xor(weight, 4 * i);
      s[j] = weight, dp[j] = live ? weight * (x - delta) : 0.f;
    }
  }

  FLR_DEVICE void gradients(const Weights& w) {
#pragma unroll
    for (int c = 0; c < C::kChunks; ++c) {
      if (c >= task.plan.chunks) break;
      const Slot here = slot_of(c);
      uint16_t* at = history_rows(here);
      const uint16_t* rows = query_rows() + c * C::CHUNK;
      Fragment h[2][2], q[2][2];
      if ((c + 1) * C::CHUNK <= Here::size()) {
        Pair::load(h[0], q[0], at, rows, true);
#pragma unroll
        for (int i = 0; i < kStrips; i += 2) {
          const int now = i / 2 % 2, next = i + 2;
          if (next < kStrips) Pair::load(h[now ^ 1], q[now ^ 1], at + next * kApart, rows + next * kApart, true);
          Pair::use(w, task.d.dh != nullptr, sums + c * kStrips + i, h[now], q[now], at + i * kApart, true);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kStrips; i += 2) {
          const int first = c * kStrips + i;
          if (column(first) >= Here::size()) break;
          const bool two = column(first + 1) < Here::size();
          Pair::load(h[0], q[0], at + i * kApart, rows + i * kApart, two);
          Pair::use(w, task.d.dh != nullptr, sums + first, h[0], q[0], at + i * kApart, two);
        }
      }
      fence_async();  // what was written here is read by bulk copies
      release(lane, &control.empty[here.index]);
    }
    slot.advance(task.plan.chunks, C::kStages);
  }

  FLR_DEVICE void tiles() {
    for (bool last = false; !last;) {
      mbar_wait(&control.full[slot.index], slot.phase);
      const int tile = control.tile[slot.index], count = tile & 255;
      last = tile > 255;
      if (count == 0) {  // a user, or a block's share of one, without a valid token
        release(lane, &control.empty[slot.index]);
        slot.advance(1, C::kStages);
        return;
      }
      float s[2], dp[2];
      products(s, dp);
      weights(s, dp, count);
      gradients(operands<T, kWide>(lane, s, dp));
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
    uint16_t* to = static_cast<uint16_t*>(task.d.du) + user * p.factors * p.size + Here::first_column();
    const int size = Here::size();
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      if (column(i) >= size) continue;
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
    const int shares = Here::shares(), size = Here::size(), thread = 32 * warp + lane;
    mbar_wait(&control.drained, 0);  // the ring is no longer one
    if (t() < kGradientFactors) {
#pragma unroll
      for (int i = 0; i < kAll; ++i) {
        if (column(i) >= size) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) part[(t() + j % 2) * kPartPitch + column(i) + g() + j / 2 * 8] = sums[i][j];
      }
    }
    cluster_sync();
    const int quads = size / 4, each = (quads + shares - 1) / shares;
    for (int i = thread; i < p.factors * each; i += kWorkerThreads) {
      const int k = i / each, quad = Here::share() * each + i % each;
      if (quad >= quads) continue;
      Quad sum{0, 0, 0, 0};
      for (int q = 0; q < shares; ++q) {
        const Quad x = *remote(reinterpret_cast<const Quad*>(part + k * kPartPitch + 4 * quad), Here::of_share(q));
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
      uint16_t* row = static_cast<uint16_t*>(task.d.du) + (user * p.factors + k) * p.size + Here::first_column();
      *reinterpret_cast<Words*>(row + 4 * quad) = Words{T::pack(sum.x, sum.y), T::pack(sum.z, sum.w)};
    }
    // nobody leaves while others read from it
    cluster_sync();
  }

  FLR_DEVICE void run() {
    for (Users users(task); users.more(); users.index += users.step) {
      start_user(users.user());
      tiles();
      add_rests();
      if (Here::shares() > 1) combine(users.user());
      else store(users.user());
    }
  }
};

template <class C>
__global__ void __launch_bounds__(kThreads, 1) factor_attention_backward(const __grid_constant__ GradientTask task) {
  FLR_DYNAMIC_SHARED(memory);
  auto& control = *reinterpret_cast<typename C::Control*>(memory);
  uint16_t* ring = reinterpret_cast<uint16_t*>(memory + sizeof(typename C::Control));
  uint16_t* queries = ring + C::kStages * C::kSlot;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = int(cluster_rank());
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      mbar_init(&control.full[i], kProducers);
      mbar_init(&control.empty[i], kWorkers);
    }
    mbar_init(&control.drained, kProducers);
    if constexpr (C::kSplit)
      for (auto& barrier : control.crossed) mbar_init(&barrier, task.plan.split);
    mbar_fence();
  }
  __syncthreads();
  if (C::kSplit) {  // nobody arrives at a barrier that is not there yet
    cluster_sync();
  }
  if (warp >= kWorkers) {
    fewer_registers<kProducerRegisters>();
    GradientProducer<C>(task, control, ring, warp - kWorkers, lane, rank).run();
  } else {
    more_registers<kWorkerRegisters>();
    GradientWorker<C>(task, control, ring, queries, warp, lane, rank).run();
  }
}

}  // namespace flr
