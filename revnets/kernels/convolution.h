// Convolutions with compressed weights: every output channel is a list of (input, weight) pairs.
//
// The input stays in CHW order, so that one non-zero weight multiplies a run of neighbouring pixels: a block of up to
// eight vectors of them stays in registers while the row's weights are broadcast one at a time, zeros never being
// touched (the layout of Elsen et al., "Fast Sparse ConvNets", arXiv 1911.09723). The pixels of a block are first
// packed into a panel: a line per input channel and tap, aligned, as many lines as fit into the first cache, where all
// output channels find them (a load from the second cache takes as long as two multiplications). Kernel size, stride,
// padding and dilation matter to the packing alone.

#pragma once

#include "call.h"
#include "quads.h"

namespace {

constexpr int kVectors = 8;                    // of a block, at most
constexpr int64_t kPanel = 10240;              // floats of a panel, about
constexpr int64_t kBlock = kVectors * kLanes;  // pixels

bool is_pointwise(const Call& c) {
  return c.kh == 1 && c.kw == 1 && c.stride_h == 1 && c.stride_w == 1 && !c.pad_h && !c.pad_w;
}

// How the output's rows are cut into blocks of whole vectors, shared out evenly.
struct Blocks {
  int64_t first, pixels, vectors, count, largest;
  explicit Blocks(const Call& c) {
    first = c.first_row * c.w_out;
    pixels = end_row(c) * c.w_out - first;
    vectors = (pixels + kLanes - 1) / kLanes;
    const int64_t most = std::max<int64_t>(4, std::min<int64_t>(c.counts ? kQuadVectors : kVectors, kPanel / kLanes / c.chunk));
    count = (vectors + most - 1) / most;
    largest = (vectors + count - 1) / count;
  }
  int64_t first_vector(int64_t block) const { return block * vectors / count; }
  int64_t start(int64_t block) const { return first + std::min(first_vector(block) * kLanes, pixels); }
};

// Neighbouring pixels of the output.
struct Block {
  int64_t start, length, vectors;
};

// Parts of a block that lie in one row of the output.
struct Run {
  int64_t row, column, length;
};

// --- packing ---------------------------------------------------------------------------------------------------------

// The input's pixels under one tap, for a run.
inline void pack_run(const Call& c, const float* x, const Run& run, int64_t tap_h, int64_t tap_w, float* to) {
  const int64_t row = run.row * c.stride_h + tap_h - c.pad_h, column = run.column * c.stride_w + tap_w - c.pad_w;
  if (row < 0 || row >= c.h) {
    for (int64_t k = 0; k < run.length; ++k) to[k] = 0.0f;
    return;
  }
  const float* line = x + row * c.w + column;  // its pixel k * stride_w belongs to position k
  int64_t begin = 0, end = run.length;
  if (column < 0) begin = std::min(end, (-column + c.stride_w - 1) / c.stride_w);
  if (column + (end - 1) * c.stride_w >= c.w) end = std::max(begin, (c.w - column + c.stride_w - 1) / c.stride_w);
  for (int64_t k = 0; k < begin; ++k) to[k] = 0.0f;
  if (c.stride_w == 1) {
    copy(to + begin, line + begin, end - begin);
  } else if (c.stride_w == 2) {
    copy_even(to + begin, line + 2 * begin, end - begin);
  } else {
    for (int64_t k = begin; k < end; ++k) to[k] = line[k * c.stride_w];
  }
  for (int64_t k = end; k < run.length; ++k) to[k] = 0.0f;
}

// Lines of the panel for inputs `first` to `last` of the group whose first channel is x. The last vector of a line ends
// with the block's last pixel: where that is no whole number of vectors, it repeats some of the one before. `gates` of
// the group's channels may be null.
void pack(const Call& c, const Block& b, const float* x, const float* gates, int64_t first, int64_t last, int64_t pitch,
          float* panel) {
  const int64_t plane = x_plane(c), tail = b.length - kLanes, before = (b.vectors - 1) * kLanes;
  if (is_pointwise(c) && b.length >= kLanes) {
    for (int64_t i = first; i < last; ++i, panel += pitch) {
      const float* from = x + i * plane + b.start;
      const vec gate = same(gates ? gates[i] : 1.0f);
      for (int64_t p = 0; p < before; p += kLanes) store(panel + p, load(from + p) * gate);
      store(panel + before, load(from + tail) * gate);
    }
    return;
  }
  Run runs[kBlock];
  int64_t count = 0;
  for (int64_t p = b.start, end = b.start + b.length; p < end; p += runs[count++].length) {
    const int64_t row = p / c.w_out, column = p - row * c.w_out;
    runs[count] = {row, column, std::min(end - p, c.w_out - column)};
  }
  const int64_t taps = c.kh * c.kw;
  for (int64_t k = first; k < last; ++k, panel += pitch) {
    const int64_t channel = k / taps, tap = k - channel * taps;
    const int64_t tap_h = tap / c.kw * c.dil_h, tap_w = tap % c.kw * c.dil_w;
    float* to = panel;
    for (int64_t r = 0; r < count; to += runs[r++].length) pack_run(c, x + channel * plane, runs[r], tap_h, tap_w, to);
    if (tail >= 0 && tail < before) store(panel + before, load(panel + tail));
    if (!gates) continue;
    for (int64_t p = 0; p <= before; p += kLanes) store(panel + p, load(panel + p) * gates[channel]);
  }
}

// --- multiplying -----------------------------------------------------------------------------------------------------

template <int kNumber>
void multiply(const Call& c, const Work& work) {
  const int64_t tail = work.length - kLanes, pitch = work.pitch * sizeof(float);
  const char* panel = reinterpret_cast<const char*>(__builtin_assume_aligned(work.panel, REVNETS_VECTOR));
  const Range range(c.activation);
  float* sums = work.sums;
  for (int64_t o = work.begin; o < work.end; ++o, sums += kNumber * kLanes) {
    vec sum[kNumber];
    if (work.first) {
      const vec first = same(c.bias ? c.bias[o] : 0.0f);
      for (int j = 0; j < kNumber; ++j) sum[j] = first;
    } else {
      for (int j = 0; j < kNumber; ++j) sum[j] = load(sums + j * kLanes);
    }
    const int32_t end = work.rows[o + 1];
    for (int32_t i = work.rows[o]; i < end; ++i) {
      const vec* from = reinterpret_cast<const vec*>(panel + c.columns[i] * pitch);
      const vec weight = same(c.values[i]);
      for (int j = 0; j < kNumber; ++j) sum[j] = multiply_add(weight, from[j], sum[j]);
    }
    if (!work.last) {
      for (int j = 0; j < kNumber; ++j) store(sums + j * kLanes, sum[j]);
      continue;
    }
    float* y = work.y + o * work.plane;
    const float* residual = work.residual ? work.residual + o * work.plane : nullptr;
    if (kNumber == 1 && tail < 0) {
      store_end(range, sum[0], residual, y, work.length);
    } else {
      if (residual) {
        for (int j = 0; j < kNumber - 1; ++j) sum[j] += load(residual + j * kLanes);
        sum[kNumber - 1] += load(residual + tail);
      }
      for (int j = 0; j < kNumber - 1; ++j) store(y + j * kLanes, range(sum[j]));
      store(y + tail, range(sum[kNumber - 1]));
    }
    finish(y, work.length, c.activation);
  }
}

void multiply_any(const Call& c, const Work& work) {
  switch ((work.length + kLanes - 1) / kLanes) {
    case 1: return multiply<1>(c, work);
    case 2: return multiply<2>(c, work);
    case 3: return multiply<3>(c, work);
    case 4: return multiply<4>(c, work);
    case 5: return multiply<5>(c, work);
    case 6: return multiply<6>(c, work);
    case 7: return multiply<7>(c, work);
    default: return multiply<8>(c, work);
  }
}

// --- sharing out -----------------------------------------------------------------------------------------------------

// Images of one pixel, such as the gates of squeeze-and-excite: there is nothing to pack.
void run_vectors(const Call& c, const Member& member) {
  const int64_t chunks = (c.c_in + c.chunk - 1) / c.chunk, begin = member.begin(c.c_out), end = member.end(c.c_out);
  const Range range(c.activation);
  for (int64_t image = 0; image < c.n && begin < end; ++image) {
    const float *x = x_of(c, image), *residual = residual_of(c, image);
    const float* gates = image_of(c.gates, image, c.gates_image, c.c_in);
    float* y = y_of(c, image);
    for (int64_t o = begin; o < end; ++o) {
      float sum = c.bias ? c.bias[o] : 0.0f;
      for (int64_t j = 0, first = 0; j < chunks; ++j, first += c.chunk) {
        const int32_t* row = c.rows + j * c.c_out + o;
        for (int32_t i = row[0]; i < row[1]; ++i) {
          const int64_t at = first + c.columns[i];
          sum += c.values[i] * (gates ? x[at] * gates[at] : x[at]);
        }
      }
      y[o] = residual ? sum + residual[o] : sum;
    }
    map(y + begin, end - begin, range);
    finish(y + begin, end - begin, c.activation);
  }
}

// The member's share: whole blocks, of the first and the last perhaps a part of the output channels (or quads).
void run_convolution(const Call& c, const Member& member) {
  if (is_pointwise(c) && c.h * c.w == 1 && c.groups == 1 && !c.counts) return run_vectors(c, member);
  const int64_t inputs = c.c_in / c.groups * c.kh * c.kw, chunks = std::max<int64_t>(1, (inputs + c.chunk - 1) / c.chunk);
  const int64_t outputs = c.c_out / c.groups, height = c.counts ? kQuad : 1, rows = (outputs + height - 1) / height;
  const Blocks blocks(c);
  const int64_t largest = blocks.largest * kLanes, panel_size = std::min(c.chunk, inputs) * largest;
  float* panel = scratch(panel_size + (chunks > 1 ? rows * height * largest : 0));
  const int64_t planes = c.n * c.groups, total = planes * blocks.vectors;
  const int64_t begin = total * member.id, end = total * (member.id + 1);  // in vectors / member.size
  for (int64_t piece = begin / member.size / blocks.vectors * blocks.count; piece < planes * blocks.count; ++piece) {
    const int64_t index = piece % blocks.count, image = piece / blocks.count / c.groups;
    const int64_t group = piece / blocks.count % c.groups;
    const int64_t vectors = blocks.first_vector(index + 1) - blocks.first_vector(index);
    const int64_t from = (piece / blocks.count * blocks.vectors + blocks.first_vector(index)) * member.size;
    if (from >= end) break;
    const int64_t all = vectors * member.size;
    if (from + all <= begin) continue;
    const Block block = {blocks.start(index), blocks.start(index + 1) - blocks.start(index), vectors};
    Work work;
    work.panel = panel;
    work.pitch = vectors * kLanes;
    work.row = group * rows;
    work.channel = group * outputs;
    work.channels = outputs;
    work.begin = boundary(c.rows, rows * c.groups, chunks, work.row, rows, begin - from, all);
    work.end = boundary(c.rows, rows * c.groups, chunks, work.row, rows, end - from, all);
    work.sums = panel + panel_size;
    work.length = block.length;
    work.plane = y_plane(c);
    work.y = y_of(c, image) + block.start;
    work.residual = c.residual ? residual_of(c, image) + block.start : nullptr;
    const int64_t channel = group * (c.c_in / c.groups);
    const float* x = x_of(c, image, channel);
    const float* gates = c.gates ? image_of(c.gates, image, c.gates_image, c.c_in) + channel : nullptr;
    for (int64_t j = 0; j < chunks; ++j) {
      pack(c, block, x, gates, j * c.chunk, std::min(inputs, (j + 1) * c.chunk), work.pitch, panel);
      work.rows = c.rows + j * rows * c.groups;
      work.first = j == 0;
      work.last = j + 1 == chunks;
      if (c.counts) multiply_quads_any(c, work, j * rows * c.groups, chunks * rows * c.groups);
      else multiply_any(c, work);
    }
  }
}

}  // namespace
