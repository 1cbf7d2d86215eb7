// Attention backward on Hopper: dq, dk and dv, a block of threads for tiles of 128 keys.
//
// With p = exp(s - lse) and delta = rowsum(grad_o o), for every tile of 64 queries that sees the keys, everything transposed so
// that the weights leave one product in the registers in which the next takes them:
//
//     s^T = k q^T,   dp^T = v grad_o^T,   p^T = exp2(scale s^T - lse),   ds^T = p^T (dp^T - delta)
//     dv += p^T grad_o,   dk += ds^T q,   dq = ds k, added to float32 sums in global memory
//
// One warpgroup produces, having TMA fetch the tiles; two consume, each 64 keys. They take turns at dq, which sums over the keys
// of both, by way of ds in shared memory; a bulk copy adds it to what other blocks have added. In any order, unless `turns` is
// given: then a tile of queries takes its keys in order, and the gradients of equal inputs have equal bits.
//
// A pass before makes delta and lse ready, padded to whole tiles; one after scales and rounds dq. Bytes: grad_o, q, k, v, o read
// once and dq, dk, dv written where a head fits L2, and the float32 sums of dq, written once by every block of keys. FLOPs:
// 10 N M D per head. Sums in float32; p and ds are rounded to 16 bits before they are multiplied.
#pragma once
#include <math.h>

#include "cuda/hopper/tiles.h"

namespace genengine::hopper {

template <class T_, int kDim_, bool kCausal_>
struct BackwardForm {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr bool kCausal = kCausal_;
  static constexpr int kConsumers = 2, kRows = 64, kKeys = kConsumers * kRows, kQueries = 64, kStages = 2;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup, kProducerRegisters = 24, kConsumerRegisters = 240;

  static constexpr int kColumns = Boxes<kDim>::kColumns, kBoxes = Boxes<kDim>::kCount, kDepth = Boxes<kDim>::kDepth;
  static constexpr int kLine = Boxes<kDim>::kLine, kKeyBox = kKeys * kLine, kQueryBox = kQueries * kLine;
  static constexpr int kKeyBytes = kKeys * kDepth * 2, kQueryBytes = kQueries * kDepth * 2;
  static constexpr int kStatsBytes = kQueries * 2 * sizeof(float);
  static constexpr int kStageBytes = 2 * kQueryBytes + kStatsBytes;                  // q, grad_o, (lse, delta) of each query
  static constexpr int kWeightsLine = 2 * kQueries, kWeightsBytes = kKeys * kWeightsLine;  // ds^T: one box, lines of 128 bytes
  static constexpr int kSumsBytes = kQueries * kDim * sizeof(float);                 // dq of a tile

  static constexpr int kBarriers = 2 + 2 * kStages;
  static constexpr int kShared = 2 * kKeyBytes + 2 * kStages * kQueryBytes + 2 * kWeightsBytes + kConsumers * kSumsBytes +
                                 kStages * kStatsBytes + kBarriers * 8;

  static_assert(kWeightsLine == 128 && kQueryBox % 1024 == 0 && kSumsBytes % 1024 == 0);
  static_assert(kShared <= 227 << 10, "what a block may have");
};

struct BackwardCall {
  TensorMap grad_o, q, k, v, dk, dv;  // (D, H, N, B) innermost first; boxes of (kColumns, 1, 64 rows, 1), of k and v 128
  const float* stats;                 // (B, H, query tiles, 64, 2): lse log2(e), delta; of queries that do not exist inf, 0
  float* sums;                        // (B, H, query tiles, D / 8, 128, 4): dq / scale as the threads of a warpgroup hold it
  int* turns;                         // (B, H, query tiles): tiles of keys that have been added; null for any order
  float scale, natural_scale;         // of the scores, times log2(e), and as it is
  int heads, queries, keys;
  int tiles, blocks;  // all tiles of keys, and those of a head
};

struct KeyTile {
  int batch, head, first, number;
};

template <class Form>
GENENGINE_DEVICE KeyTile key_tile_at(const BackwardCall& call, int index) {
  const int head = index / call.blocks, number = index % call.blocks;
  return {head / call.heads, head % call.heads, number * Form::kKeys, number};
}

GENENGINE_DEVICE int query_tiles(const BackwardCall& call) { return (call.queries + 63) / 64; }

// The first tile of queries that sees a tile of keys.
template <class Form>
GENENGINE_DEVICE int first_query_tile(const KeyTile& tile) {
  return Form::kCausal ? tile.first / Form::kQueries : 0;
}

template <class Form>
struct BackwardShared {
  char *k, *v, *queries, *weights, *sums, *stats;  // queries: kStages of (q, grad_o)
  Barrier *keys_full, *keys_empty, *full, *empty;

  GENENGINE_DEVICE explicit BackwardShared(char* memory) {
    k = memory;
    v = k + Form::kKeyBytes;
    queries = v + Form::kKeyBytes;
    weights = queries + 2 * Form::kStages * Form::kQueryBytes;
    sums = weights + 2 * Form::kWeightsBytes;
    stats = sums + Form::kConsumers * Form::kSumsBytes;
    keys_full = reinterpret_cast<Barrier*>(stats + Form::kStages * Form::kStatsBytes);
    keys_empty = keys_full + 1;
    full = keys_empty + 1;
    empty = full + Form::kStages;
  }

  GENENGINE_DEVICE void init() const {
    barrier_init(keys_full, 1);
    barrier_init(keys_empty, Form::kConsumers);
    Buffers<Form::kStages>{queries, full, empty}.init(Form::kConsumers * kWarpgroup / kWarpThreads);
    barrier_publish();
  }

  GENENGINE_DEVICE char* q(int stage) const { return queries + 2 * stage * Form::kQueryBytes; }
  GENENGINE_DEVICE char* grad_o(int stage) const { return q(stage) + Form::kQueryBytes; }
};

// ---- producer --------------------------------------------------------------------------------------------------------------

template <class Form>
class BackwardProducer {
 public:
  GENENGINE_DEVICE BackwardProducer(const BackwardCall& call, const BackwardShared<Form>& shared) : call_(call), shared_(shared) {}

  GENENGINE_DEVICE void run() {
    uint32_t phase = 0;
    for (int index = block_index(); index < call_.tiles; index += block_count(), phase ^= 1) {
      const KeyTile tile = key_tile_at<Form>(call_, index);
      barrier_wait(shared_.keys_empty, phase ^ 1);
      barrier_expect(shared_.keys_full, 2 * Form::kKeyBytes);
      fetch(call_.k, shared_.k, shared_.keys_full, Form::kKeyBox, tile, tile.first);
      fetch(call_.v, shared_.v, shared_.keys_full, Form::kKeyBox, tile, tile.first);
#pragma unroll 1  // there are few registers here
      for (int i = first_query_tile<Form>(tile); i < query_tiles(call_); ++i) fetch_queries(tile, i);
    }
  }

 private:
  GENENGINE_DEVICE void fetch_queries(const KeyTile& tile, int i) {
    Barrier* full = shared_.full + ring_.stage;
    barrier_wait(shared_.empty + ring_.stage, ring_.phase ^ 1);
    barrier_expect(full, Form::kStageBytes);
    fetch(call_.q, shared_.q(ring_.stage), full, Form::kQueryBox, tile, i * Form::kQueries);
    fetch(call_.grad_o, shared_.grad_o(ring_.stage), full, Form::kQueryBox, tile, i * Form::kQueries);
    const int64_t at = (static_cast<int64_t>(tile.batch) * call_.heads + tile.head) * query_tiles(call_) + i;
    bulk_load(shared_.stats + ring_.stage * Form::kStatsBytes, call_.stats + at * 2 * Form::kQueries, Form::kStatsBytes, full);
    ring_.advance();
  }

  GENENGINE_DEVICE void fetch(const TensorMap& map, char* to, Barrier* full, int bytes, const KeyTile& tile, int row) const {
    for (int box = 0; box < Form::kBoxes; ++box) tma_load(to + box * bytes, &map, full, box * Form::kColumns, tile.head, row, tile.batch);
  }

  const BackwardCall& call_;
  const BackwardShared<Form>& shared_;
  Ring<Form::kStages> ring_;
};

// ---- consumers -------------------------------------------------------------------------------------------------------------

template <class Form>
class BackwardConsumer {
 public:
  using T = typename Form::T;

  // number: which of the consumer warpgroups.
  GENENGINE_DEVICE BackwardConsumer(const BackwardCall& call, const BackwardShared<Form>& shared, int number)
      : call_(call), shared_(shared), number_(number), thread_(thread_index() % kWarpgroup), lane_(thread_ % kWarpThreads) {}

  GENENGINE_DEVICE void run() {
    uint32_t phase = 0;
    for (int index = block_index(); index < call_.tiles; index += block_count(), phase ^= 1) {
      barrier_wait(shared_.keys_full, phase);
      attend(index);
    }
    if (thread_ == 0) bulk_wait<0>();
  }

 private:
  static constexpr int kScores = Form::kQueries / 2, kSums = Form::kDim / 2, kSteps = Form::kQueries / 16;
  static constexpr int kBoth = 1, kAlone = kBoth + 1;  // named barriers: of both warpgroups, of one (+ number)

  GENENGINE_DEVICE void attend(int index) {
    float dk[kSums], dv[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) dk[i] = dv[i] = 0.f;
#pragma unroll 1
    for (int i = first_query_tile<Form>(key_tile_at<Form>(call_, index)); i < query_tiles(call_); ++i) {
      barrier_wait(shared_.full + ring_.stage, ring_.phase);
      uint32_t p[kSteps][4], ds[kSteps][4];
      weigh(dv, p, ds, key_tile_at<Form>(call_, index).first, i);
      add_products(dk, ds, shared_.q(ring_.stage));
      wgmma_commit();
      if (Form::kDim > 96) wgmma_wait<0>();  // there are no registers for dq before those of p and ds are free
      if (i % 2 == number_) add_queries(key_tile_at<Form>(call_, index), i);
      wgmma_wait<0>();
      pin(dv);
      pin(dk);
      if (lane_ == 0) barrier_arrive(shared_.empty + ring_.stage);
      ring_.advance();
    }
    write(key_tile_at<Form>(call_, index), dk, dv);
  }

  // p^T and ds^T of a tile of queries, in registers for the products, ds^T in shared memory, too. dv's product begins as soon as
  // p^T is there: ds^T is computed meanwhile.
  GENENGINE_DEVICE void weigh(float (&dv)[kSums], uint32_t (&p)[kSteps][4], uint32_t (&ds)[kSteps][4], int first_key, int i) {
    float s[kScores], dp[kScores];
    begin_scores(s, shared_.k, shared_.q(ring_.stage));
    begin_scores(dp, shared_.v, shared_.grad_o(ring_.stage));
    wgmma_wait<1>();
    pin(s);
    const FourFloats* stats = reinterpret_cast<const FourFloats*>(shared_.stats + ring_.stage * Form::kStatsBytes) + lane_ % 4;
#pragma unroll
    for (int k = 0; k < kScores; k += 4) {
      const FourFloats pair = stats[k];  // lse and delta of columns 2 k and 2 k + 1, four of which a lane passes over
#pragma unroll
      for (int j = 0; j < 4; ++j) s[k + j] = exp2_approx(fmaf(s[k + j], call_.scale, -pair.value[j % 2 * 2]));
    }
    mask(s, first_key, i * Form::kQueries);
    round(s, p);
    add_products(dv, p, shared_.grad_o(ring_.stage));
    wgmma_commit();
    wgmma_wait<1>();
    pin(dp);
#pragma unroll
    for (int k = 0; k < kScores; k += 4) {
      const FourFloats pair = stats[k];
#pragma unroll
      for (int j = 0; j < 4; ++j) dp[k + j] = s[k + j] * (dp[k + j] - pair.value[j % 2 * 2 + 1]);
    }
    round(dp, ds);
    char* weights = shared_.weights + i % 2 * Form::kWeightsBytes;
    const int row = number_ * Form::kRows + thread_ / kWarpThreads * 16 + lane_ / 4;
#pragma unroll
    for (int k = 0; k < kSteps * 4; ++k)  // words: rows `row` and 8 below, columns 8 (k / 2) and on
      store_shared(weights + swizzled<Form::kWeightsLine>(row + k % 2 * 8, k / 2 * 8) + lane_ % 4 * 4, ds[k / 4][k % 4]);
    publish_to_async();
    named_sync(kBoth, Form::kConsumers * kWarpgroup);
  }

  // s (64 keys x queries) = this warpgroup's rows of `keys` times those of `queries`.
  GENENGINE_DEVICE void begin_scores(float (&s)[kScores], const char* keys, const char* queries) {
    const uint64_t a = matrix<Sums::along_rows, Form::kLine>(keys + number_ * Form::kRows * Form::kLine);
    const uint64_t b = matrix<Sums::along_rows, Form::kLine>(queries);
    pin(s);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Form::kDepth / 16; ++step) {
      const int box = step * 16 / Form::kColumns, bytes = step * 16 % Form::kColumns * 2;
      Product<T, Form::kQueries>::template of_shared<Sums::along_rows, Sums::along_rows>(
          s, advanced(a, box * Form::kKeyBox + bytes), advanced(b, box * Form::kQueryBox + bytes), step > 0);
    }
    wgmma_commit();
  }

  // 0 where a key does not exist or is later than the query; nothing in tiles without such.
  GENENGINE_DEVICE void mask(float (&p)[kScores], int first_key, int first_query) const {
    const int first = first_key + number_ * Form::kRows;
    if (first + Form::kRows <= call_.keys && !(Form::kCausal && first + Form::kRows > first_query + 1)) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int key = first + thread_ / kWarpThreads * 16 + lane_ / 4 + 8 * row;
      int hidden = key < call_.keys ? 0 : Form::kQueries;  // columns below it are
      if (Form::kCausal && key - first_query > hidden) hidden = key - first_query;
      hidden -= lane_ % 4 * 2;
#pragma unroll
      for (int i = 2 * row; i < kScores; i += 4) {
        if (i / 4 * 8 < hidden) p[i] = 0.f;
        if (i / 4 * 8 + 1 < hidden) p[i + 1] = 0.f;
      }
    }
  }

  GENENGINE_DEVICE static void round(const float (&s)[kScores], uint32_t (&p)[kSteps][4]) {
#pragma unroll
    for (int i = 0; i < kScores; i += 2) p[i / 8][i % 8 / 2] = pack<T>(s[i], s[i + 1]);
  }

  // sums (64 keys x D) += weights (64 keys x queries) times the tile of queries; not yet committed.
  GENENGINE_DEVICE void add_products(float (&sums)[kSums], const uint32_t (&weights)[kSteps][4], const char* queries) {
    const uint64_t b = matrix<Sums::down_columns, Form::kLine>(queries, Form::kQueryBox);
    pin(sums);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      Product<T, Form::kDim>::template of_registers<Sums::down_columns>(sums, weights[step], advanced(b, step * 16 * Form::kLine), true);
  }

  // dq of a tile of queries = ds k over all keys of the tile, added to the sums in global memory.
  GENENGINE_DEVICE void add_queries(const KeyTile& tile, int i) {
    float dq[kSums];
    const uint64_t a = matrix<Sums::down_columns, Form::kWeightsLine>(shared_.weights + i % 2 * Form::kWeightsBytes);
    const uint64_t b = matrix<Sums::down_columns, Form::kLine>(shared_.k, Form::kKeyBox);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Form::kKeys / 16; ++step)
      Product<T, Form::kDim>::template of_shared<Sums::down_columns, Sums::down_columns>(
          dq, advanced(a, step * 16 * Form::kWeightsLine), advanced(b, step * 16 * Form::kLine), step > 0);
    wgmma_commit();
    if (thread_ == 0) bulk_wait_read<0>();  // the last tile's sums have left
    wgmma_wait<0>();
    pin(dq);
    named_sync(kAlone + number_, kWarpgroup);
    char* sums = shared_.sums + number_ * Form::kSumsBytes;
#pragma unroll
    for (int k = 0; k < kSums; k += 4) store_shared(sums + (k / 4 * kWarpgroup + thread_) * 16, {{dq[k], dq[k + 1], dq[k + 2], dq[k + 3]}});
    publish_to_async();
    named_sync(kAlone + number_, kWarpgroup);
    if (thread_ == 0) send(tile, i, reinterpret_cast<const float*>(sums));
  }

  GENENGINE_DEVICE void send(const KeyTile& tile, int i, const float* sums) const {
    const int64_t at = (static_cast<int64_t>(tile.batch) * call_.heads + tile.head) * query_tiles(call_) + i;
    if (call_.turns) await_count(call_.turns + at, tile.number);
    bulk_add(call_.sums + at * (Form::kQueries * Form::kDim), sums, Form::kSumsBytes);
    bulk_commit();
    if (!call_.turns) return;
    bulk_wait<0>();
    count_up(call_.turns + at);
  }

  // dk and dv into what was k and v, which nobody reads any more, and from there by TMA.
  GENENGINE_DEVICE void write(const KeyTile& tile, float (&dk)[kSums], const float (&dv)[kSums]) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) dk[i] *= call_.natural_scale;
    named_sync(kBoth, Form::kConsumers * kWarpgroup);
    lay_down(shared_.k, dk);
    lay_down(shared_.v, dv);
    publish_to_async();
    named_sync(kAlone + number_, kWarpgroup);
    if (thread_ != 0) return;
    const int rows = number_ * Form::kRows;
    if (tile.first + rows < call_.keys)
      for (int box = 0; box < Form::kBoxes; ++box) {
        const int at = box * Form::kKeyBox + rows * Form::kLine;
        tma_store(&call_.dk, shared_.k + at, box * Form::kColumns, tile.head, tile.first + rows, tile.batch);
        tma_store(&call_.dv, shared_.v + at, box * Form::kColumns, tile.head, tile.first + rows, tile.batch);
      }
    bulk_commit();
    bulk_wait_read<0>();
    barrier_arrive(shared_.keys_empty);
  }

  GENENGINE_DEVICE void lay_down(char* to, const float (&values)[kSums]) const {
    const int upper = number_ * Form::kRows + thread_ / kWarpThreads * 16 + lane_ / 4;
#pragma unroll
    for (int i = 0; i < kSums; i += 2) {
      const int row = upper + i / 2 % 2 * 8, column = i / 4 * 8;
      store_shared(to + column / Form::kColumns * Form::kKeyBox + swizzled<Form::kLine>(row, column % Form::kColumns) + lane_ % 4 * 4,
                   pack<T>(values[i], values[i + 1]));
    }
  }

  const BackwardCall& call_;
  const BackwardShared<Form>& shared_;
  const int number_, thread_, lane_;
  Ring<Form::kStages> ring_;
};

// ---- before and after ------------------------------------------------------------------------------------------------------

struct Strided {
  void* base;
  int64_t batch, token, head;  // in elements

  template <class Word>
  GENENGINE_DEVICE Word* at(int b, int n, int h, int d) const {
    return reinterpret_cast<Word*>(static_cast<uint16_t*>(base) + b * batch + n * token + h * head + d);
  }
};

struct PrepareCall {
  Strided grad_o, o;
  const float* lse;  // (B, H, N)
  float* stats;      // of BackwardCall
  int64_t rows;      // B H query tiles 64
  int heads, queries, padded;
};

constexpr int kPrepareThreads = 256, kPrepareLanes = 16;  // of a row, eight columns each

// stats of rows of all heads: bytes grad_o, o, lse read and stats written once, sums over D in lane order, then by halves.
template <class T, int Dim>
GENENGINE_DEVICE void prepare_backward(const PrepareCall& call) {
  const int64_t row = static_cast<int64_t>(block_index()) * (kPrepareThreads / kPrepareLanes) + thread_index() / kPrepareLanes;
  const int lane = thread_index() % kPrepareLanes, n = static_cast<int>(row % call.padded);
  const int64_t index = row / call.padded;  // of sample and head
  const int b = static_cast<int>(index / call.heads), h = static_cast<int>(index % call.heads);
  const bool there = row < call.rows && n < call.queries;
  float delta = 0.f;
  if (there && lane * 8 < Dim) {
    const FourWords grad = *call.grad_o.at<FourWords>(b, n, h, lane * 8), o = *call.o.at<FourWords>(b, n, h, lane * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      delta += unpack_low<T>(grad.word[i]) * unpack_low<T>(o.word[i]) + unpack_high<T>(grad.word[i]) * unpack_high<T>(o.word[i]);
  }
#pragma unroll
  for (int mask = kPrepareLanes / 2; mask > 0; mask /= 2) delta += shuffle_xor(delta, mask);
  if (lane != 0 || row >= call.rows) return;
  constexpr float kLog2E = 1.44269504088896341f;
  *reinterpret_cast<TwoFloats*>(call.stats + 2 * row) = {
      {there ? call.lse[index * call.queries + n] * kLog2E : INFINITY, delta}};
}

struct FinishCall {
  const float* sums;  // of BackwardCall
  Strided dq;
  float natural_scale;
  int64_t quads;  // B H query tiles 16 D
  int heads, queries, padded;
};

constexpr int kFinishThreads = 256;

// dq = scale sums, a thread for four of them: two columns of two rows.
template <class T, int Dim>
GENENGINE_DEVICE void finish_backward(const FinishCall& call) {
  const int64_t quad = static_cast<int64_t>(block_index()) * kFinishThreads + thread_index();
  if (quad >= call.quads) return;
  const int thread = static_cast<int>(quad % kWarpgroup), column = static_cast<int>(quad / kWarpgroup % (Dim / 8)) * 8 + thread % 4 * 2;
  const int64_t tile = quad / (kWarpgroup * (Dim / 8));
  const int tiles = call.padded / 64, row = static_cast<int>(tile % tiles) * 64 + thread / kWarpThreads * 16 + thread % kWarpThreads / 4;
  const int b = static_cast<int>(tile / tiles / call.heads), h = static_cast<int>(tile / tiles % call.heads);
  const FourFloats sums = reinterpret_cast<const FourFloats*>(call.sums)[quad];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (row + 8 * i < call.queries)
      *call.dq.at<uint32_t>(b, row + 8 * i, h, column) =
          pack<T>(call.natural_scale * sums.value[2 * i], call.natural_scale * sums.value[2 * i + 1]);
}

// memory: kShared bytes from a multiple of 1024.
template <class Form>
GENENGINE_DEVICE void attention_backward(const BackwardCall& call, char* memory) {
  const BackwardShared<Form> shared(memory);
  if (thread_index() == 0) shared.init();
  block_barrier();
  const int warpgroup = thread_index() / kWarpgroup;
  if (warpgroup == 0) {
    give_registers<Form::kProducerRegisters>();
    if (thread_index() == 0) BackwardProducer<Form>(call, shared).run();
  } else {
    take_registers<Form::kConsumerRegisters>();
    BackwardConsumer<Form>(call, shared, warpgroup - 1).run();
  }
}

}  // namespace genengine::hopper
