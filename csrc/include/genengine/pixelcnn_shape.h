// What a gated PixelCNN consists of, as pixelcnn_sample.h samples it: its packed weights (genengine/ops/_pixelcnn_weights.py),
// the order of its pixels, and what is kept of a group of images.
#pragma once
#include "genengine/logistic_mixture.h"

namespace genengine {

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

}  // namespace genengine
