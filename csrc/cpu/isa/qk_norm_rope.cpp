// qk_norm_rope, a head at a time: weight, cos and sin are made into two factors per element once per token, for all its
// heads; then a head is read once for its squares and, from the first-level cache, once for its products. A last group
// of fewer than sixteen elements overlaps the one before: heads of 72 are common, and such ends must not be slow.
#include "genengine/qk_norm_rope.h"

#include "cpu/qk_norm_rope_loops.h"

#include "cpu/isa/lanes_math.h"
#include "cpu/isa/row.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

enum class Pairs { none, interleaved, halves };

constexpr int64_t kRoom = kQkMaxDim + 2 * kLanes;  // groups may reach over the ends of a row in scratch
constexpr int64_t kStaged = 4096;                  // elements of one token gathered for streaming

// ---- groups of sixteen -----------------------------------------------------------------------------------------------

GENENGINE_INLINE Lanes keep(Lanes v, Lanes mask) {
  for (int i = 0; i < kParts; ++i) v.part[i] = (Native)((NativeBits)v.part[i] & (NativeBits)mask.part[i]);
  return v;
}

GENENGINE_INLINE Lanes swap_pairs(Lanes v) {
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    v.part[i] = __builtin_shufflevector(v.part[i], v.part[i], 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif defined(__AVX2__)
    v.part[i] = __builtin_shufflevector(v.part[i], v.part[i], 1, 0, 3, 2, 5, 4, 7, 6);
#else
    v.part[i] = __builtin_shufflevector(v.part[i], v.part[i], 1, 0, 3, 2);
#endif
  }
  return v;
}

// The last group of a row: the last sixteen elements, or of a shorter row what there is.
struct Last {
  int64_t first, count;  // count: elements that are in no whole group
  bool overlaps;
  Lanes fresh;  // the mask of those elements

  GENENGINE_INLINE Last(int64_t dim, Pairs pairs) : count(tail(dim)) {
    static const uint32_t masks[2 * kLanes] = {0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,
                                               ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};
    overlaps = dim >= kLanes && (dim % 2 == 0 || pairs != Pairs::interleaved);  // else it would tear pairs apart
    first = overlaps ? dim - kLanes : dim - count;
    memcpy(&fresh, masks + (overlaps ? count : kLanes), sizeof fresh);
  }
  template <class T>
  GENENGINE_INLINE Lanes read(const T* row) const {
    return overlaps ? load(row + first) : GENENGINE_ISA::read(row + first, Part{count});
  }
  template <class T>
  GENENGINE_INLINE void write(T* row, Lanes v) const {
    if (overlaps)
      store(row + first, v);
    else
      GENENGINE_ISA::write(row + first, v, Part{count});
  }
};

// What all heads of a call share.
struct Frame {
  int64_t dim, half;
  Last last;
  bool partly;  // some elements are not rotated
  GENENGINE_INLINE Frame(const QkNormRope& op, Pairs pairs)
      : dim(op.dim), half(op.half), last(op.dim, pairs), partly(op.half > 0 && 2 * op.half < op.dim) {}
};

// body(i, k, mask) for the groups of a row from its end to its start; k in {0, 1}: the accumulator. body_last: of the last.
template <class Body, class BodyLast>
GENENGINE_INLINE void descend(const Frame& f, Body body, BodyLast body_last) {
  if (f.last.count) body_last();
  int64_t i = f.dim - f.last.count;
  for (; i >= 2 * kLanes; i -= 2 * kLanes) {
    body(i - kLanes, 0);
    body(i - 2 * kLanes, 1);
  }
  if (i) body(0, 0);
}

// The elements of a head at the places of their partners: partner[i] = x[i + half] below half, x[i - half] from there on.
// In descending order, for a group that reaches over an end may spoil places below its own.
GENENGINE_INLINE void place(float* partner, Lanes v, int64_t i, int64_t half) {
  if (i >= 2 * half) return;
  if (i + kLanes > half) store(partner + i - half, v);
  if (i < half) store(partner + i + half, v);
}

// rotated: the mask of the elements that have a partner.
template <Pairs P>
GENENGINE_INLINE Lanes partner_of(Lanes v, const float* partner, const float* rotated, int64_t i, bool partly) {
  const Lanes found = P == Pairs::halves ? load(partner + i) : swap_pairs(v);
  return partly ? keep(found, load(rotated + i)) : found;
}

// Asks for the line that lies kAhead bytes on, mostly a later head's: the work on one head leaves the memory idle, and the
// hardware's prefetcher stops at every page. Measured a third faster. k: as in `descend`; of 16-bit groups two share a line.
constexpr int64_t kAhead = 4096;
template <class T>
GENENGINE_INLINE void fetch_ahead(const T* from, int k) {
  if (sizeof(T) == 4 || k == 0) __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead, 0, 2);
}

// ---- a token's factors -----------------------------------------------------------------------------------------------

struct Factors {
  alignas(64) float weight[2][kRoom], cos[kRoom], sin[kRoom], rotated[kRoom];
  alignas(64) float straight[2][kRoom], crossed[2][kRoom];  // weight cos, and the partner's weight times the signed sin

  GENENGINE_INLINE explicit Factors(const QkNormRope& op) {
    memset(this, 0, sizeof *this);
    for (int part = 0; part < 2; ++part) {
      float* to = weight[part];
      for (int64_t i = 0; i < op.dim; ++i) to[i] = 1.f;
      if (!op.weight[part]) continue;
      if (op.weight_type == Type::f32) load_row(to, static_cast<const float*>(op.weight[part]), op.dim);
      if (op.weight_type == Type::f16) load_row(to, static_cast<const Half*>(op.weight[part]), op.dim);
      if (op.weight_type == Type::bf16) load_row(to, static_cast<const BFloat*>(op.weight[part]), op.dim);
    }
    for (int64_t i = 0; i < op.dim; ++i) cos[i] = 1.f;
    memset(rotated, 0xff, sizeof(float) * static_cast<size_t>(2 * op.half));
    memcpy(straight, weight, sizeof weight);
  }

  template <Pairs P>
  GENENGINE_INLINE void turn(const QkNormRope& op, int64_t b, int64_t n) {
    const float* __restrict c = op.cos.data + b * op.cos.batch + n * op.cos.token;
    const float* __restrict s = op.sin.data + b * op.sin.batch + n * op.sin.token;
    const float sign = op.back ? -1.f : 1.f;
    for (int64_t i = 0; i < op.half; ++i) {
      const int64_t first = P == Pairs::halves ? i : 2 * i, second = P == Pairs::halves ? i + op.half : 2 * i + 1;
      cos[first] = cos[second] = c[i];
      sin[first] = -sign * s[i];
      sin[second] = sign * s[i];
    }
  }

  // After turn(), which the forward alone needs: the weights of both parts into the factors.
  template <Pairs P>
  GENENGINE_INLINE void weigh(const QkNormRope& op) {
    for (int part = 0; part < 2; ++part) {
      const float* w = weight[part];
      for (int64_t i = 0; i < op.dim; i += kLanes) store(straight[part] + i, load(w + i) * load(cos + i));
      if constexpr (P == Pairs::interleaved)
        for (int64_t i = 0; i < op.dim; i += kLanes) store(crossed[part] + i, swap_pairs(load(w + i)) * load(sin + i));
      if constexpr (P == Pairs::halves)
        for (int64_t i = 0; i < op.half; ++i) {
          crossed[part][i] = w[i + op.half] * sin[i];
          crossed[part][i + op.half] = w[i] * sin[i + op.half];
        }
    }
  }
};

// ---- forward ---------------------------------------------------------------------------------------------------------

template <class T, Pairs P>
GENENGINE_INLINE void forward_head(const T* x, T* out, const Frame& f, const Factors& factors, int part, float* partner, bool norm,
                                   float eps) {
  const float *straight = factors.straight[part], *crossed = factors.crossed[part];
  Lanes squares[2] = {zero_lanes(), zero_lanes()}, last = zero_lanes();
  float rstd = 1.f;
  if (f.last.count) last = f.last.read(x);  // before anything is written: out may be x
  if (norm || P == Pairs::halves) {
    descend(
        f,
        [&](int64_t i, int k) GENENGINE_ALWAYS_INLINE {
          const Lanes v = load(x + i);
          fetch_ahead(x + i, k);
          squares[k] = multiply_add(v, v, squares[k]);
          if constexpr (P == Pairs::halves) place(partner, v, i, f.half);
        },
        [&]() GENENGINE_ALWAYS_INLINE {
          const Lanes v = keep(last, f.last.fresh);
          squares[0] = multiply_add(v, v, squares[0]);
          if constexpr (P == Pairs::halves) place(partner, last, f.last.first, f.half);
        });
    if (norm) rstd = rms_rstd(sum(squares[0] + squares[1]), f.dim, eps);
  }
  const auto result = [&](Lanes v, int64_t i) GENENGINE_ALWAYS_INLINE {
    const Lanes direct = load(straight + i);
    if constexpr (P == Pairs::none) return v * direct * rstd;
    const Lanes other = partner_of<P>(v, partner, factors.rotated, i, f.partly);
    return rotate(v, other, direct, load(crossed + i)) * rstd;
  };
  for (int64_t i = 0; i + kLanes <= f.dim; i += kLanes) store(out + i, result(load(x + i), i));
  if (f.last.count) f.last.write(out, result(last, f.last.first));
}

// Bytes past the caches, with ordinary stores before the first aligned group and after the last.
GENENGINE_INLINE void stream_bytes(char* to, const char* from, int64_t bytes) {
  constexpr int64_t group = sizeof(Lanes);
  int64_t i = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % group);
  i = i < bytes ? i : bytes;
  memcpy(to, from, static_cast<size_t>(i));
  for (; i + group <= bytes; i += group) {
    Lanes v;
    memcpy(&v, from + i, sizeof v);
    stream(reinterpret_cast<float*>(to + i), v);
  }
  memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
}

template <class T>
GENENGINE_INLINE T* at(const PackedView& view, int64_t b, int64_t n, int64_t part, int64_t head) {
  T* data = static_cast<T*>(const_cast<void*>(view.data));
  return data + b * view.batch + n * view.token + part * view.part + head * view.head;
}

template <class T>
GENENGINE_INLINE void copy_v(const QkNormRope& op, const PackedView& from, int64_t b, int64_t n) {
  const bool whole = from.head == op.dim || op.heads == 1;
  const int64_t runs = whole ? 1 : op.heads, bytes = (whole ? op.heads : 1) * op.dim * static_cast<int64_t>(sizeof(T));
  for (int64_t h = 0; h < runs; ++h) {
    char* to = reinterpret_cast<char*>(at<T>(op.out, b, n, 2, h));
    const char* source = reinterpret_cast<const char*>(at<T>(from, b, n, 2, h));
    if (op.stream)
      stream_bytes(to, source, bytes);
    else
      memcpy(to, source, static_cast<size_t>(bytes));
  }
}

template <class T, Pairs P>
void forward(const QkNormRope& op, int64_t begin, int64_t end) {
  alignas(64) float partner[2 * kRoom];
  alignas(64) T staged[kStaged];
  const Frame f(op, P);
  Factors factors(op);
  const int64_t batch_of_heads = op.stream ? kStaged / op.dim : op.heads;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / op.tokens, n = token - b * op.tokens;
    if constexpr (P != Pairs::none) {
      factors.turn<P>(op, b, n);
      factors.weigh<P>(op);
    }
    for (int part = 0; part < 2; ++part)
      for (int64_t first = 0; first < op.heads; first += batch_of_heads) {
        const int64_t heads = op.heads - first < batch_of_heads ? op.heads - first : batch_of_heads;
        T* const out = at<T>(op.out, b, n, part, first);
        T* const to = op.stream ? staged : out;
        const int64_t pitch = op.stream ? op.dim : op.out.head;
        for (int64_t h = 0; h < heads; ++h)
          forward_head<T, P>(at<T>(op.qkv, b, n, part, first + h), to + h * pitch, f, factors, part, partner + kLanes, op.norm, op.eps);
        if (op.stream)
          stream_bytes(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(staged), heads * op.dim * static_cast<int64_t>(sizeof(T)));
      }
    if (op.copy_v) copy_v<T>(op, op.qkv, b, n);
  }
  if (op.stream) fence();
}

// ---- backward --------------------------------------------------------------------------------------------------------

// g: scratch. dweight: added to.
template <class T, Pairs P>
GENENGINE_INLINE void backward_head(const T* x, const T* grad, T* dx, const Frame& f, const Factors& factors, int part,
                                    float* partner, float* g, float* dweight, float eps) {
  const float* weight = factors.weight[part];
  if constexpr (P == Pairs::halves)
    descend(
        f, [&](int64_t i, int) GENENGINE_ALWAYS_INLINE { place(partner, load(grad + i), i, f.half); },
        [&]() GENENGINE_ALWAYS_INLINE { place(partner, f.last.read(grad), f.last.first, f.half); });
  const auto rotated_back = [&](Lanes v, int64_t i) GENENGINE_ALWAYS_INLINE {
    if constexpr (P != Pairs::none) {
      const Lanes other = partner_of<P>(v, partner, factors.rotated, i, f.partly);
      v = rotate(v, other, load(factors.cos + i), load(factors.sin + i));
    }
    store(g + i, v);
    return v * load(weight + i);
  };
  Lanes squares[2] = {zero_lanes(), zero_lanes()}, dots[2] = {zero_lanes(), zero_lanes()};
  const auto count = [&](Lanes v, Lanes t, int k) GENENGINE_ALWAYS_INLINE {
    squares[k] = multiply_add(v, v, squares[k]);
    dots[k] = multiply_add(v, t, dots[k]);
  };
  descend(
      f,
      [&](int64_t i, int k) GENENGINE_ALWAYS_INLINE {
        fetch_ahead(x + i, k);
        fetch_ahead(grad + i, k);
        count(load(x + i), rotated_back(load(grad + i), i), k);
      },
      [&]() GENENGINE_ALWAYS_INLINE {
        const Lanes t = rotated_back(f.last.read(grad), f.last.first);
        count(keep(f.last.read(x), f.last.fresh), keep(t, f.last.fresh), 0);
      });
  const float rstd = rms_rstd(sum(squares[0] + squares[1]), f.dim, eps);
  const Lanes scale = splat(rstd), factor = splat(rms_dx_factor(sum(dots[0] + dots[1]), f.dim, rstd));
  const auto result = [&](Lanes v, int64_t i) GENENGINE_ALWAYS_INLINE {
    return rms_dx(load(g + i) * load(weight + i), v, scale, factor);
  };
  for (int64_t i = 0; i + kLanes <= f.dim; i += kLanes) {
    const Lanes v = load(x + i);
    store(dx + i, result(v, i));
    store(dweight + i, multiply_add(load(g + i), v * scale, load(dweight + i)));
  }
  if (f.last.count) {
    const Lanes v = f.last.read(x);
    const int64_t i = f.last.first;
    f.last.write(dx, result(v, i));
    store(dweight + i, load(dweight + i) + keep(load(g + i) * (v * scale), f.last.fresh));
  }
}

template <class T, Pairs P>
void backward(const QkNormRope& op, int64_t begin, int64_t end) {
  alignas(64) float partner[2 * kRoom], g[kRoom], of_token[2][kRoom], of_chunk[2][kRoom];
  const Frame f(op, P);
  Factors factors(op);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kQkChunk, all = op.batch * op.tokens;
    const int64_t last = first + kQkChunk < all ? first + kQkChunk : all;
    memset(of_chunk, 0, sizeof of_chunk);
    for (int64_t token = first; token < last; ++token) {
      const int64_t b = token / op.tokens, n = token - b * op.tokens;
      if constexpr (P != Pairs::none) factors.turn<P>(op, b, n);
      memset(of_token, 0, sizeof of_token);
      for (int part = 0; part < 2; ++part) {
        for (int64_t h = 0; h < op.heads; ++h)
          backward_head<T, P>(at<T>(op.qkv, b, n, part, h), at<T>(op.grad, b, n, part, h), at<T>(op.out, b, n, part, h), f, factors,
                              part, partner + kLanes, g, of_token[part], op.eps);
        for (int64_t i = 0; i < op.dim; i += kLanes) store(of_chunk[part] + i, load(of_chunk[part] + i) + load(of_token[part] + i));
      }
      copy_v<T>(op, op.grad, b, n);
    }
    if (op.partial)
      for (int part = 0; part < 2; ++part)
        memcpy(op.partial + (chunk * 2 + part) * op.dim, of_chunk[part], sizeof(float) * static_cast<size_t>(op.dim));
  }
}

template <class T>
void reduce(T* out, const float* partial, int64_t chunks, int64_t dim) {
  each(dim, GENENGINE_BODY {
    Lanes total = zero_lanes();
    for (int64_t first = 0; first < chunks; first += kQkChunk) {  // in groups: the error grows with their size alone
      const int64_t last = first + kQkChunk < chunks ? first + kQkChunk : chunks;
      Lanes some = zero_lanes();
      for (int64_t c = first; c < last; ++c) some = some + read(partial + c * 2 * dim + i, span);
      total = total + some;
    }
    write(out + i, total, span);
  });
}

}  // namespace

// f is a template over the storage type and the pairing.
#define GENENGINE_PAIRS(f, T)                                          \
  if (op.half == 0) return f<T, Pairs::none>(op, begin, end);          \
  if (op.interleaved) return f<T, Pairs::interleaved>(op, begin, end); \
  return f<T, Pairs::halves>(op, begin, end);
#define GENENGINE_DISPATCH(f)                       \
  switch (op.type) {                                \
    case Type::f32: GENENGINE_PAIRS(f, float)       \
    case Type::f16: GENENGINE_PAIRS(f, Half)        \
    default: GENENGINE_PAIRS(f, BFloat)             \
  }

void qk_norm_rope_forward(const QkNormRope& op, int64_t begin, int64_t end) { GENENGINE_DISPATCH(forward) }

void qk_norm_rope_backward(const QkNormRope& op, int64_t begin, int64_t end) { GENENGINE_DISPATCH(backward) }

void qk_norm_rope_reduce(void* out, Type type, const float* partial, int64_t chunks, int64_t dim) {
  switch (type) {
    case Type::f32: return reduce(static_cast<float*>(out), partial, chunks, dim);
    case Type::f16: return reduce(static_cast<Half*>(out), partial, chunks, dim);
    case Type::bf16: return reduce(static_cast<BFloat*>(out), partial, chunks, dim);
  }
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
