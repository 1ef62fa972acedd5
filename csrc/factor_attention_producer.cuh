// factor_attention.cuh's shared memory, its plan, and the warps that fill its ring.
#pragma once
#include "device.cuh"
#include "factor_attention.h"

namespace flr {

constexpr int kWorkers = 8, kWorkerThreads = 32 * kWorkers;
constexpr int kProducers = 4;  // one warp alone issues copies too slowly; registers are given to groups of four warps
constexpr int kThreads = kWorkerThreads + 32 * kProducers;
constexpr int kTokens = 16, kRows = kTokens / kProducers, kMaxChunk = 1536;
constexpr int kMaxStages = 12, kSearch = 8;  // producers look at 32 kSearch tokens at a time
constexpr int kMaxCluster = 16;
constexpr int kSharedLimit = 227 * 1024;
// A block starts with 168 registers a thread, 168 * 384 = 40 * 128 + 232 * 256.
constexpr int kProducerRegisters = 40, kWorkerRegisters = 232;
static_assert(kProducerRegisters * 32 * kProducers + kWorkerRegisters * kWorkerThreads <=
                  65536 / kThreads / 8 * 8 * kThreads,
              "a warp that asks for registers that the block does not have waits for ever");
constexpr float kLog2e = 1.4426950408889634f;

struct alignas(16) Quad { float x, y, z, w; };
struct alignas(8) Words { uint32_t low, high; };

// What blocks exchange that have some of a token's columns each: scores of a tile, a block's part each, two in turn.
template <int kGroups, int kSplit>
struct Across {
  Quad across[2][kSplit][kGroups][32];
  Mbarrier crossed[2];
};
template <int kGroups>
struct Across<kGroups, 1> {};

// For kGroups times eight factors.
template <int kGroups, int kSplit>
struct alignas(128) Control : Across<kGroups, kSplit> {
  Quad scores[2][kWorkers][kGroups][32];  // of a tile, a worker's part each; two tiles in turn
  float stats[3][8 * kGroups];            // maximum, sum, sum of weight times logit below the maximum
  float pairs[8 * kGroups][8 * kGroups];  // sums of products of weights
  float weights[kMaxCluster][8 * kGroups];
  Mbarrier full[kMaxStages], empty[kMaxStages], queries_full[2], queries_empty[2];
  int tile[kMaxStages];  // number of tokens; 256 more for a user's last tile
  int tokens[kProducers][32 * kSearch + kTokens];  // the same for every producer
};

// Columns in registers, how many of them come in one copy, the most factors, and over how many blocks at most the
// columns of a token are split.
template <int D_, int CHUNK_, int FACTORS = 8, int SPLIT = 1>
struct Columns {
  static constexpr int kGroups = (FACTORS + 7) / 8;
  static constexpr bool kSplit = SPLIT > 1;
  using Control = flr::Control<kGroups, SPLIT>;
  static constexpr int D = D_, CHUNK = CHUNK_, kChunks = D / CHUNK, kStrips = CHUNK / 16 / kWorkers;
  static constexpr int kPitch = CHUNK + 8;  // 16 bytes of padding: ldmatrix reads without bank conflicts
  static constexpr int kChunkBytes = 2 * CHUNK, kSlot = kPitch * kTokens;
  static constexpr bool kQueriesInRegisters = kGroups == 1 && D <= 2048;
  static constexpr int kLeastStages = (kSharedLimit - int(sizeof(Control)) - 2 * FACTORS * (D + 8)) / (2 * kSlot);
  static_assert(D % CHUNK == 0 && CHUNK % (16 * kWorkers) == 0 && CHUNK <= kMaxChunk);
  static_assert(kLeastStages > kChunks, "a tile has to fit, and something of the next");
  static_assert(2 * kSlot * kLeastStages >= 4 * FACTORS * (D + 4), "the sums have to fit where the ring was");
};

// Shared memory: Control, `stages` slots of the ring, `buffers` of queries. After the last tile of a block of a cluster
// its sums [K, D] lie where the ring was. `split` blocks of a cluster have `width` columns each, the last the rest.
struct Plan {
  int chunks, stages, buffers, cluster, split, width;
  int64_t grid;
  int query_pitch, shared_bytes;
};

// What the choice depends on: multiprocessors, and how many clusters of each size run at a time. That is less than
// multiprocessors divided by blocks where a cluster's blocks have to lie together.
struct Room {
  int multiprocessors, clusters[kMaxCluster + 1];
};

// For at most `columns` a block.
inline void set_grid(Plan& plan, const AttentionProblem& p, const Room& device, int columns) {
  plan.split = (p.size + columns - 1) / columns;
  plan.width = plan.split == 1 ? p.size : ((p.size + plan.split - 1) / plan.split + 15) / 16 * 16;
  plan.cluster = plan.split;
  for (int i = 2; i * plan.split <= kMaxCluster; ++i)  // the largest with which no user has to wait for another
    if (p.users <= device.clusters[i * plan.split] && 32 * i <= p.length) plan.cluster = i * plan.split;
  const int at_once = plan.split == 1 ? device.multiprocessors : device.clusters[plan.split];
  const bool one_each = plan.cluster > plan.split || p.users < at_once;
  plan.grid = one_each ? p.users * plan.cluster : int64_t(at_once) * plan.split;
}

template <class C>
Plan make_plan(const AttentionProblem& p, const Room& device) {
  Plan plan{};
  set_grid(plan, p, device, C::D);
  plan.chunks = (plan.width + C::CHUNK - 1) / C::CHUNK, plan.query_pitch = plan.chunks * C::CHUNK + 8;
  const int queries = 2 * p.factors * plan.query_pitch, room = kSharedLimit - int(sizeof(typename C::Control));
  const bool waits = !C::kQueriesInRegisters && p.users * plan.cluster > plan.grid;  // for the user before
  plan.buffers = waits && (room - 2 * queries) / (2 * C::kSlot) > plan.chunks ? 2 : 1;
  plan.stages = (room - plan.buffers * queries) / (2 * C::kSlot);
  if (plan.stages > kMaxStages) plan.stages = kMaxStages;
  plan.shared_bytes = int(sizeof(typename C::Control)) + plan.stages * 2 * C::kSlot + plan.buffers * queries;
  return plan;
}

// What both halves of a block go through: users, slots of the ring.
struct Task {
  AttentionProblem p;
  Plan plan;
};

// A block's place in its cluster: it has a share of a user's tokens and, where `split`, a part of their columns.
template <class Task, bool split>
struct Place {
  const Task& task;
  int rank;

  FLR_DEVICE Place(const Task& task, int rank) : task(task), rank(rank) {}
  FLR_DEVICE int part() const { return split ? rank % task.plan.split : 0; }
  FLR_DEVICE int share() const { return split ? rank / task.plan.split : rank; }
  FLR_DEVICE int shares() const { return split ? task.plan.cluster / task.plan.split : task.plan.cluster; }
  FLR_DEVICE int first_column() const { return part() * task.plan.width; }
  FLR_DEVICE int size() const {
    if (!split) return task.p.size;
    const int left = task.p.size - first_column();
    return left < task.plan.width ? left : task.plan.width;
  }
  FLR_DEVICE int of_share(int q) const { return split ? q * task.plan.split + part() : q; }  // with the same columns
  FLR_DEVICE int of_part(int q) const { return share() * task.plan.split + q; }              // with the same tokens
};

struct Users {
  int64_t index, step, count;
  bool last_first;
  template <class Task>
  FLR_DEVICE explicit Users(const Task& task)
      : index(blockIdx.x / task.plan.cluster), step(gridDim.x / task.plan.cluster), count(task.p.users),
        last_first(task.p.last_first) {}
  FLR_DEVICE bool more() const { return index < count; }
  FLR_DEVICE int64_t user() const { return last_first ? count - 1 - index : index; }
};

struct Slot {
  int index = 0;
  uint32_t phase = 0;
  FLR_DEVICE void advance(int by, int stages) {
    index += by;
    if (index >= stages) index -= stages, phase ^= 1;
  }
  FLR_DEVICE Slot after(int by, int stages) const {
    Slot s = *this;
    s.advance(by, stages);
    return s;
  }
};

// One arrival of a warp whose lanes are all done.
FLR_DEVICE void release(int lane, Mbarrier* barrier) {
  __syncwarp();
  if (lane == 0) mbar_arrive(barrier);
}

// Adds what the blocks with the other columns have of s, in one order; of all worker warps. A block's buffer is written
// again two calls later, when its every worker has read it: until then not all of the call between have arrived, if the
// workers meet between two calls. A block waits for all that is written into it, so it may leave when it is done.
template <class Here, class Control, int kGroups>
FLR_DEVICE void cross(const Here& here, Control& control, uint32_t& crossings, int warp, int lane,
                      float (&s)[kGroups][4]) {
  const int buffer = crossings & 1, split = here.task.plan.split;
  if (warp < split) {
    Quad* to = remote(&control.across[buffer][here.part()][0][lane], here.of_part(warp));
#pragma unroll
    for (int n = 0; n < kGroups; ++n) to[32 * n] = Quad{s[n][0], s[n][1], s[n][2], s[n][3]};
    // all lanes have written
    __syncwarp();
    if (lane == 0) mbar_arrive_remote(&control.crossed[buffer], here.of_part(warp));
  }
  mbar_wait_remote(&control.crossed[buffer], crossings >> 1 & 1);
  ++crossings;
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
    for (int q = 0; q < split; ++q) {
      const Quad x = control.across[buffer][q][n][lane];
      s[n][0] += x.x, s[n][1] += x.y, s[n][2] += x.z, s[n][3] += x.w;
    }
  }
}

alignas(128) __device__ static uint16_t kZeros[kMaxChunk];

// Looks for a block's share of a user's valid tokens, 32 kSearch at a time, and calls send(first of `tokens`, count,
// whether it is the last) for every TILE of them, at least once; skip(first token, bits) for masked ones.
template <int TILE, class Send, class Skip>
FLR_DEVICE void walk_tokens(const AttentionProblem& p, int64_t user, int rank, int cluster, int lane, int* tokens,
                            const Send& send, const Skip& skip) {
  const uint8_t* mask = p.mask == nullptr ? nullptr : p.mask + user * p.mask_b;
  const int apart = 32 * cluster, length = int(p.length);
  int held = 0;
  for (int base = 32 * rank; base < length; base += kSearch * apart) {
    bool valid[kSearch];  // that many loads in flight
#pragma unroll
    for (int i = 0; i < kSearch; ++i) {
      const int token = base + i * apart + lane;
      valid[i] = token < length && (mask == nullptr || mask[token * p.mask_l]);
    }
#pragma unroll
    for (int i = 0; i < kSearch; ++i) {
      const int token = base + i * apart;
      const unsigned bits = ballot(valid[i]);
      if (valid[i]) tokens[held + ones(bits & ((1u << lane) - 1))] = token + lane;
      held += ones(bits);
      if (token < length) skip(token, ~bits & (length - token < 32 ? (1u << (length - token)) - 1 : ~0u));
    }
    __syncwarp();
    int first = 0;
    for (; held - first > TILE; first += TILE) send(first, TILE, false);
    held -= first;  // 0 to TILE stay: the user's last tile is known as such when it is sent
    const int token = lane < held ? tokens[first + lane] : 0;
    __syncwarp();
    if (lane < held) tokens[lane] = token;
    __syncwarp();
  }
  send(0, held, true);
}

// One of the warps that fill the ring: of every tile its kRows rows. All look for tokens alike.
template <class C>
struct Producer : Place<Task, C::kSplit> {
  using Here = Place<Task, C::kSplit>;
  using Here::task;
  typename C::Control& control;
  uint16_t *ring, *queries;
  int* tokens;
  int warp, lane;
  Slot slot;

  FLR_DEVICE Producer(const Task& task, typename C::Control& control, uint16_t* ring, uint16_t* queries, int warp,
                      int lane, int rank)
      : Here(task, rank), control(control), ring(ring), queries(queries), tokens(control.tokens[warp]), warp(warp),
        lane(lane) {}

  // Rows of queries [K, D], zero from D to the end of the last chunk.
  FLR_DEVICE void send_queries(int64_t user, int served) const {
    const auto& p = task.p;
    const int buffer = served % task.plan.buffers, round = served / task.plan.buffers;
    mbar_wait(&control.queries_empty[buffer], (round & 1) ^ 1);  // at once in the first round
    __syncwarp();  // a lane that still waits must not miss this phase for the next
    const int columns = task.plan.chunks * C::CHUNK, factor = kProducers * lane + warp, size = Here::size();
    Mbarrier* full = &control.queries_full[buffer];
    if (lane == 0) mbar_expect(full, uint32_t((p.factors + kProducers - 1 - warp) / kProducers * 2 * columns));
    __syncwarp();
    if (factor < p.factors) {
      uint16_t* to = queries + (buffer * p.factors + factor) * task.plan.query_pitch;
      const uint16_t* from = static_cast<const uint16_t*>(p.u) + user * p.u_b + factor * p.u_k;
      bulk_copy(to, from + Here::first_column(), 2 * size, full);
      if (columns > size) bulk_copy(to + size, kZeros, 2 * (columns - size), full);
    }
  }

  // A tile of `count` tokens from the list, rows of zeros after them; without any, one slot that says so.
  FLR_DEVICE void send_tile(const uint16_t* h, int first, int count, bool last) {
    const int chunks = count > 0 ? task.plan.chunks : 1, size = Here::size(), mine = kRows * warp + lane;
    const uint16_t* row = lane < kRows && mine < count ? h + tokens[first + mine] * task.p.h_l : nullptr;
    for (int c = 0; c < chunks; ++c) {
      // the last chunk's columns from D on are zero from the start where they stay in place
      const int left = size - c * C::CHUNK;
      const int columns = C::kSplit && left < 0 ? 0 : left < C::CHUNK ? left : C::CHUNK;  // the last part may have fewer
      const int padding = C::kChunks == 1 ? 0 : C::CHUNK - columns;
      Mbarrier* full = &control.full[slot.index];
      mbar_wait(&control.empty[slot.index], slot.phase ^ 1);
      __syncwarp();
      if (lane == 0) {
        if (c == 0 && warp == 0) control.tile[slot.index] = count | int(last) << 8;
        if (count > 0) mbar_expect(full, uint32_t(kRows * 2 * (columns + padding)));
        else mbar_arrive(full);
      }
      __syncwarp();
      if (count > 0 && lane < kRows) {
        uint16_t* to = ring + slot.index * C::kSlot + mine * C::kPitch;
        if (!C::kSplit || columns > 0)
          bulk_copy(to, row == nullptr ? kZeros : row + c * C::CHUNK, uint32_t(2 * columns), full);
        if (padding > 0) bulk_copy(to + columns, kZeros, uint32_t(2 * padding), full);
      }
      slot.advance(1, task.plan.stages);
    }
  }

  FLR_DEVICE void send_user(int64_t user) {
    const auto& p = task.p;
    const uint16_t* h = static_cast<const uint16_t*>(p.h) + user * p.h_b + Here::first_column();
    walk_tokens<kTokens>(
        p, user, Here::share(), Here::shares(), lane, tokens,
        [&](int first, int count, bool last) { send_tile(h, first, count, last); }, [](int, unsigned) {});
  }

  FLR_DEVICE void run() {
    int served = 0;
    for (Users users(task); users.more(); users.index += users.step, ++served) {
      send_queries(users.user(), served);
      send_user(users.user());
    }
  }
};

}  // namespace flr
