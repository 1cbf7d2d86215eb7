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

namespace genengine {

#if defined(__CUDACC__)
#define GENENGINE_TEAM __device__ __forceinline__
#else
#define GENENGINE_TEAM inline
#endif

constexpr int kPanelColumns = 16;
constexpr int kMaxLevels = 4096;
constexpr int kMaxImages = 64;  // of a group

GENENGINE_HD int to_panels(int n) { return (n + kPanelColumns - 1) / kPanelColumns * kPanelColumns; }
GENENGINE_HD int to_pairs(int k) { return k + k % 2; }

// ---- the network and its packed weights ----------------------------------------------------------------------------------

struct PanelMatrix {
  int64_t offset;  // elements
  int k, n;        // as stored
  GENENGINE_HD_MEMBER int64_t size() const { return static_cast<int64_t>(k) * n; }
};

// The fields of PixelCNNShape in genengine/ops/_pixelcnn_weights.py, in its order; there the packing has the same order.
// Features come in groups, one for each ordered colour channel, each filled up to whole panels; a gate's two halves lie
// side by side within a group.
struct PixelCNNShape {
  static constexpr int kFields = 15;
  int size, channels, levels, classes, dim, depth, reach, first_reach, embedding, head_dim, components, gated, folded, early, rectified;
  // What would be worked out again at every step.
  int features;                              // of a group, as stored
  int64_t first_elements, layer_elements;  // elements of the matrices of the first layer and of each of the others

  // Called once the fields are there.
  GENENGINE_HD_MEMBER void prepare() {
    features = to_panels(dim / groups());
    first_elements = end_of_layer(0, 0);
    layer_elements = end_of_layer(1, first_elements) - first_elements;
  }

  GENENGINE_HD_MEMBER int groups() const { return components ? 1 : channels; }
  GENENGINE_HD_MEMBER int part() const { return features; }
  GENENGINE_HD_MEMBER int width() const { return groups() * part(); }
  GENENGINE_HD_MEMBER int gates() const { return 2 * width(); }
  GENENGINE_HD_MEMBER int head_part() const { return to_panels(head_dim / groups()); }
  GENENGINE_HD_MEMBER int outputs() const { return to_panels(components ? components * params_per_component(channels) : levels); }
  GENENGINE_HD_MEMBER int entry() const { return embedding ? embedding : 1; }           // features of a pixel's channel
  GENENGINE_HD_MEMBER int reach_of(int layer) const { return layer ? reach : first_reach; }
  GENENGINE_HD_MEMBER int inputs(int layer) const { return layer ? width() : channels * entry(); }
  GENENGINE_HD_MEMBER int rows_above(int layer) const { return reach_of(layer) + (gated ? 1 : 0); }
  GENENGINE_HD_MEMBER int taps(int layer) const { return 2 * reach_of(layer) + 1; }
  // Features of a pixel that group g may see of itself: in the first layer the earlier channels alone.
  GENENGINE_HD_MEMBER int centre(int layer, int g) const { return layer ? (g + 1) * part() : groups() > 1 ? g * entry() : 0; }

  // Matrices in the order in which they are packed.
  GENENGINE_HD_MEMBER PanelMatrix above(int layer) const {
    return {layer_offset(layer), to_pairs(rows_above(layer) * taps(layer) * inputs(layer)), gates()};
  }
  GENENGINE_HD_MEMBER PanelMatrix down(int layer) const {
    const PanelMatrix m = above(layer);
    return {m.offset + m.size(), gated ? gates() : 0, gates()};
  }
  GENENGINE_HD_MEMBER int left_depth(int layer, int g) const {
    const int twice = folded && layer ? 2 : 1;
    return to_pairs(reach_of(layer) * inputs(layer) + twice * centre(layer, g));
  }
  GENENGINE_HD_MEMBER PanelMatrix left(int layer, int g) const {
    const PanelMatrix m = down(layer);
    int64_t offset = m.offset + m.size();
    for (int i = 0; i < g; ++i) offset += static_cast<int64_t>(left_depth(layer, i)) * 2 * part();
    return {offset, left_depth(layer, g), 2 * part()};
  }
  GENENGINE_HD_MEMBER PanelMatrix out(int layer, int g) const {
    const PanelMatrix last = left(layer, groups() - 1);
    return triangle(last.offset + last.size(), part(), part(), g);
  }
  GENENGINE_HD_MEMBER PanelMatrix hidden(int g) const { return triangle(layer_offset(depth), part(), head_part(), g); }
  GENENGINE_HD_MEMBER PanelMatrix logits(int g) const { return triangle(hidden(groups()).offset, head_part(), outputs(), g); }
  GENENGINE_HD_MEMBER int64_t matrix_elements() const { return logits(groups()).offset; }

  // Vectors, float32, in the order in which they are packed.
  GENENGINE_HD_MEMBER int64_t above_bias(int layer) const { return static_cast<int64_t>(layer) * (gates() + width()); }
  GENENGINE_HD_MEMBER int64_t out_bias(int layer) const { return above_bias(layer) + gates(); }
  GENENGINE_HD_MEMBER int64_t position(int stack, int y, int x) const {
    return above_bias(depth) + ((static_cast<int64_t>(stack) * size + y) * size + x) * width();
  }
  GENENGINE_HD_MEMBER int64_t hidden_bias(int g) const { return position(2, 0, 0) + g * head_part(); }
  GENENGINE_HD_MEMBER int64_t logits_bias(int g) const { return hidden_bias(groups()) + g * outputs(); }
  GENENGINE_HD_MEMBER int64_t class_bias(int64_t label, int layer, int stack) const {
    return logits_bias(groups()) + ((label * depth + layer) * 2 + stack) * gates();
  }
  GENENGINE_HD_MEMBER int64_t level_entry(int channel, int level) const {
    return zeros() + gates() + (static_cast<int64_t>(channel) * levels + level) * embedding;
  }
  GENENGINE_HD_MEMBER int64_t zeros() const { return class_bias(classes + 1, 0, 0); }  // as many as gates
  GENENGINE_HD_MEMBER int64_t vector_elements() const { return level_entry(channels, 0); }

 private:
  GENENGINE_HD_MEMBER int64_t layer_offset(int i) const {
    return i == 0 ? 0 : first_elements + (i - 1) * layer_elements;
  }
  // Where a layer of this kind that began at `offset` would end.
  GENENGINE_HD_MEMBER int64_t end_of_layer(int layer, int64_t offset) const {
    offset += static_cast<int64_t>(to_pairs(rows_above(layer) * taps(layer) * inputs(layer)) + (gated ? gates() : 0)) * gates();
    for (int g = 0; g < groups(); ++g) offset += static_cast<int64_t>(left_depth(layer, g) * 2 + (g + 1) * part()) * part();
    return offset;
  }
  // The matrix of group g of a lower block triangle with k and n for each block.
  GENENGINE_HD_MEMBER static PanelMatrix triangle(int64_t offset, int k, int n, int g) {
    return {offset + static_cast<int64_t>(g) * (g + 1) / 2 * k * n, (g + 1) * k, n};
  }
};

// ---- the order of the pixels ---------------------------------------------------------------------------------------------

// Pixels that go together: (y + i dy, x + i dx), i < count.
struct PixelLine {
  int y, x, dy, dx, count;
};

// In the wavefront row y stands at column t - lag y at step t. Row y needs of the rows above no more than `ready` columns
// further on, so it may start as soon as the row above is lag = ready + 1 ahead.
struct Wavefront {
  int size, lag;

  // Columns by which the vertical features that enter layer `layer` lag behind the pixels of their row.
  GENENGINE_HD_MEMBER static int ready(const PixelCNNShape& s, int layer) {
    return s.gated ? s.first_reach + layer * s.reach : s.reach_of(layer);
  }
  GENENGINE_HD_MEMBER static int last_ready(const PixelCNNShape& s) {
    const int first = ready(s, 0), last = ready(s, s.depth - 1);
    return first > last ? first : last;
  }
  GENENGINE_HD_MEMBER explicit Wavefront(const PixelCNNShape& s) : size(s.size), lag(last_ready(s) + 1) {}
  // Steps after which `rows` rows are done.
  GENENGINE_HD_MEMBER int steps(int rows) const { return rows ? lag * (rows - 1) + size : 0; }
  // Rows between the first of which some layer may still lack columns and the newest begun.
  GENENGINE_HD_MEMBER int rows_in_flight() const { return (size + lag - 2) / lag + 1; }
  // The pixels of step t among the first `rows` rows.
  GENENGINE_HD_MEMBER PixelLine at(int t, int rows) const {
    const int last = t < 0 ? -1 : t / lag < rows - 1 ? t / lag : rows - 1;
    const int first = t < size ? 0 : (t - size) / lag + 1;
    return {first, t - lag * first, 1, -lag, last < first ? 0 : last - first + 1};
  }
};

// ---- what is kept of a group of images -----------------------------------------------------------------------------------

// How a kernel takes the network: bytes of a kept activation and of what products read, elements between two rows of the
// latter (shared memory has banks), rows of a product at most (what is gathered for it stays in the nearest memory).
struct PixelCNNStyle {
  int element, input, pad, rows;
};

// Bytes from the start of a group's state: activations that later pixels read, rings of rows, (row, image, column, feature),
// with zeros beside the image, never written. And bytes from the start of what one step works with, which may lie elsewhere.
struct PixelCNNState {
  int images, flight, chunk;
  int64_t above, left, vertical, bytes;
  int64_t inputs, sums, gated, residual, shifted, hidden, head, outputs, scratch_bytes;

  PixelCNNState() = default;
  GENENGINE_HD_MEMBER PixelCNNState(const PixelCNNShape& s, int images_, bool wavefront, const PixelCNNStyle& style)
      : images(images_), flight(wavefront ? Wavefront(s).rows_in_flight() : 1),
        chunk(images_ > style.rows ? images_ : style.rows / images_ * images_) {
    const int widest = s.above(s.depth > 1 ? 1 : 0).k, first = s.above(0).k, left_widest = s.left(s.depth > 1 ? 1 : 0, s.groups() - 1).k;
    const int most = widest > first ? widest : first, k = most > left_widest ? most : left_widest;
    const int kept = s.groups() > 1 ? s.depth : 1;  // layers whose gates a later channel of the pixel reads
    const int64_t rows = chunk, width = s.width() + style.pad;
    bytes = scratch_bytes = 0;
    above = take(bytes, ring(s, s.depth, 0), style.element);
    left = take(bytes, ring(s, s.depth, 1), style.element);
    vertical = take(bytes, static_cast<int64_t>(s.depth) * vertical_rows() * images * s.size * s.gates(), 4);
    inputs = take(scratch_bytes, rows * ((k > s.gates() ? k : s.gates()) + style.pad), style.input);
    sums = take(scratch_bytes, rows * s.gates(), 4);
    gated = take(scratch_bytes, kept * rows * width, style.input);
    residual = take(scratch_bytes, rows * s.part(), 4);
    shifted = take(scratch_bytes, s.folded ? kept * rows * width : 0, style.input);
    hidden = take(scratch_bytes, rows * width, style.input);
    head = take(scratch_bytes, rows * (s.groups() * s.head_part() + style.pad), style.input);
    outputs = take(scratch_bytes, rows * (s.outputs() > s.head_part() ? s.outputs() : s.head_part()), 4);
  }
  GENENGINE_HD_MEMBER int vertical_rows() const { return flight > 1 ? flight + 1 : 1; }
  GENENGINE_HD_MEMBER int ring_rows(const PixelCNNShape& s, int layer, int kind) const {
    return kind ? flight : flight + s.reach_of(layer);
  }
  // Elements before layer `layer` of the rings of rows above (kind 0) or of columns to the left (1).
  GENENGINE_HD_MEMBER int64_t ring(const PixelCNNShape& s, int layer, int kind) const {
    if (layer == 0) return 0;
    const int64_t first = (ring_size(s, 0, kind) + kPanelColumns - 1) / kPanelColumns * kPanelColumns;  // vectors are aligned
    return first + (layer - 1) * ring_size(s, 1, kind);
  }

 private:
  GENENGINE_HD_MEMBER int64_t ring_size(const PixelCNNShape& s, int layer, int kind) const {
    return static_cast<int64_t>(ring_rows(s, layer, kind)) * images * (s.size + s.taps(layer) - 1) * s.inputs(layer);
  }
  GENENGINE_HD_MEMBER static int64_t take(int64_t& bytes, int64_t elements, int element) {
    const int64_t offset = bytes;
    bytes += (elements * element + 255) / 256 * 256;
    return offset;
  }
};

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
GENENGINE_HD float mixture_log_prob_of(const float* params, const float* x, int components, int channels, const Bins& bins,
                                       float inverse_temperature) {
  const Bins scaled = {bins.last, bins.h * inverse_temperature, bins.log_width + logarithm(inverse_temperature)};
  float joint_largest = kNothing, joint = 0.f, logit_largest = kNothing, logit_sum = 0.f;
  for (int k = 0; k < components; ++k) {
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
    add_exponential(joint_largest, joint, joint_log_prob(linear, numerator, denominator));
    add_exponential(logit_largest, logit_sum, logit);
  }
  return (joint_largest - logit_largest) + logarithm(joint / logit_sum);
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
    team.rows(line.count * images, [=, this](int r) {
      const Place p = place(line, r);
      if (call.known && call.known[pixel(p, 0)]) return;
      static_assert(1 + 2 * kMaxChannels <= kPanelColumns);
      float *u = residual + r * s.part(), *x = u + 1 + kMaxChannels;
      const uint32_t element = static_cast<uint32_t>((p.y * s.size + p.x) * (1 + s.channels));
      for (int j = 0; j <= s.channels; ++j) u[j] = uniform(p, element + static_cast<uint32_t>(j));
      const float* params = outputs + r * s.outputs();
      mixture_draw(params, u, s.components, s.channels, last, call.temperature, call.inverse_temperature, x);
      for (int c = 0; c < s.channels; ++c) call.x[pixel(p, c)] = x[c];
      log_prob(p) = mixture_log_prob_of(params, x, s.components, s.channels, bins, call.inverse_temperature);
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
