// logistic_mixture over a tile of sixteen pixels, whatever the layout: its parameters enter L1 as float32, one row of sixteen
// for each, and the gradients leave from there. The loops over `i` are the vector lanes.
#include "cpu/logistic_mixture_loops.h"

#include "cpu/isa/convert.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

constexpr int kWidth = kMixtureTile;
// Lanes are independent; unrolled early, they would not become one vector.
#define GENENGINE_LANES _Pragma("GCC ivdep") _Pragma("GCC unroll 1") for (int i = 0; i < kWidth; ++i)
using Row = float[kWidth];

struct Rows {
  Row* logits;
  Row* means;
  Row* log_scales;
  Row* couplings;
  int64_t components;

  Rows(float* tile, int64_t k, int channels) : components(k) {
    logits = reinterpret_cast<Row*>(tile);
    means = logits + k;
    log_scales = means + channels * k;
    couplings = log_scales + channels * k;
  }
  Row& mean(int c, int64_t k) const { return means[c * components + k]; }
  Row& log_scale(int c, int64_t k) const { return log_scales[c * components + k]; }
  Row& coupling(int c, int j, int64_t k) const { return couplings[(mixture_pairs(c) + j) * components + k]; }
};

// ---- tiles in and out --------------------------------------------------------------------------------------------------

template <class T>
void load_params(float* __restrict tile, const ParamPlanes& from, int64_t b, int64_t first, int64_t count, int64_t params) {
  const T* base = static_cast<const T*>(from.base) + b * from.batch_stride + first * from.pixel_stride;
  if (from.pixel_stride == 1 && count == kWidth) {
    for (int64_t p = 0; p < params; ++p) store(tile + p * kWidth, load(base + p * from.param_stride));
    return;
  }
  if (count < kWidth) memset(tile, 0, sizeof(float) * static_cast<size_t>(params * kWidth));
  for (int64_t i = 0; i < count; ++i)
    for (int64_t p = 0; p < params; ++p)
      tile[p * kWidth + i] = to_float(base[i * from.pixel_stride + p * from.param_stride]);
}

template <class T>
void store_params(const float* __restrict tile, const ParamPlanes& to, int64_t b, int64_t first, int64_t count, int64_t params) {
  T* base = static_cast<T*>(to.base) + b * to.batch_stride + first * to.pixel_stride;
  if (to.pixel_stride == 1 && count == kWidth) {
    for (int64_t p = 0; p < params; ++p) store(base + p * to.param_stride, load(tile + p * kWidth));
    return;
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t p = 0; p < params; ++p)
      from_float(base[i * to.pixel_stride + p * to.param_stride], tile[p * kWidth + i]);
}

// f<T>(...) of the storage type
#define GENENGINE_TYPED(f, ...)                       \
  switch (call.type) {                                \
    case Type::f32: f<float>(__VA_ARGS__); break;     \
    case Type::f16: f<Half>(__VA_ARGS__); break;      \
    case Type::bf16: f<BFloat>(__VA_ARGS__); break;   \
  }

int64_t params_of(const MixtureCall& call) { return call.components * params_per_component(call.channels); }

// Where channel 0 of a pixel stands in x; the others follow `image` elements apart.
struct Place {
  int64_t sample, pixel;
  Place(const MixtureCall& call, int64_t b, int64_t first) {
    const int64_t index = b * call.pixels + first;
    sample = index / call.image;
    pixel = index % call.image;
  }
  GENENGINE_INLINE void next(const MixtureCall& call) {  // without a division
    if (++pixel == call.image) ++sample, pixel = 0;
  }
};

struct Data {
  alignas(64) Row x[kMaxChannels] = {}, bin[kMaxChannels] = {};

  Data(const MixtureCall& call, int64_t b, int64_t first, int64_t count) {
    Place place(call, b, first);
    for (int64_t i = 0; i < count; ++i, place.next(call)) {
      for (int c = 0; c < call.channels; ++c) x[c][i] = call.x[(place.sample * call.channels + c) * call.image + place.pixel];
    }
    for (int c = 0; c < call.channels; ++c) {
      GENENGINE_LANES {
        bin[c][i] = nearest_bin(x[c][i], call.bins.last);
        x[c][i] = bin_value(bin[c][i], call.bins.last);
      }
    }
  }
};

// ---- log-probability ---------------------------------------------------------------------------------------------------

// Rows of exponents become e^(row - the largest): no sum can overflow, and -infinity becomes 0.
struct Softmax {
  alignas(64) Row largest, sum;
  GENENGINE_INLINE Softmax(Row* rows, int64_t components) {
    memcpy(largest, rows[0], sizeof largest);
    for (int64_t k = 1; k < components; ++k) {
      GENENGINE_LANES largest[i] = rows[k][i] > largest[i] ? rows[k][i] : largest[i];
    }
    GENENGINE_LANES sum[i] = 0.f;
    for (int64_t k = 0; k < components; ++k) {
      Row& row = rows[k];
      GENENGINE_LANES {
        const float below = largest[i] - row[i];
        row[i] = select(below > 80.f, 0.f, exponential_within(-below));
        sum[i] += row[i];
      }
    }
  }
};

// Couplings become their tanh.
void bound_couplings(const Rows& rows, int channels) {
  float* coupling = rows.couplings[0];
  const int64_t count = mixture_pairs(channels) * rows.components * kWidth;
  _Pragma("GCC ivdep") for (int64_t i = 0; i < count; ++i) coupling[i] = hyperbolic_tangent(coupling[i]);
}

// log p(k, pixel) less the logarithm of the logits' sum. Gradient: the rows of component k become derivatives of that.
template <bool Gradient>
GENENGINE_INLINE void component(const Data& data, const Rows& rows, int64_t k, int channels, Bins bins, Row& joint) {
  alignas(64) Row linear, numerator, denominator, mean;
  GENENGINE_LANES linear[i] = rows.logits[k][i], numerator[i] = 1.f, denominator[i] = 1.f;
  for (int c = 0; c < channels; ++c) {
    Row &means = rows.mean(c, k), &log_scales = rows.log_scale(c, k);
    GENENGINE_LANES mean[i] = means[i];
    for (int j = 0; j < c; ++j) {
      const Row& coupling = rows.coupling(c, j, k);
      GENENGINE_LANES mean[i] = multiply_add(coupling[i], data.x[j][i], mean[i]);
    }
    GENENGINE_LANES {
      SliceGradient gradient;
      const Slice slice =
          logistic_slice(data.x[c][i], data.bin[c][i], mean[i], log_scales[i], bins, Gradient ? &gradient : nullptr);
      linear[i] += slice.linear;
      numerator[i] *= slice.numerator;
      denominator[i] *= slice.denominator;
      if (Gradient) {
        means[i] = gradient.mean;
        log_scales[i] = gradient.log_scale;
      }
    }
    if (!Gradient) continue;
    for (int j = 0; j < c; ++j) {
      Row &coupling = rows.coupling(c, j, k), &gradient = rows.mean(c, k);
      GENENGINE_LANES coupling[i] = gradient[i] * data.x[j][i] * (1.f - coupling[i] * coupling[i]);
    }
  }
  GENENGINE_LANES joint[i] = joint_log_prob(linear[i], numerator[i], denominator[i]);
}

}  // namespace

void mixture_log_prob(const MixtureCall& call, int64_t b, int64_t first, int64_t count, float* scratch) {
  GENENGINE_TYPED(load_params, scratch, call.params, b, first, count, params_of(call))
  const Data data(call, b, first, count);
  const Rows rows(scratch, call.components, call.channels);
  Row* joints = reinterpret_cast<Row*>(scratch) + params_of(call);
  bound_couplings(rows, call.channels);
  for (int64_t k = 0; k < call.components; ++k) component<false>(data, rows, k, call.channels, call.bins, joints[k]);
  const Softmax joint(joints, call.components), softmax(rows.logits, call.components);
  alignas(64) Row result;
  GENENGINE_LANES result[i] = (joint.largest[i] - softmax.largest[i]) + logarithm(joint.sum[i] / softmax.sum[i]);
  memcpy(call.log_prob + b * call.pixels + first, result, sizeof(float) * static_cast<size_t>(count));
}

// Two passes over the tile: derivatives within each component, then their weights.
void mixture_log_prob_backward(const MixtureCall& call, int64_t b, int64_t first, int64_t count, float* scratch) {
  GENENGINE_TYPED(load_params, scratch, call.params, b, first, count, params_of(call))
  const Data data(call, b, first, count);
  const Rows rows(scratch, call.components, call.channels);
  Row* joints = reinterpret_cast<Row*>(scratch) + params_of(call);
  bound_couplings(rows, call.channels);
  for (int64_t k = 0; k < call.components; ++k) component<true>(data, rows, k, call.channels, call.bins, joints[k]);
  const Softmax joint(joints, call.components), softmax(rows.logits, call.components);
  alignas(64) Row grad = {}, joint_weight, softmax_weight;
  memcpy(grad, call.grad + b * call.pixels + first, sizeof(float) * static_cast<size_t>(count));
  GENENGINE_LANES joint_weight[i] = grad[i] / joint.sum[i], softmax_weight[i] = grad[i] / softmax.sum[i];
  const int64_t groups = params_per_component(call.channels);
  for (int64_t k = 0; k < call.components; ++k) {
    Row &weight = joints[k], &logit = rows.logits[k];
    GENENGINE_LANES {
      weight[i] *= joint_weight[i];
      logit[i] = weight[i] - logit[i] * softmax_weight[i];
    }
    for (int64_t group = 1; group < groups; ++group) {
      Row& row = rows.logits[group * call.components + k];
      GENENGINE_LANES row[i] *= weight[i];
    }
  }
  GENENGINE_TYPED(store_params, scratch, call.dparams, b, first, count, params_of(call))
}

// ---- sampling ----------------------------------------------------------------------------------------------------------

namespace {

// u[j]: element pixel (1 + C) + j of every pixel's sample.
void draw(const MixtureCall& call, int64_t b, int64_t first, int64_t count, Row (&u)[1 + kMaxChannels]) {
  const int64_t each = 1 + call.channels;
  int64_t element[kWidth] = {};
  uint32_t quad[kWidth] = {}, sample[kWidth] = {};
  uint64_t seed[kWidth] = {};
  float four[2][4][kWidth];
  Place place(call, b, first);
  for (int64_t i = 0; i < count; ++i, place.next(call)) {
    element[i] = place.pixel * each;
    quad[i] = static_cast<uint32_t>(element[i] / 4);
    sample[i] = static_cast<uint32_t>(call.ids ? call.ids[place.sample] : place.sample);
    seed[i] = static_cast<uint64_t>(call.seed[place.sample * call.seed_stride]);
  }
  const uint32_t quads = 4 % each == 0 ? 1 : 2;  // that the elements of a pixel may lie in
  for (uint32_t q = 0; q < quads; ++q) {
    GENENGINE_LANES {
      const Words words = philox(quad[i] + q, sample[i], call.step, kMixtureStream, seed[i]);
      for (int w = 0; w < 4; ++w) four[q][w][i] = unit(words.w[w]);
    }
  }
  for (int64_t j = 0; j < each; ++j) {
    GENENGINE_LANES {
      const int64_t word = element[i] % 4 + j;
      u[j][i] = four[word / 4][word % 4][i];
    }
  }
}

// The component of each pixel; `total`: the sum of the weights, which NaN makes NaN.
void choose(const MixtureCall& call, const Rows& rows, const Row& u, int32_t (&chosen)[kWidth], Row& total) {
  alignas(64) Row largest, target;
  memcpy(largest, rows.logits[0], sizeof largest);
  for (int64_t k = 1; k < rows.components; ++k) {
    GENENGINE_LANES largest[i] = rows.logits[k][i] > largest[i] ? rows.logits[k][i] : largest[i];
  }
  GENENGINE_LANES total[i] = 0.f, chosen[i] = 0;
  for (int64_t k = 0; k < rows.components; ++k) {  // the partial sums replace the logits
    GENENGINE_LANES {
      const float weight = component_weight(rows.logits[k][i], largest[i], call.inverse_temperature);
      total[i] = k == 0 ? weight : total[i] + weight;
      rows.logits[k][i] = total[i];
    }
  }
  GENENGINE_LANES target[i] = u[i] * total[i];
  for (int64_t k = 0; k + 1 < rows.components; ++k) {
    GENENGINE_LANES chosen[i] += rows.logits[k][i] <= target[i] ? 1 : 0;
  }
}

// The chosen component's parameter of a group of K: 0 the logits, 1.. the means, then the log-scales and the couplings.
template <class T>
void gather(Row& to, const MixtureCall& call, int64_t b, int64_t first, int64_t count, int64_t group,
            const int32_t (&chosen)[kWidth]) {
  const ParamPlanes& from = call.params;
  const T* base = static_cast<const T*>(from.base) + b * from.batch_stride + first * from.pixel_stride;
  for (int64_t i = 0; i < count; ++i)
    to[i] = to_float(base[i * from.pixel_stride + (group * call.components + chosen[i]) * from.param_stride]);
}

}  // namespace

void mixture_sample(const MixtureCall& call, int64_t b, int64_t first, int64_t count, float* scratch) {
  GENENGINE_TYPED(load_params, scratch, call.params, b, first, count, call.components)
  const Rows rows(scratch, call.components, call.channels);
  alignas(64) Row u[1 + kMaxChannels], total, x[kMaxChannels], mean = {}, log_scale = {}, coupling = {};
  int32_t chosen[kWidth];
  draw(call, b, first, count, u);
  choose(call, rows, u[0], chosen, total);
  for (int c = 0; c < call.channels; ++c) {
    GENENGINE_TYPED(gather, mean, call, b, first, count, 1 + c, chosen)
    GENENGINE_TYPED(gather, log_scale, call, b, first, count, 1 + call.channels + c, chosen)
    GENENGINE_LANES mean[i] = mean[i] + total[i] * 0.f;  // NaN of NaN logits
    for (int j = 0; j < c; ++j) {
      GENENGINE_TYPED(gather, coupling, call, b, first, count, 1 + 2 * call.channels + mixture_pairs(c) + j, chosen)
      GENENGINE_LANES mean[i] = mean[i] + tanh_ieee(coupling[i]) * x[j][i];
    }
    GENENGINE_LANES x[c][i] = sample_channel(mean[i], log_scale[i], u[1 + c][i], call.temperature, call.bins.last);
  }
  Place place(call, b, first);
  for (int64_t i = 0; i < count; ++i, place.next(call)) {
    for (int c = 0; c < call.channels; ++c)
      call.x[(place.sample * call.channels + c) * call.image + place.pixel] = x[c][i];
  }
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
