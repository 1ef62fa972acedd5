// factor_attention_backward.cuh's shared memory, its plan, and the warps that fill its ring and empty it.
#pragma once
#include "factor_attention_producer.cuh"

namespace flr {

template <int kSplit>
struct alignas(128) GradientControl : Across<1, kSplit> {
  Quad scores[2][kWorkers][32];  // of a tile, a worker's part each; two tiles in turn
  float delta[kWorkers][kGradientFactors];
  Mbarrier full[kMaxStages], empty[kMaxStages], drained;
  int64_t rows[kMaxStages][kTokens];  // where in dH a slot's rows go; -1: nowhere
  int columns[kMaxStages][kTokens];   // how many of them
  int tile[kMaxStages];               // number of tokens; 256 more for a user's last tile
  int tokens[kProducers][32 * kSearch + kTokens];
};

// Columns in registers, how many of them come in one copy, tokens of a tile, and over how many blocks at most the columns
// of a token are split.
template <int D_, int CHUNK_, int TOKENS, int SPLIT = 1>
struct GradientColumns {
  static constexpr bool kSplit = SPLIT > 1;
  using Control = GradientControl<SPLIT>;
  static constexpr int D = D_, CHUNK = CHUNK_, kChunks = D / CHUNK, kStrips = CHUNK / 16 / kWorkers;
  static constexpr int kTile = TOKENS, kTileRows = kTile / kProducers;
  static constexpr bool kWide = kTile == 8;  // gradients of the context are bfloat16 numbers, and nothing more
  static constexpr int kRows = (kWide ? 2 : 3) * kGradientFactors;
  static constexpr int kPitch = CHUNK + 8, kSlot = kPitch * kTile;
  static constexpr int kQueryPitch = D + 8;
  static constexpr int kRoom = kSharedLimit - int(sizeof(Control)) - 2 * kRows * kQueryPitch;
  static constexpr int kStages = kRoom / (2 * kSlot) < kMaxStages ? kRoom / (2 * kSlot) : kMaxStages;
  static constexpr int kSharedBytes = kSharedLimit - kRoom + 2 * kSlot * kStages;
  static_assert(D % CHUNK == 0 && CHUNK % (32 * kWorkers) == 0 && CHUNK <= kMaxChunk);
  static_assert(kTile == 16 || (kTile == 8 && D > kExactColumns));
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
  set_grid(plan, p, device, C::D);
  plan.chunks = (plan.width + C::CHUNK - 1) / C::CHUNK;
  plan.stages = C::kStages, plan.shared_bytes = C::kSharedBytes;
  return plan;
}

// One of the warps that fill the ring and empty it: of every tile its kTileRows rows, a lane a row.
template <class C>
struct GradientProducer : Place<GradientTask, C::kSplit> {
  using Here = Place<GradientTask, C::kSplit>;
  using Here::task;
  typename C::Control& control;
  uint16_t* ring;
  int *tokens, warp, lane, mine, masked = 0;
  Slot slot;

  FLR_DEVICE GradientProducer(const GradientTask& task, typename C::Control& control, uint16_t* ring, int warp,
                              int lane, int rank)
      : Here(task, rank), control(control), ring(ring), tokens(control.tokens[warp]), warp(warp), lane(lane),
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
    const uint16_t* from = static_cast<const uint16_t*>(p.h) + user * p.h_b + token * p.h_l + Here::first_column();
    for (int c = 0; c < chunks; ++c) {
      const int left = Here::size() - c * C::CHUNK;
      const int columns = C::kSplit && left < 0 ? 0 : left < C::CHUNK ? left : C::CHUNK;  // the last part may have fewer
      Mbarrier* full = &control.full[slot.index];
      retire();
      if (lane == 0) {
        if (c == 0 && warp == 0) control.tile[slot.index] = count | int(last) << 8;
        if (count > 0) mbar_expect(full, uint32_t(C::kTileRows * 2 * columns));
        else mbar_arrive(full);
      }
      __syncwarp();
      if (is_row) {
        const bool is_any = is_token && (!C::kSplit || columns > 0);
        const int64_t to = (user * p.length + token) * p.size + Here::first_column() + c * C::CHUNK;
        control.rows[slot.index][mine] = is_any ? to : -1;
        control.columns[slot.index][mine] = columns;
        if (count > 0 && (!C::kSplit || columns > 0))
          bulk_copy(row(), is_token ? from + c * C::CHUNK : kZeros, uint32_t(2 * columns), full);
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
      uint16_t* row = static_cast<uint16_t*>(task.d.dh) + token * task.p.size + Here::first_column();
      Quad* to = reinterpret_cast<Quad*>(row);
      for (int i = lane; i < Here::size() / 8; i += 32) to[i] = Quad{0, 0, 0, 0};
    }
  }

  FLR_DEVICE void run() {
    for (Users users(task); users.more(); users.index += users.step) {
      const int64_t user = users.user();
      walk_tokens<C::kTile>(
          task.p, user, Here::share(), Here::shares(), lane, tokens,
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

}  // namespace flr
