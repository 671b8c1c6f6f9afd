// Depthwise convolutions with dense weights, of 3, 5 or 7 pixels and stride 1 or 2, and the mean over the pixels.
//
// A strip of a channel is copied with its border into the first cache, columns and rows that a stride of 2 tells apart
// each by themselves; after which every tap is a constant offset and nothing has to be masked.

#pragma once

#include "call.h"

namespace {

constexpr int64_t kStrip = 4096;  // floats of a strip, about

// Where the pixels of a strip lie: row i of the padded input is row i / stride of its phase i % stride, same of columns.
struct Strip {
  int64_t rows;            // of the output
  int64_t pitch;           // of a row of a phase
  int64_t column_phase, row_phase;  // floats from one to the next
  int64_t size;
  bool flat;               // all rows are one run of positions, for lines that are much shorter than a vector
  int64_t wide, lines;     // floats of a padded line before its columns are told apart, and how many of them

  Strip(const Call& c, int64_t size_, int64_t stride) {
    flat = 2 * c.w_out <= kLanes;
    pitch = c.w_out + (size_ - 1) / stride;
    if (!flat) pitch = round_up(pitch, kLanes);
    const int64_t most = (kStrip / (pitch * stride) - (size_ - stride)) / stride;
    rows = std::max<int64_t>(1, std::min(c.h_out, most));
    const int64_t unit = c.h_out % 7 ? 4 : 7;  // of rows that are computed together
    if (rows > unit) rows = rows / unit * unit;
    column_phase = (rows + (size_ - 1) / stride) * pitch + (flat ? kLanes : 0);
    row_phase = column_phase * stride;
    size = row_phase * stride + 2 * kLanes;  // vectors reach beyond the last position
    wide = round_up(std::max(stride * pitch + 1, c.w + c.pad_w) + 2 * kLanes, kLanes);
    lines = (rows - 1) * stride + size_;
  }
};

// Rows of the padded input from `first` into the strip. With a stride of 2 they are first copied to `lines`, all of them
// before the first is read again: what has just been written in pieces cannot be read at once.
template <int kSize, int kStride>
void fill_strip(const Call& c, const Strip& s, const float* x, int64_t first, int64_t rows, float* lines, float* strip) {
  const int64_t width = std::min(c.w, kStride * s.pitch - c.pad_w), count = (rows - 1) * kStride + kSize;
  float* to = (kStride == 1 ? strip : lines) + c.pad_w;  // the borders stay zero
  for (int64_t i = 0; i < count; ++i, to += kStride == 1 ? s.pitch : s.wide) {
    const int64_t row = first + i - c.pad_h;
    if (row >= 0 && row < c.h) copy(to, x + row * c.w, width);
    else std::memset(to, 0, width * sizeof(float));
  }
  if (kStride == 1) return;
  for (int64_t i = 0; i < count; ++i, lines += s.wide) {
    float* phase = strip + i % kStride * s.row_phase + i / kStride * s.pitch;
    for (int b = 0; b < kStride; ++b)
      for (int64_t k = 0; k < s.pitch; k += kLanes)  // a short line writes into the next one, which comes later
        store(phase + b * s.column_phase + k, even_of(load(lines + b + 2 * k), load(lines + b + 2 * k + kLanes - 1)));
  }
}

// kCount rows of the output from `at`, one vector of each.
template <int kSize, int kStride, int kCount>
inline void depthwise_vector(const float* at, const Strip& s, const float* weights, float bias, vec* sum) {
  for (int r = 0; r < kCount; ++r) sum[r] = same(bias);
#pragma GCC unroll 2
  for (int phase = 0; phase < kStride; ++phase) {
#pragma GCC unroll 16
    for (int m = 0; m < kCount + (kSize - 1 - phase) / kStride; ++m) {
      const float* line = at + phase * s.row_phase + m * s.pitch;
#pragma GCC unroll 8
      for (int b = 0; b < kSize; ++b) {
        const vec pixels = load(line + b % kStride * s.column_phase + b / kStride);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) {
          const int tap = (m - r) * kStride + phase;
          if (tap >= 0 && tap < kSize) sum[r] += same(weights[tap * kSize + b]) * pixels;
        }
      }
    }
  }
}

// What the rows of a channel have in common.
struct Plane {
  const float* weights;
  float bias;
  float* y;
  const float* residual;
  int64_t pixels;
};

template <int kSize, int kStride, int kCount>
inline void depthwise_rows(const Call& c, const Plane& plane, const Range& range, const Strip& s, const float* strip,
                           int64_t row) {
  for (int64_t start = 0; start < c.w_out; start += kLanes) {
    // The last vector of a line ends where the line does. Lines shorter than a vector write too much, which the next
    // lines overwrite, except at the end of the plane.
    const int64_t column = c.w_out >= kLanes ? std::min(start, c.w_out - kLanes) : 0;
    vec sum[kCount];
    depthwise_vector<kSize, kStride, kCount>(strip + column, s, plane.weights, plane.bias, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const int64_t p = (row + r) * c.w_out + column;
      const float* residual = plane.residual ? plane.residual + p : nullptr;
      if (p + kLanes > plane.pixels) {
        store_end(range, sum[r], residual, plane.y + p, plane.pixels - p);
      } else {
        if (residual) sum[r] += load(residual);
        store(plane.y + p, range(sum[r]));
      }
    }
  }
}

// All rows of a strip as one run; `line` has room for it.
template <int kSize, int kStride>
void depthwise_flat(const Call& c, const Plane& plane, const Range& range, const Strip& s, const float* strip,
                    int64_t row, int64_t rows, float* line) {
  for (int64_t q = 0; q < (rows - 1) * s.pitch + c.w_out; q += kLanes) {
    vec sum;
    depthwise_vector<kSize, kStride, 1>(strip + q, s, plane.weights, plane.bias, &sum);
    store(line + q, sum);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t p = (row + r) * c.w_out;
    const float* residual = plane.residual ? plane.residual + p : nullptr;
    vec sum = load(line + r * s.pitch);
    if (p + kLanes > plane.pixels) {
      store_end(range, sum, residual, plane.y + p, std::min(c.w_out, plane.pixels - p));
    } else {
      if (residual) sum += load(residual);
      store(plane.y + p, range(sum));
    }
  }
}

template <int kSize, int kStride>
void run_depthwise(const Call& c, const Member& member) {
  const Range range(c.activation);
  const Strip s(c, kSize, kStride);
  const int64_t strip_size = round_up(s.size, kLanes), lines_size = kStride == 1 ? 0 : s.lines * s.wide;
  const int64_t flat_size = s.flat ? s.rows * s.pitch + 2 * kLanes : 0;
  float* strip = scratch(strip_size + lines_size + flat_size);
  float *lines = strip + strip_size, *flat = lines + lines_size;
  std::fill(strip, flat + flat_size, 0.0f);
  const int64_t planes = c.n * c.c_in;
  for (int64_t task = member.begin(planes); task < member.end(planes); ++task) {
    const int64_t channel = task % c.c_in, pixels = c.h_out * c.w_out;
    const float* x = c.x + task * c.h * c.w;
    const Plane plane = {c.values + channel * kSize * kSize, c.bias ? c.bias[channel] : 0.0f, c.y + task * pixels,
                         c.residual ? c.residual + task * pixels : nullptr, pixels};
    for (int64_t row = 0; row < c.h_out; row += s.rows) {
      const int64_t rows = std::min(s.rows, c.h_out - row);
      fill_strip<kSize, kStride>(c, s, x, row * kStride, rows, lines, strip);
      if (s.flat) {
        depthwise_flat<kSize, kStride>(c, plane, range, s, strip, row, rows, flat);
        continue;
      }
      int64_t r = 0;
      if (rows % 7 == 0)
        for (; r < rows; r += 7) depthwise_rows<kSize, kStride, 7>(c, plane, range, s, strip + r * s.pitch, row + r);
      for (; r + 4 <= rows; r += 4)
        depthwise_rows<kSize, kStride, 4>(c, plane, range, s, strip + r * s.pitch, row + r);
      for (; r < rows; ++r) depthwise_rows<kSize, kStride, 1>(c, plane, range, s, strip + r * s.pitch, row + r);
    }
    finish(plane.y, pixels, c.activation);
  }
}

// Kernel and stride of those that have a loop.
inline bool has_depthwise(const Call& c) {
  const bool square = c.kh == c.kw && c.stride_h == c.stride_w && c.dil_h == 1 && c.dil_w == 1;
  return square && (c.kh == 3 || c.kh == 5 || c.kh == 7) && (c.stride_h == 1 || c.stride_h == 2);
}

void run_depthwise_any(const Call& c, const Member& member) {
  switch (c.kh * 10 + c.stride_h) {
    case 31: return run_depthwise<3, 1>(c, member);
    case 32: return run_depthwise<3, 2>(c, member);
    case 51: return run_depthwise<5, 1>(c, member);
    case 52: return run_depthwise<5, 2>(c, member);
    case 71: return run_depthwise<7, 1>(c, member);
    case 72: return run_depthwise<7, 2>(c, member);
  }
}

// The mean of each plane.
void run_mean(const Call& c, const Member& member) {
  const int64_t planes = c.n * c.c_in, pixels = c.h * c.w;
  for (int64_t task = member.begin(planes); task < member.end(planes); ++task) {
    const float* x = c.x + task * pixels;
    vec sums = same(0.0f);
    int64_t k = 0;
    for (; k + kLanes <= pixels; k += kLanes) sums += load(x + k);
    double sum = 0.0;
    for (int j = 0; j < kLanes; ++j) sum += sums[j];
    for (; k < pixels; ++k) sum += x[k];
    c.y[task] = static_cast<float>(sum / pixels);
  }
}

}  // namespace
