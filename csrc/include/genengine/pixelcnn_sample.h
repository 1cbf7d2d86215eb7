// Sampling of a gated PixelCNN with every activation computed once; see genengine/ops/pixelcnn_sample.py for the formulas.
//
// One algorithm for CPU and GPU. A group of images is worked on by a Team: one CPU thread with vectors, or a block of GPU
// threads. The algorithm knows which activations there are, where they are kept and in which order they become known; the
// Team knows how to run a loop over elements (`each`), a small product (`product`) and the draws of a step (`draw`).
//
// Per pixel and image, of D features, L layers and kernels of three: 21 D^2 L multiply-adds, two thirds of them of the
// vertical stack; the weights once per step and group, from L2. Sums are float32, in the order of k, and no result depends
// on the images beside it, on the group or on the order of the pixels.
#pragma once
#include "genengine/functions.h"
#include "genengine/logistic_mixture.h"
#include "genengine/pixelcnn_shape.h"

namespace genengine {

#if defined(__CUDACC__)
#define GENENGINE_TEAM __device__ __forceinline__
#else
#define GENENGINE_TEAM inline
#endif

struct PixelCNNCall {
  PixelCNNShape shape;
  PixelCNNState layout;
  const void* matrices;
  const float* vectors;
  float *x, *log_prob;  // (B, C, S, S) and (B, S, S)
  const bool* known;    // (B, C, S, S) or null
  const int64_t *labels, *seed, *ids;  // labels may be null
  int64_t seed_stride, batch, state_stride;
  char* state;  // of no value before the first row
  int images;   // of a group
  float temperature, inverse_temperature;
  bool wavefront;
  int first_row, last_row;
};

// ---- scalar formulas -----------------------------------------------------------------------------------------------------

GENENGINE_HD float uniform_at(uint64_t seed, uint32_t sample, uint32_t element) {
  const Words four = philox(element / 4, sample, 0, kMixtureStream, seed);  // chosen from without an index: registers have none
  const uint32_t even = element & 2 ? four.w[2] : four.w[0], odd = element & 2 ? four.w[3] : four.w[1];
  return unit(element & 1 ? odd : even);
}

// log p of the channels x of a pixel, whose parameters lie side by side, when it is drawn at this temperature: component
// weights exp(logit / T) and log-scales s + log T. That changes e^-s alone, so x, means and half a bin are divided instead.
struct MixtureSums {
  float joint_largest = kNothing, joint = 0.f, logit_largest = kNothing, logit = 0.f;

  GENENGINE_HD_MEMBER void add(const MixtureSums& other) {
    join(joint_largest, joint, other.joint_largest, other.joint);
    join(logit_largest, logit, other.logit_largest, other.logit);
  }
  GENENGINE_HD_MEMBER float log_prob() const { return (joint_largest - logit_largest) + logarithm(joint / logit); }

 private:
  GENENGINE_HD_MEMBER static void join(float& largest, float& sum, float other_largest, float other) {
    const float gap = other_largest - largest, less = exponential_within(-absolute(gap));
    sum = gap > 0.f ? multiply_add(sum, less, other) : multiply_add(other, less, sum);
    largest = gap > 0.f ? other_largest : largest;
  }
};

// Of components first, first + step, ...
GENENGINE_HD MixtureSums mixture_sums(const float* params, const float* x, int components, int channels, const Bins& bins,
                                      float inverse_temperature, int first, int step) {
  const Bins scaled = {bins.last, bins.h * inverse_temperature, bins.log_width + logarithm(inverse_temperature)};
  MixtureSums sums;
  for (int k = first; k < components; k += step) {
    const float logit = params[k] * inverse_temperature;
    float linear = logit, numerator = 1.f, denominator = 1.f;
    for (int c = 0; c < channels; ++c) {
      float mean = params[(1 + c) * components + k];
      for (int j = 0; j < c; ++j)
        mean = multiply_add(hyperbolic_tangent(params[(1 + 2 * channels + mixture_pairs(c) + j) * components + k]), x[j], mean);
      const float centred = (x[c] - mean) * inverse_temperature;
      const Slice slice = logistic_slice(centred, nearest_bin(x[c], bins.last), 0.f, params[(1 + channels + c) * components + k],
                                         scaled, nullptr);
      linear += slice.linear;
      numerator *= slice.numerator;
      denominator *= slice.denominator;
    }
    add_exponential(sums.joint_largest, sums.joint, joint_log_prob(linear, numerator, denominator));
    add_exponential(sums.logit_largest, sums.logit, logit);
  }
  return sums;
}

// The channels of a pixel, with the bits of logistic_mixture_sample. u: 1 + C uniforms.
GENENGINE_HD void mixture_draw(const float* params, const float* u, int components, int channels, float last, float temperature,
                               float inverse_temperature, float* x) {
  float largest = params[0], total = 0.f;
  for (int k = 1; k < components; ++k) largest = params[k] > largest ? params[k] : largest;
  for (int k = 0; k < components; ++k) {
    const float weight = component_weight(params[k], largest, inverse_temperature);
    total = k ? total + weight : weight;
  }
  const float target = u[0] * total;
  float partial = 0.f;
  int chosen = 0;
  for (int k = 0; k + 1 < components; ++k) {
    const float weight = component_weight(params[k], largest, inverse_temperature);
    partial = k ? partial + weight : weight;
    chosen += partial <= target ? 1 : 0;
  }
  for (int c = 0; c < channels; ++c) {
    float mean = params[(1 + c) * components + chosen] + total * 0.f;  // NaN of NaN logits
    for (int j = 0; j < c; ++j)
      mean = mean + tanh_ieee(params[(1 + 2 * channels + mixture_pairs(c) + j) * components + chosen]) * x[j];
    x[c] = sample_channel(mean, params[(1 + channels + c) * components + chosen], u[1 + c], temperature, last);
  }
}

// ---- the algorithm -------------------------------------------------------------------------------------------------------

// Team: types Weight (of matrices and kept activations) and Input (what products read: Weight, or float holding its values);
// kPad: elements between two rows of what products read;
//   each(rows, width, row)   row(r)(j) for all r < rows, j < width; all are done when it returns, as with all that follow
//   begin(rows, width, row)  the same, but done only when the next each or product returns
//   each, begin(outer, inner, width, row)   row(i, k)(j) for all i < outer, k < inner
//   each, begin(..., kVector)   the same for values that go together, width being of whole panels: j steps by kVector;
//                            load(float*) -> a vector, which can be added; store(float*, vector), keep(Weight*, vector),
//                            feed(Input*, vector); gate(a, b), positive(a)
//   product(w, matrix, x, x_stride, rows, init, init_stride, y, y_stride)    y = init + x W
//   draw(n, logits, stride, levels, inverse_temperature, u, write)   write(r, level, log p) for all r < n: the level of
//                            `inverse_cdf` for the uniform u(r), where that is positive
//   rows(n, f)               f(r) for all r < n
//   add_up(n, part, write)   write(r, the sum of part(r, first, step) over 0 <= first < step) for all r < n
//   narrow(float) -> Weight, input(Weight) -> Input
template <class Team>
struct PixelSampler {
  using Weight = typename Team::Weight;
  using Input = typename Team::Input;

  const Team& team;
  const PixelCNNCall& call;
  const PixelCNNShape& s;
  const PixelCNNState& state;
  const int images;
  const int64_t first;  // image of the batch
  char *const base, *const scratch;

  // scratch: of state.scratch_bytes, without a value.
  GENENGINE_TEAM PixelSampler(const Team& team_, const PixelCNNCall& call_, int64_t group, char* scratch_)
      : team(team_), call(call_), s(call_.shape), state(call_.layout), images(count(call_, group)), first(group * call_.images),
        base(call_.state + group * call_.state_stride), scratch(scratch_) {}

  // Rows first_row .. last_row - 1 of all images of the group. Layer -1: the pixels themselves.
  GENENGINE_TEAM void run() const {
    if (call.first_row == 0) clear();
    const Wavefront front(s);
    const int lead = call.first_row == 0 && s.early ? 1 : 0;
    const int begin = (call.wavefront ? front.steps(call.first_row) : call.first_row * s.size) - lead;
    const int end = call.wavefront ? front.steps(call.last_row) : call.last_row * s.size;
    for (int t = begin; t < end; ++t) {
      for (int layer = -1; layer < s.depth; ++layer)
        in_chunks(t < 0 ? above_the_image(layer) : call.wavefront ? ahead(front, t, layer) : raster(t, layer), layer);
    }
  }

 private:
  GENENGINE_TEAM static int count(const PixelCNNCall& call, int64_t group) {
    const int64_t left = call.batch - group * call.images;
    return static_cast<int>(left < call.images ? left : call.images);
  }

  // What lies beside the images.
  GENENGINE_TEAM void clear() const {
    float* rings = at<float>(0);
    team.each(static_cast<int>(state.vertical / 256), 64, [=](int r) { return [=](int j) { rings[static_cast<int64_t>(r) * 64 + j] = 0.f; }; });
  }

  // An early vertical stack has a row above the image.
  GENENGINE_TEAM PixelLine above_the_image(int layer) const { return {-1, 0, 0, 1, layer < 0 ? 0 : s.size}; }
  // What step t does in a layer: in raster order one pixel, and after a row's last one what the row below reads of it.
  GENENGINE_TEAM PixelLine raster(int t, int layer) const {
    const int y = t / s.size, x = t % s.size;
    if (layer < 0) return {y, x, 0, 0, 1};
    return {y, 0, 0, 1, x + 1 == s.size && y + 1 < s.size ? s.size : 0};
  }
  GENENGINE_TEAM PixelLine ahead(const Wavefront& front, int t, int layer) const {
    return layer < 0 ? front.at(t, s.size) : front.at(t - Wavefront::ready(s, layer), s.size - 1);
  }

  GENENGINE_TEAM void in_chunks(PixelLine line, int layer) const {
    const int most = state.chunk / state.images;
    for (int done = 0; done < line.count; done += most) {
      const int left = line.count - done;
      const PixelLine part = {line.y + done * line.dy, line.x + done * line.dx, line.dy, line.dx, left < most ? left : most};
      if (layer < 0)
        pixels(part);
      else
        vertical(part, layer);
    }
  }

  // ---- addresses ----

  template <class E>
  GENENGINE_TEAM E* at(int64_t offset) const {
    return reinterpret_cast<E*>(base + offset);
  }
  template <class E>
  GENENGINE_TEAM E* work(int64_t offset) const {
    return reinterpret_cast<E*>(scratch + offset);
  }
  // Elements from row to row of what products read: `inputs` of k, and what holds the features.
  GENENGINE_TEAM static int padded(int k) { return k + Team::kPad; }
  GENENGINE_TEAM const Weight* matrix(const PanelMatrix& m) const { return static_cast<const Weight*>(call.matrices) + m.offset; }
  GENENGINE_TEAM const float* vector(int64_t offset) const { return call.vectors + offset; }

  // The input of a layer at (y, x) of an image; x from -reach on, y from -reach - 1 on.
  GENENGINE_TEAM Weight* kept(int kind, int layer, int y, int m, int x) const {
    const int rows = state.ring_rows(s, layer, kind), reach = s.reach_of(layer);
    const int64_t row = static_cast<int64_t>(rows == 1 ? 0 : (y + rows) % rows) * state.images + m;
    return at<Weight>(kind ? state.left : state.above) + state.ring(s, layer, kind) +
           (row * (s.size + 2 * reach) + x + reach) * s.inputs(layer);
  }
  // What the rows above give to the sums of a layer at (y, x): (gates) float32.
  GENENGINE_TEAM float* from_above(int layer, int y, int m, int x) const {
    const int rows = state.vertical_rows();
    const int64_t row = (static_cast<int64_t>(layer) * rows + (rows == 1 ? 0 : y % rows)) * state.images + m;
    return at<float>(state.vertical) + (row * s.size + x) * s.gates();
  }
  template <class P>
  GENENGINE_TEAM const float* sums_from_above(int layer, const P& p) const {
    if (p.y || s.early) return from_above(layer, p.y, p.m, p.x);
    return vector(s.gated ? s.zeros() : s.above_bias(layer));
  }
  GENENGINE_TEAM const float* class_bias(int m, int layer, int stack) const {
    return vector(s.class_bias(call.labels ? call.labels[first + m] : s.classes, layer, stack));
  }

  // Row r of a step is image `m` at (y, x).
  struct Place {
    int y, x, m;
  };
  GENENGINE_TEAM static Place place(const PixelLine& line, int i, int m) {
    return {line.y + i * line.dy, line.x + i * line.dx, m};
  }
  GENENGINE_TEAM Place place(const PixelLine& line, int r) const {
    const int i = images == 1 ? r : r / images;
    return place(line, i, r - i * images);
  }

  GENENGINE_TEAM void product(const PanelMatrix& m, const Input* x, int x_stride, int rows, const float* init, int init_stride,
                              float* y, int y_stride) const {
    team.product(matrix(m), m, x, x_stride, rows, init, init_stride, y, y_stride);
  }

  // ---- the vertical stack ----

  // What a layer makes of the rows up to line.y: the vertical input of the next layer there, and the sums' part for the row
  // below. Of a plain network: the latter alone.
  GENENGINE_TEAM void vertical(const PixelLine& line, int layer) const {
    const PanelMatrix above = s.above(layer);
    const int rows = line.count * images, gates = s.gates(), taps_rows = s.rows_above(layer), stride = padded(above.k);
    const int run = s.taps(layer) * s.inputs(layer), reach = s.reach_of(layer);
    Input* inputs = work<Input>(state.inputs);
    float* sums = work<float>(state.sums);
    if (above.k != taps_rows * run)
      team.begin(rows, 1, [=](int r) { return [=](int) { inputs[r * stride + above.k - 1] = Team::input(Team::narrow(0.f)); }; });
    team.each(line.count * taps_rows, images, run, [=, this](int q, int m) {
      const int i = q / taps_rows, row = q - i * taps_rows;
      const Place p = place(line, i, m);
      const Weight* from = kept(0, layer, p.y - (taps_rows - 1) + row, m, p.x - reach);
      Input* to = inputs + (i * images + m) * stride + row * run;
      return [=](int j) { to[j] = Team::input(from[j]); };
    });
    product(above, inputs, stride, rows, vector(s.above_bias(layer)), 0, sums, gates);
    if (s.gated) {
      if (layer + 1 < s.depth) next_vertical(line, layer, sums);
      round_rows(rows, gates, sums, gates, inputs, padded(gates));
      product(s.down(layer), inputs, padded(gates), rows, nullptr, 0, sums, gates);
    }
    team.each(line.count, images, gates, [=, this](int i, int m) {
      const Place p = place(line, i, m);
      const float* from = sums + (i * images + m) * gates;
      float* to = from_above(layer, p.y + 1, p.m, p.x);
      return [=, this](int j) { team.store(to + j, team.load(from + j)); };
    }, Team::kVector);
  }

  // v' = gate(u + c), and the position after the first layer.
  GENENGINE_TEAM void next_vertical(const PixelLine& line, int layer, const float* sums) const {
    const int groups = s.groups(), part = s.part();
    team.begin(line.count * groups, images, part, [=, this](int q, int m) {
      const int i = groups == 1 ? q : q / groups, g = q - i * groups;
      const Place p = place(line, i, m);
      const float* u = sums + (i * images + m) * s.gates() + g * 2 * part;
      const float* c = class_bias(p.m, layer, 0) + g * 2 * part;
      const float* position = vector(layer || p.y < 0 ? s.zeros() : s.position(0, p.y, p.x) + g * part);
      Weight* to = kept(0, layer + 1, p.y, p.m, p.x) + g * part;
      return [=, this](int j) {
        const auto a = team.load(u + j) + team.load(c + j), b = team.load(u + part + j) + team.load(c + part + j);
        team.keep(to + j, team.gate(a, b) + team.load(position + j));
      };
    }, Team::kVector);
  }

  // ---- the pixels of a step ----

  GENENGINE_TEAM void pixels(const PixelLine& line) const {
    if (!line.count) return;
    for (int g = 0; g < s.groups(); ++g) {
      for (int layer = 0; layer < s.depth; ++layer) horizontal(line, layer, g);
      head(line, g);
      if (s.components)
        draw_mixture(line);
      else
        draw_level(line, g);
      enter(line, g);
    }
  }

  GENENGINE_TEAM Input* gated(int layer) const {
    return work<Input>(state.gated) + (s.groups() > 1 ? static_cast<int64_t>(layer) * state.chunk * padded(s.width()) : 0);
  }
  GENENGINE_TEAM Input* shifted(int layer) const {
    return work<Input>(state.shifted) + (s.groups() > 1 ? static_cast<int64_t>(layer) * state.chunk * padded(s.width()) : 0);
  }

  // h' = h + R gate(N + L * h + c') of group g.
  GENENGINE_TEAM void horizontal(const PixelLine& line, int layer, int g) const {
    const int rows = line.count * images, part = s.part(), width = padded(s.width());
    const PanelMatrix left = s.left(layer, g);
    Input* inputs = work<Input>(state.inputs);
    float *sums = work<float>(state.sums), *residual = work<float>(state.residual);
    gather_left(line, layer, g, left.k);
    team.each(line.count, images, 2 * part, [=, this](int i, int m) {
      const float* from = sums_from_above(layer, place(line, i, m)) + g * 2 * part;
      const float* c = class_bias(m, layer, 1) + g * 2 * part;
      float* to = sums + (i * images + m) * 2 * part;
      return [=, this](int j) { team.store(to + j, team.load(from + j) + team.load(c + j)); };
    }, Team::kVector);
    product(left, inputs, padded(left.k), rows, sums, 2 * part, sums, 2 * part);
    Input* gates = gated(layer);
    const float* bias = vector(s.out_bias(layer)) + g * part;
    team.each(line.count, images, part, [=, this](int i, int m) {
      const Place p = place(line, i, m);
      const int r = i * images + m;
      const float* u = sums + r * 2 * part;
      float* h = residual + r * part;
      const float* before = layer ? h : vector(s.position(1, p.y, p.x)) + g * part;
      Input* to = gates + r * width + g * part;
      return [=, this](int j) {
        team.feed(to + j, team.gate(team.load(u + j), team.load(u + part + j)));
        team.store(h + j, team.load(before + j) + team.load(bias + j));
      };
    }, Team::kVector);
    if (s.folded) round_rows(rows, part, residual, part, shifted(layer) + g * part, width);
    product(s.out(layer, g), gates, width, rows, residual, part, residual, part);
    if (layer + 1 == s.depth) return;
    keep(line, layer + 1, g, 1);
    if (!s.gated) keep(line, layer + 1, g, 0);
  }

  // The residual sum becomes the input of the next layer.
  GENENGINE_TEAM void keep(const PixelLine& line, int layer, int g, int kind) const {
    const int part = s.part();
    const float* residual = work<float>(state.residual);
    team.each(line.count, images, part, [=, this](int i, int m) {
      const Place p = place(line, i, m);
      const float* h = residual + (i * images + m) * part;
      Weight* to = kept(kind, layer, p.y, p.m, p.x) + g * part;
      return [=, this](int j) { team.keep(to + j, team.load(h + j)); };
    }, Team::kVector);
  }

  GENENGINE_TEAM void round_rows(int rows, int width, const float* from, int from_stride, Input* to, int to_stride) const {
    team.each(rows, width, [=, this](int r) {
      const float* a = from + r * from_stride;
      Input* b = to + r * to_stride;
      return [=, this](int j) { team.feed(b + j, team.load(a + j)); };
    }, Team::kVector);
  }

  // The pixels to the left and what group g may see of the pixel itself lie side by side. Folded, the latter is in two
  // parts, the input of the residual sum and the gates that its product adds: W (q + R g) = W q + (W R) g.
  GENENGINE_TEAM void gather_left(const PixelLine& line, int layer, int g, int k) const {
    Input* inputs = work<Input>(state.inputs);
    const int rows = line.count * images, reach = s.reach_of(layer), centre = s.centre(layer, g), width = padded(s.width());
    const bool in_parts = s.folded && layer;
    const int stride = padded(k), run = reach * s.inputs(layer) + (in_parts ? 0 : centre), used = run + (in_parts ? 2 * centre : 0);
    if (used != k)
      team.begin(rows, 1, [=](int r) { return [=](int) { inputs[r * stride + k - 1] = Team::input(Team::narrow(0.f)); }; });
    team.begin(line.count, images, run, [=, this](int i, int m) {
      const Place p = place(line, i, m);
      const Weight* from = kept(1, layer, p.y, m, p.x - reach);
      Input* to = inputs + (i * images + m) * stride;
      return [=](int j) { to[j] = Team::input(from[j]); };
    });
    if (!in_parts) return;
    const Input *q = shifted(layer - 1), *gates = gated(layer - 1);
    team.begin(rows, centre, [=](int r) {
      Input* to = inputs + r * stride + run;
      return [=](int j) {
        to[j] = q[r * width + j];
        to[centre + j] = gates[r * width + j];
      };
    });
  }

  // logits = O relu(P relu(h) + b) + b'; not rectified: P h
  GENENGINE_TEAM void head(const PixelLine& line, int g) const {
    const int rows = line.count * images, part = s.part(), width = padded(s.width());
    const int head = s.head_part(), across = padded(s.groups() * head);
    Input *hidden = work<Input>(state.hidden), *last = work<Input>(state.head);
    const float* h = work<float>(state.residual);
    float* outputs = work<float>(state.outputs);
    if (s.rectified)
      rectify(rows, part, h, hidden + g * part, width);
    else
      round_rows(rows, part, h, part, hidden + g * part, width);
    product(s.hidden(g), hidden, width, rows, vector(s.hidden_bias(g)), 0, outputs, head);
    rectify(rows, head, outputs, last + g * head, across);
    product(s.logits(g), last, across, rows, vector(s.logits_bias(g)), 0, outputs, s.outputs());
  }

  GENENGINE_TEAM void rectify(int rows, int width, const float* from, Input* to, int stride) const {
    team.each(rows, width, [=, this](int r) {
      const float* a = from + r * width;
      Input* b = to + r * stride;
      return [=, this](int j) { team.feed(b + j, team.positive(team.load(a + j))); };
    }, Team::kVector);
  }

  // ---- draws ----

  GENENGINE_TEAM int64_t pixel(const Place& p, int c) const {
    return (((first + p.m) * s.channels + c) * s.size + p.y) * s.size + p.x;
  }
  GENENGINE_TEAM float& log_prob(const Place& p) const { return call.log_prob[((first + p.m) * s.size + p.y) * s.size + p.x]; }
  GENENGINE_TEAM float uniform(const Place& p, uint32_t element) const {
    const int64_t b = first + p.m;
    return uniform_at(static_cast<uint64_t>(call.seed[b * call.seed_stride]), static_cast<uint32_t>(call.ids[b]), element);
  }

  GENENGINE_TEAM void draw_level(const PixelLine& line, int g) const {
    const float* logits = work<float>(state.outputs);
    const float last = static_cast<float>(s.levels - 1);
    const auto u = [=, this](int r) {
      const Place p = place(line, r);
      if (call.known && call.known[pixel(p, g)]) return 0.f;
      return uniform(p, static_cast<uint32_t>((p.y * s.size + p.x) * s.channels + g));
    };
    const auto write = [=, this](int r, int level, float log_p) {
      const Place p = place(line, r);
      call.x[pixel(p, g)] = bin_value(static_cast<float>(level), last);
      log_prob(p) += log_p;
    };
    team.draw(line.count * images, logits, s.outputs(), s.levels, call.inverse_temperature, u, write);
  }

  GENENGINE_TEAM void draw_mixture(const PixelLine& line) const {
    const float* outputs = work<float>(state.outputs);
    float* residual = work<float>(state.residual);  // no longer needed: room for the uniforms and the pixel
    const float last = static_cast<float>(s.levels - 1);
    const Bins bins = {last, 1.f / last, logarithm(2.f / last)};
    const auto given = [=, this](const Place& p) { return call.known && call.known[pixel(p, 0)]; };
    const auto room = [=, this](int r) { return residual + r * s.part(); };
    static_assert(1 + 2 * kMaxChannels <= kPanelColumns);
    team.rows(line.count * images, [=, this](int r) {
      const Place p = place(line, r);
      if (given(p)) return;
      float *u = room(r), *x = u + 1 + kMaxChannels;
      const uint32_t element = static_cast<uint32_t>((p.y * s.size + p.x) * (1 + s.channels));
      for (int j = 0; j <= s.channels; ++j) u[j] = uniform(p, element + static_cast<uint32_t>(j));
      const float* params = outputs + r * s.outputs();
      mixture_draw(params, u, s.components, s.channels, last, call.temperature, call.inverse_temperature, x);
      for (int c = 0; c < s.channels; ++c) call.x[pixel(p, c)] = x[c];
    });
    const auto sums = [=, this](int r, int first, int step) {
      if (given(place(line, r))) return MixtureSums();
      const float *params = outputs + r * s.outputs(), *x = room(r) + 1 + kMaxChannels;
      return mixture_sums(params, x, s.components, s.channels, bins, call.inverse_temperature, first, step);
    };
    team.add_up(line.count * images, sums, [=, this](int r, const MixtureSums& found) {
      const Place p = place(line, r);
      if (!given(p)) log_prob(p) = found.log_prob();
    });
  }

  // What was drawn, or given, becomes the input of the first layer: of channel g, or of all.
  GENENGINE_TEAM void enter(const PixelLine& line, int g) const {
    const int entry = s.entry(), begin = s.components ? 0 : g, across = (s.components ? s.channels : 1) * entry;
    const float last = static_cast<float>(s.levels - 1);
    team.each(line.count, images, across, [=, this](int i, int m) {
      const Place p = place(line, i, m);
      Weight *left = kept(1, 0, p.y, p.m, p.x) + begin * entry, *above = kept(0, 0, p.y, p.m, p.x) + begin * entry;
      return [=, this](int j) {
        const int c = begin + j / entry;
        const float x = call.x[pixel(p, c)];
        const float bin = nearest_bin(x, last);
        const int level = bin > 0.f ? static_cast<int>(bin) : 0;  // NaN, of outputs that overflow, has no level
        const float value = s.embedding ? vector(s.level_entry(c, level))[j % entry] : x;
        left[j] = above[j] = Team::narrow(value);
      };
    });
  }
};

}  // namespace genengine
