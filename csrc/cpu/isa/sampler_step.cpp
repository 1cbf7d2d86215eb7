// The row of sampler_step over a range of one sample: tiles of float32 in L1, one fused loop per tile.
#include "genengine/sampler_step.h"

#include "cpu/elementwise_loops.h"
#include "cpu/isa/tile.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

// One tile's operands, after everything that a zero coefficient makes unnecessary is gone.
struct Tile {
  const float *x, *o0, *o1, *z;
  const float* h[kMaxHistory];
  float h_coefficient[kMaxHistory];
  float g1, p, q, r, a, b, c, s;
  Phi phi;
  float *y, *v;
};

enum Stage { kNoY, kClampY, kThresholdY };

// The same sum without y for four groups of sixteen: every load before the first store. Tensors allocated one after the
// other often differ by a few lines modulo 4096, where a load right behind a store to "the same" page offset must wait.
template <int Branches, bool History, bool Noise>
int64_t plain_groups(const Tile& t, int64_t count) {
  constexpr int kGroups = 4;
  int64_t i = 0;
  for (; i + kGroups * kLanes <= count; i += kGroups * kLanes) {
    Lanes v[kGroups];
#pragma GCC unroll 4
    for (int k = 0; k < kGroups; ++k) {
      const int64_t at = i + k * kLanes;
      Lanes m = load(t.o0 + at);
      if (Branches == 2) m = m + t.g1 * (load(t.o1 + at) - m);
      v[k] = t.a * load(t.x + at) + t.b * m;
      if (History) v[k] = v[k] + t.h_coefficient[0] * load(t.h[0] + at);
      if (Noise) v[k] = v[k] + t.s * load(t.z + at);
    }
#pragma GCC unroll 4
    for (int k = 0; k < kGroups; ++k) store(t.v + i + k * kLanes, v[k]);
  }
  return i;
}

// v = a x + b m + c y + h H + s z, with at most one register; kClampY serves identity too, with r = infinity.
template <int Branches, Stage Y, bool History, bool Noise>
void fused(const Tile& t, int64_t count) {
  const float *x = t.x, *o0 = t.o0, *o1 = t.o1, *h0 = t.h[0], *z = t.z;
  const float a = t.a, b = t.b, c = t.c, g1 = t.g1, p = t.p, q = t.q, r = t.r, k0 = t.h_coefficient[0], s = t.s;
  float *y_out = t.y, *v_out = t.v;
  const int64_t done = Y == kNoY ? plain_groups<Branches, History, Noise>(t, count) : 0;
#pragma GCC ivdep
  for (int64_t i = done; i < count; ++i) {
    float m = o0[i];
    if (Branches == 2) m = m + g1 * (o1[i] - m);
    float v, y = 0.f;
    if (Y == kNoY) {
      v = a * x[i] + b * m;
    } else {
      y = term(p, x[i]) + term(q, m);
      y = y < -r ? -r : (y > r ? r : y);
      if (Y == kThresholdY) y = y / r;
      v = (term(a, x[i]) + term(b, m)) + term(c, y);
    }
    if (History) v = v + k0 * h0[i];
    if (Noise) v = v + s * z[i];
    if (Y != kNoY) y_out[i] = y;  // after the register was read: y_out may be that register
    v_out[i] = v;
  }
}

template <int Branches, Stage Y>
void with_history(const Tile& t, int64_t count) {
  if (t.z)
    t.h[0] ? fused<Branches, Y, true, true>(t, count) : fused<Branches, Y, false, true>(t, count);
  else
    t.h[0] ? fused<Branches, Y, true, false>(t, count) : fused<Branches, Y, false, false>(t, count);
}
template <int Branches>
void with_stage(const Tile& t, Stage stage, int64_t count) {
  switch (stage) {
    case kNoY: return with_history<Branches, kNoY>(t, count);
    case kClampY: return with_history<Branches, kClampY>(t, count);
    default: return with_history<Branches, kThresholdY>(t, count);
  }
}

// Further registers, which few rows have, in passes of their own over the tile, which is in L1.
void accumulate(float* v, float coefficient, const float* source, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) v[i] = v[i] + coefficient * source[i];
}

// What does not change from tile to tile of a sample.
struct Plan {
  const StepSample& sample;
  const float* row;
  int flags, branches;
  Stage stage;
  bool need_m, need_x, noise, learned, direct;
  int64_t tile = kTile;
  explicit Plan(const StepSample& s) : sample(s), row(s.row), flags(static_cast<int>(s.row[kFlags])) {
    bool writes_y = false, writes_x = false;
    for (int j = 0; j < s.registers; ++j) {
      writes_y |= write_of(flags, j) == Write::y;
      writes_x |= write_of(flags, j) == Write::x;
    }
    // the shorter loop without y multiplies by a even where it is 0, which is right only if x was not loaded
    const bool need_y = writes_y || row[kC] != 0.f || (writes_x && row[kA] == 0.f);
    stage = !need_y ? kNoY : (phi_of(flags) == Phi::threshold ? kThresholdY : kClampY);
    need_m = row[kB] != 0.f || (need_y && row[kQ] != 0.f);
    need_x = row[kA] != 0.f || (need_y && row[kP] != 0.f) || writes_x;
    branches = s.branches >= 3 && row[kG2] != 0.f ? 3 : (s.branches >= 2 && row[kG1] != 0.f ? 2 : 1);
    noise = row[kS] != 0.f && (s.noise.given || s.noise.draw);
    learned = noise && row[kL] != 0.f && s.variance;
    // x' goes straight to `out`, unless it must pass the caches by, be converted, or x is still to be saved
    direct = s.state == Type::f32 && !s.stream && !writes_x;
    // Shorter turns of arithmetic (noise) and memory (operands) keep the hardware's prefetcher busy; software prefetch was
    // slower at every distance tried.
    if (noise) tile = kTile / 2;
    // a plain row touches no scratch: one loop over the whole range
    const bool plain = direct && stage == kNoY && need_m && need_x && branches <= 2 && s.model == Type::f32;
    if (plain && !noise && s.copies == 0 && s.registers == 0) tile = INT64_MAX;
  }
};

struct Scratch {
  alignas(64) float x[kTile], m0[kTile], m1[kTile], m2[kTile], z[kTile], y[kTile], v[kTile];
};

alignas(64) const float kZeros[kTile] = {};

// The noise of a learned variance, into scratch.
const float* spread_noise(const Plan& plan, const float* z, Scratch& scratch, int64_t first, int64_t count) {
  const float* v = load_tile(plan.sample.variance, plan.sample.model, first, count, scratch.v);
  const float l = plan.row[kL];
  float* to = scratch.z;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) to[i] = spread(l, v[i], z[i]);
  return to;
}

// m with three branches, which are rare, in a loop of its own; then the fused loop sees one.
const float* combine_three(const Plan& plan, const float* o0, const float* o1, const float* o2, float* m, int64_t count) {
  const float g1 = plan.row[kG1], g2 = plan.row[kG2];
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) m[i] = (o0[i] + term(g1, o1[i] - o0[i])) + g2 * (o2[i] - o1[i]);
  return m;
}

void load_outputs(const Plan& plan, Scratch& scratch, Tile& tile, int64_t first, int64_t count) {
  const StepSample& s = plan.sample;
  tile.o0 = tile.o1 = kZeros;
  if (!plan.need_m) return;
  tile.o0 = load_tile(s.outputs[0], s.model, first, count, scratch.m0);
  if (plan.branches >= 2) tile.o1 = load_tile(s.outputs[1], s.model, first, count, scratch.m1);
  if (plan.branches == 3) {
    const float* o2 = load_tile(s.outputs[2], s.model, first, count, scratch.m2);
    tile.o0 = combine_three(plan, tile.o0, tile.o1, o2, scratch.m0, count);
  }
}

int load_history(const Plan& plan, Tile& tile, int64_t first) {
  int used = 0;
  for (int j = 0; j < kMaxHistory; ++j) {
    tile.h[j] = nullptr;
    tile.h_coefficient[j] = 0.f;
  }
  for (int j = 0; j < plan.sample.registers; ++j)
    if (plan.row[kH1 + j] != 0.f) {
      tile.h[used] = plan.sample.history[j] + first;
      tile.h_coefficient[used++] = plan.row[kH1 + j];
    }
  return used;
}

// The first register that takes y receives it from the fused loop itself, unless a later pass still reads registers;
// the others, and x, by copies.
float* y_target(const Plan& plan, Scratch& scratch, int registers_read, int64_t first) {
  for (int j = 0; registers_read <= 1 && j < plan.sample.registers; ++j)
    if (write_of(plan.flags, j) == Write::y) return plan.sample.history[j] + first;
  return scratch.y;
}

void write_history(const Plan& plan, const Tile& tile, int64_t first, int64_t count) {
  for (int j = 0; j < plan.sample.registers; ++j) {
    const Write write = write_of(plan.flags, j);
    float* target = plan.sample.history[j] + first;
    if (write == Write::x) store_row(target, tile.x, count);
    if (write == Write::y && target != tile.y) store_row(target, tile.y, count);
  }
}

void scale(float* __restrict to, float c_in, const float* __restrict v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = c_in * v[i];
}

void write_x_in(const Plan& plan, const float* v, Scratch& scratch, int64_t first, int64_t count) {
  const StepSample& s = plan.sample;
  const float c_in = plan.row[kCIn];
  if (s.model == Type::f32 && !s.stream) {
    for (int k = 0; k < s.copies; ++k) scale(static_cast<float*>(s.x_in[k]) + first, c_in, v, count);
    return;
  }
  if (s.copies) scale(scratch.m0, c_in, v, count);
  for (int k = 0; k < s.copies; ++k) store_tile(s.x_in[k], s.model, first, count, scratch.m0, s.stream);
}

}  // namespace

void step_range(const StepSample& sample, int64_t first, int64_t count) {
  const Plan plan(sample);
  const float* row = plan.row;
  Scratch scratch;
  Tile tile;
  tile.g1 = row[kG1];
  tile.p = row[kP], tile.q = row[kQ];
  tile.r = phi_of(plan.flags) == Phi::identity ? __builtin_inff() : row[kR];
  tile.a = row[kA], tile.b = row[kB], tile.c = row[kC], tile.s = row[kS];
  for (const int64_t end = first + count; first < end;) {
    const int64_t n = end - first < plan.tile ? end - first : plan.tile;
    const float* z = plan.noise ? noise_tile(sample.noise, first, n, scratch.z) : nullptr;
    if (plan.learned) z = spread_noise(plan, z, scratch, first, n);
    tile.x = plan.need_x ? load_tile(sample.x, sample.state, first, n, scratch.x) : kZeros;
    load_outputs(plan, scratch, tile, first, n);
    const int registers = load_history(plan, tile, first);
    tile.z = registers <= 1 ? z : nullptr;  // the noise is the last term: after further registers, by a pass of its own
    tile.y = y_target(plan, scratch, registers, first);
    tile.v = plan.direct ? static_cast<float*>(sample.out) + first : scratch.v;
    if (plan.branches == 2)
      with_stage<2>(tile, plan.stage, n);
    else
      with_stage<1>(tile, plan.stage, n);
    for (int j = 1; j < registers; ++j) accumulate(tile.v, tile.h_coefficient[j], tile.h[j], n);
    if (z && !tile.z) accumulate(tile.v, row[kS], z, n);
    write_history(plan, tile, first, n);
    if (!plan.direct) store_tile(sample.out, sample.state, first, n, tile.v, sample.stream);
    write_x_in(plan, tile.v, scratch, first, n);
    first += n;
  }
  if (sample.stream) fence();
}

void copy_range(const void* x, void* out, Type type, int64_t first, int64_t count) {
  const int64_t size = type == Type::f32 ? 4 : 2;
  const char* from = static_cast<const char*>(x) + first * size;
  char* to = static_cast<char*>(out) + first * size;
  if (from != to) __builtin_memmove(to, from, static_cast<size_t>(count * size));
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
