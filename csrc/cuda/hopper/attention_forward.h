// Attention forward on Hopper: o = softmax(scale q k^T) v and its log-sum-exp, a block of threads for tiles of queries.
//
// One warpgroup produces: a thread of it has TMA fetch tiles of q, k and v into rings in shared memory, ahead of their use. The
// others consume, each 64 queries: s = q k^T and o += p v by wgmma, the next tile's s in flight while this one's softmax is
// computed, and the warpgroups taking turns, so that one's softmax runs under another's products (Shah et al. 2024,
// "FlashAttention-3"). Blocks are persistent: they take tile after tile, the producer running ahead across tiles.
//
// Bytes: q, k, v read and o, lse written once, where a head's k and v stay in L2. FLOPs: 4 N M D per head, causal half of it
// and the diagonal's tiles. Products in 16 bits with float32 sums, softmax in float32 base 2; the weights are rounded to 16 bits
// before they are multiplied, their sum is not. A query's keys are summed from the last tile to the first; no atomics.
//
// Nothing is padded in memory. q and k are multiplied over whole boxes of columns (72 as 80), whose columns beyond D TMA fills with
// zeros; v's product has exactly D columns. Keys that do not exist, or that causality hides, are masked in boundary tiles alone.
#pragma once
#include <math.h>

#include "cuda/hopper/tiles.h"

namespace genengine::hopper {

// What is compiled: T Half or Bf16. kQueryStages: q tiles in shared memory; o leaves through them.
template <class T_, int kDim_, int kConsumers_, int kKeys_, int kStages_, int kQueryStages_, bool kCausal_>
struct ForwardForm {
  using T = T_;
  static constexpr int kDim = kDim_, kConsumers = kConsumers_, kKeys = kKeys_, kStages = kStages_, kQueryStages = kQueryStages_;
  static constexpr bool kCausal = kCausal_;

  static constexpr int kColumns = Boxes<kDim>::kColumns, kBoxes = Boxes<kDim>::kCount, kDepth = Boxes<kDim>::kDepth;
  static constexpr int kLine = Boxes<kDim>::kLine;
  static constexpr int kRows = 64, kQueries = kConsumers * kRows;
  static constexpr int kQueryBox = kRows * kLine, kKeyBox = kKeys * kLine;
  static constexpr int kQueryBytes = kQueries * kDepth * 2, kKeyBytes = kKeys * kDepth * 2;

  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  // Of 65,536: what the launch gives each thread, and what a warpgroup makes of it.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : kConsumers == 3 ? 160 : 112;

  static constexpr int kBarriers = 2 * (kQueryStages + 2 * kStages);
  static constexpr int kShared = kQueryStages * kQueryBytes + 2 * kStages * kKeyBytes + kBarriers * 8;

  static_assert(kShared <= 227 << 10, "what a block may have");
  static_assert(kConsumers >= 2 && kConsumers <= 4 && kDim % 8 == 0 && kKeys % 16 == 0 && kKeys <= 256);
  static_assert(kQueryBox % 1024 == 0 && kKeyBox % 1024 == 0, "boxes begin at whole swizzle patterns");
};

struct ForwardCall {
  TensorMap q, k, v, o;  // (D, H, N, B) innermost first; boxes of (kColumns, 1, 64 queries or kKeys keys, 1)
  float* lse;            // (B, H, N)
  float scale;           // of the scores, times log2(e)
  int heads, queries, keys;
  int tiles, blocks;  // all tiles, and those of a head
  int section;        // heads whose tiles are taken together, since their k and v fit L2 together
};

struct Tile {
  int batch, head, first;  // its first query
};

// Sections one after the other; within one the last queries of all heads come first: causal, these are the longest tiles.
GENENGINE_DEVICE Tile tile_at(const ForwardCall& call, int queries, int heads_in_all, int index) {
  const int section = index / (call.section * call.blocks), within = index % (call.section * call.blocks);
  const int left = heads_in_all - section * call.section, heads = left < call.section ? left : call.section;
  const int head = section * call.section + within % heads;
  return {head / call.heads, head % call.heads, (call.blocks - 1 - within / heads) * queries};
}

template <class Form>
struct Shared {
  Buffers<Form::kQueryStages> q;
  Buffers<Form::kStages> k, v;

  GENENGINE_DEVICE explicit Shared(char* memory) {
    q.data = memory;
    k.data = q.data + Form::kQueryStages * Form::kQueryBytes;
    v.data = k.data + Form::kStages * Form::kKeyBytes;
    q.full = reinterpret_cast<Barrier*>(v.data + Form::kStages * Form::kKeyBytes);
    q.empty = q.full + Form::kQueryStages;
    k.full = q.empty + Form::kQueryStages;
    k.empty = k.full + Form::kStages;
    v.full = k.empty + Form::kStages;
    v.empty = v.full + Form::kStages;
  }

  GENENGINE_DEVICE void init() const {
    constexpr int kWarps = Form::kConsumers * kWarpgroup / kWarpThreads;
    q.init(Form::kConsumers);  // a warpgroup's stores are one thread's
    k.init(kWarps);
    v.init(kWarps);
    barrier_publish();
  }
};

// Key tiles that a tile of queries sees.
template <class Form>
GENENGINE_DEVICE int key_tiles(const ForwardCall& call, const Tile& tile) {
  int seen = call.keys;
  if (Form::kCausal && tile.first + Form::kQueries < seen) seen = tile.first + Form::kQueries;
  return (seen + Form::kKeys - 1) / Form::kKeys;
}

// ---- producer --------------------------------------------------------------------------------------------------------------

template <class Form>
class ForwardProducer {
 public:
  GENENGINE_DEVICE ForwardProducer(const ForwardCall& call, const Shared<Form>& shared) : call_(call), shared_(shared) {}

  GENENGINE_DEVICE void run(int heads_in_all) {
    prefetch_map(&call_.q);
    prefetch_map(&call_.k);
    prefetch_map(&call_.v);
    for (int index = block_index(); index < call_.tiles; index += block_count()) {
      const Tile tile = tile_at(call_, Form::kQueries, heads_in_all, index);
      fetch_queries(tile);
#pragma unroll 1  // there are few registers here
      for (int i = key_tiles<Form>(call_, tile) - 1; i >= 0; --i) {
        fetch_keys(call_.k, shared_.k, tile, i);
        fetch_keys(call_.v, shared_.v, tile, i);
        ring_.advance();
      }
    }
  }

 private:
  GENENGINE_DEVICE void fetch_queries(const Tile& tile) {
    Barrier* full = shared_.q.full + query_ring_.stage;
    barrier_wait(shared_.q.empty + query_ring_.stage, query_ring_.phase ^ 1);
    barrier_expect(full, Form::kQueryBytes);
    char* to = shared_.q.data + query_ring_.stage * Form::kQueryBytes;
    for (int consumer = 0; consumer < Form::kConsumers; ++consumer)
      for (int box = 0; box < Form::kBoxes; ++box, to += Form::kQueryBox)
        tma_load(to, &call_.q, full, box * Form::kColumns, tile.head, tile.first + consumer * Form::kRows, tile.batch);
    query_ring_.advance();
  }

  GENENGINE_DEVICE void fetch_keys(const TensorMap& map, const Buffers<Form::kStages>& buffers, const Tile& tile, int index) {
    Barrier* full = buffers.full + ring_.stage;
    barrier_wait(buffers.empty + ring_.stage, ring_.phase ^ 1);
    barrier_expect(full, Form::kKeyBytes);
    char* to = buffers.data + ring_.stage * Form::kKeyBytes;
    for (int box = 0; box < Form::kBoxes; ++box, to += Form::kKeyBox)
      tma_load(to, &map, full, box * Form::kColumns, tile.head, index * Form::kKeys, tile.batch);
  }

  const ForwardCall& call_;
  const Shared<Form>& shared_;
  Ring<Form::kStages> ring_;
  Ring<Form::kQueryStages> query_ring_;
};

// ---- consumers -------------------------------------------------------------------------------------------------------------

// The running softmax of a thread's two rows, `Count` scores of a tile at a time: registers 4 k, 4 k + 1 of the upper row, 4 k + 2,
// 4 k + 3 of the lower. The four lanes of a row hold parts of it: the maximum is that of all, the sum this thread's own.
struct Softmax {
  float scale, largest[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};

  // s becomes exp2(scale s - largest); returns in `shrink` what the sums over earlier tiles are to be multiplied by.
  template <int Count>
  GENENGINE_DEVICE void take(float (&s)[Count], float (&shrink)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float most = largest[row];
#pragma unroll
      for (int i = 2 * row; i < Count; i += 4) most = fmaxf(most, fmaxf(s[i], s[i + 1]));
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(most, shuffle_xor(most, 2));
      const float base = most == -INFINITY ? 0.f : most * scale;  // a row that has seen no key yet: exp2(-inf), not NaN
      shrink[row] = exp2_approx(fmaf(largest[row], scale, -base));
      largest[row] = most;
      float sum = 0.f;
#pragma unroll
      for (int i = 2 * row; i < Count; i += 4) {
        s[i] = exp2_approx(fmaf(s[i], scale, -base));
        s[i + 1] = exp2_approx(fmaf(s[i + 1], scale, -base));
        sum += s[i] + s[i + 1];
      }
      total[row] = fmaf(total[row], shrink[row], sum);
    }
  }

  // The whole row's sum.
  GENENGINE_DEVICE float sum(int row) const {
    float sum = total[row];
    sum += shuffle_xor(sum, 1);
    return sum + shuffle_xor(sum, 2);
  }

  GENENGINE_DEVICE float lse(int row, float sum) const {
    constexpr float kLn2 = 0.693147180559945309f;
    return (largest[row] * scale + log2f(sum)) * kLn2;
  }
};

template <class Form>
class ForwardConsumer {
 public:
  using T = typename Form::T;

  // number: which of the consumer warpgroups.
  GENENGINE_DEVICE ForwardConsumer(const ForwardCall& call, const Shared<Form>& shared, int number)
      : call_(call), shared_(shared), number_(number), thread_(thread_index() % kWarpgroup), lane_(thread_ % kWarpThreads) {}

  GENENGINE_DEVICE void run(int heads_in_all) {
    if (number_ == Form::kConsumers - 1) named_arrive(kTurn, 2 * kWarpgroup);  // the first turn is the first warpgroup's
    for (int index = block_index(); index < call_.tiles; index += block_count()) {
      const auto tile = [&] { return tile_at(call_, Form::kQueries, heads_in_all, index); };  // again when written: registers
      attend(tile);
      query_ring_.advance();
    }
    // The last turn is passed to the first warpgroup, too. (Asked of the thread again: a register less in the loop.)
    if (thread_index() / kWarpgroup == 1) named_sync(kTurn, 2 * kWarpgroup);
  }

 private:
  static constexpr int kScores = Form::kKeys / 2, kSums = Form::kDim / 2, kSteps = Form::kKeys / 16;
  static constexpr int kTurn = 1, kStore = kTurn + Form::kConsumers;  // named barriers, one for each warpgroup

  template <class TileAgain>
  GENENGINE_DEVICE void attend(TileAgain tile) {
    int i = key_tiles<Form>(call_, tile()) - 1;
    first_row_ = tile().first + number_ * Form::kRows;
    Softmax softmax{call_.scale};
    float s[kScores], o[kSums], shrink[2];
    uint32_t p[kSteps][4];
#pragma unroll
    for (int i = 0; i < kSums; ++i) o[i] = 0.f;
    barrier_wait(shared_.q.full + query_ring_.stage, query_ring_.phase);

    await_turn();
    begin_scores(s, ring_);
    pass_turn();
    wgmma_wait<0>();
    pin(s);
    release(shared_.k, ring_.stage);
    mask(s, i);
    softmax.take(s, shrink);
    round(s, p);
    while (--i >= 0) {
      Ring<Form::kStages> next = ring_;
      next.advance();
      await_turn();
      begin_scores(s, next);
      begin_output(o, p);
      pass_turn();
      wgmma_wait<1>();
      pin(s);
      release(shared_.k, next.stage);
      mask(s, i);
      softmax.take(s, shrink);
      wgmma_wait<0>();
      pin(o);
      release(shared_.v, ring_.stage);
#pragma unroll
      for (int k = 0; k < kSums; ++k) o[k] *= shrink[k / 2 % 2];
      round(s, p);
      ring_ = next;
    }
    begin_output(o, p);
    wgmma_wait<0>();
    pin(o);
    release(shared_.v, ring_.stage);
    ring_.advance();
    write(tile(), o, softmax);
  }

  // s = q k^T of the tile of keys at this place of the ring.
  GENENGINE_DEVICE void begin_scores(float (&s)[kScores], const Ring<Form::kStages>& at) {
    barrier_wait(shared_.k.full + at.stage, at.phase);
    const uint64_t q = matrix<Sums::along_rows, Form::kLine>(queries());
    const uint64_t k = matrix<Sums::along_rows, Form::kLine>(shared_.k.data + at.stage * Form::kKeyBytes);
    pin(s);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Form::kDepth / 16; ++step) {
      const int box = step * 16 / Form::kColumns, bytes = step * 16 % Form::kColumns * 2;
      Product<T, Form::kKeys>::template of_shared<Sums::along_rows, Sums::along_rows>(
          s, advanced(q, box * Form::kQueryBox + bytes), advanced(k, box * Form::kKeyBox + bytes), step > 0);
    }
    wgmma_commit();
  }

  // o += p v of the tile of values that ring_ is at.
  GENENGINE_DEVICE void begin_output(float (&o)[kSums], const uint32_t (&p)[kSteps][4]) {
    barrier_wait(shared_.v.full + ring_.stage, ring_.phase);
    const uint64_t v = matrix<Sums::down_columns, Form::kLine>(shared_.v.data + ring_.stage * Form::kKeyBytes, Form::kKeyBox);
    pin(o);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      Product<T, Form::kDim>::template of_registers<Sums::down_columns>(o, p[step], advanced(v, step * 16 * Form::kLine), true);
    wgmma_commit();
  }

  // -inf where a key does not exist or is later than the query; nothing in tiles without such.
  GENENGINE_DEVICE void mask(float (&s)[kScores], int tile) const {
    const int first_key = tile * Form::kKeys, end = first_key + Form::kKeys;
    if (end <= call_.keys && !(Form::kCausal && end > first_row_ + 1)) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      int seen = call_.keys;
      if (Form::kCausal && row_of(row) + 1 < seen) seen = row_of(row) + 1;
      seen -= first_key + lane_ % 4 * 2;
#pragma unroll
      for (int i = 2 * row; i < kScores; i += 4) {
        if (i / 4 * 8 >= seen) s[i] = -INFINITY;
        if (i / 4 * 8 + 1 >= seen) s[i + 1] = -INFINITY;
      }
    }
  }

  GENENGINE_DEVICE static void round(const float (&s)[kScores], uint32_t (&p)[kSteps][4]) {
#pragma unroll
    for (int i = 0; i < kScores; i += 2) p[i / 8][i % 8 / 2] = pack<T>(s[i], s[i + 1]);
  }

  // o / sum into this warpgroup's q, which nobody reads any more, and from there by TMA; lse directly.
  GENENGINE_DEVICE void write(const Tile& tile, const float (&o)[kSums], const Softmax& softmax) {
    named_sync(kStore + number_, kWarpgroup);
    const int upper = thread_ / kWarpThreads * 16 + lane_ / 4;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float sum = softmax.sum(row), inverse = 1.f / sum;
#pragma unroll
      for (int i = 2 * row; i < kSums; i += 4)
        store_shared(place(upper + 8 * row, i / 4 * 8), pack<T>(o[i] * inverse, o[i + 1] * inverse));
      if (lane_ % 4 == 0 && row_of(row) < call_.queries)
        call_.lse[(static_cast<int64_t>(tile.batch) * call_.heads + tile.head) * call_.queries + row_of(row)] =
            softmax.lse(row, sum);
    }
    publish_to_async();
    named_sync(kStore + number_, kWarpgroup);
    if (thread_ != 0) return;
    if (first_row_ < call_.queries)
      for (int box = 0; box < Form::kBoxes; ++box)
        tma_store(&call_.o, queries() + box * Form::kQueryBox, box * Form::kColumns, tile.head, first_row_, tile.batch);
    bulk_commit();
    bulk_wait_read<0>();
    barrier_arrive(shared_.q.empty + query_ring_.stage);
  }

  // Where this lane's pair of columns from `column` on, a multiple of 8, lies in the warpgroup's q.
  GENENGINE_DEVICE char* place(int row, int column) const {
    return queries() + column / Form::kColumns * Form::kQueryBox + swizzled<Form::kLine>(row, column % Form::kColumns) + lane_ % 4 * 4;
  }

  GENENGINE_DEVICE char* queries() const {
    return shared_.q.data + query_ring_.stage * Form::kQueryBytes + number_ * Form::kBoxes * Form::kQueryBox;
  }

  // The query of this thread's upper (0) or lower (1) row.
  GENENGINE_DEVICE int row_of(int row) const { return first_row_ + thread_ / kWarpThreads * 16 + lane_ / 4 + 8 * row; }

  template <class AnyBuffers>
  GENENGINE_DEVICE void release(const AnyBuffers& buffers, int stage) const {
    if (lane_ == 0) barrier_arrive(buffers.empty + stage);
  }

  // Products are issued in turns: so one warpgroup's softmax and another's products overlap.
  GENENGINE_DEVICE void await_turn() const { named_sync(kTurn + number_, 2 * kWarpgroup); }
  GENENGINE_DEVICE void pass_turn() const { named_arrive(kTurn + (number_ + 1) % Form::kConsumers, 2 * kWarpgroup); }

  const ForwardCall& call_;
  const Shared<Form>& shared_;
  const int number_, thread_, lane_;
  Ring<Form::kStages> ring_;
  Ring<Form::kQueryStages> query_ring_;
  int first_row_ = 0;
};

// memory: kShared bytes from a multiple of 1024.
template <class Form>
GENENGINE_DEVICE void attention_forward(const ForwardCall& call, char* memory) {
  const Shared<Form> shared(memory);
  if (thread_index() == 0) shared.init();
  block_barrier();
  const int heads_in_all = call.tiles / call.blocks, warpgroup = thread_index() / kWarpgroup;
  if (warpgroup == 0) {
    give_registers<Form::kProducerRegisters>();
    if (thread_index() == 0) ForwardProducer<Form>(call, shared).run(heads_in_all);
  } else {
    take_registers<Form::kConsumerRegisters>();
    ForwardConsumer<Form>(call, shared, warpgroup - 1).run(heads_in_all);
  }
}

// ---- which forms there are -------------------------------------------------------------------------------------------------

struct ForwardSizes {
  int consumers, keys, stages, query_stages;
};

// For each head dim, tiles as large as compile without spills into registers and fit shared memory. `few`: for at most
// kFewQueries queries, where memory is the limit: a tile takes all queries of a head, so that k and v are read once, and
// the ring holds several heads' keys in flight. None was timed.
constexpr int kFewQueries = 256;
constexpr bool has_few(int dim, bool causal) { return (dim == 64 || dim == 72) && !causal; }
constexpr ForwardSizes forward_sizes(int dim, bool causal, bool few) {
  if (few) return {4, 64, dim == 64 ? 8 : 6, 2};
  if (dim <= 72) return {3, 128, 3, 2};
  if (dim == 80) return {3, 96, 4, 2};
  if (dim == 96) return {2, 128, 3, 2};
  return causal ? ForwardSizes{2, 128, 2, 2} : ForwardSizes{2, 176, 2, 1};  // 128
}

template <class T, int Dim, bool Causal, bool Few, ForwardSizes Sizes = forward_sizes(Dim, Causal, Few)>
using Forward = ForwardForm<T, Dim, Sizes.consumers, Sizes.keys, Sizes.stages, Sizes.query_stages, Causal>;

}  // namespace genengine::hopper
