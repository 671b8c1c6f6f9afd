// Depthwise convolutions with dense weights, of 3, 5 or 7 pixels and stride 1 or 2, some rows at once; others one by one.
//
// Nothing is copied: some rows of the output, a vector of each, are summed up in registers from the lines above and
// below them. At the image's border vectors are read in part, lines outside are a line of zeros. A stride of 2 takes
// every other pixel of two vectors.

#pragma once

#include "call.h"

namespace {

// Which lanes of the vectors under each tap lie in the image, for a vector of the output. With a stride of 2, those of
// the two vectors that taps 2 i and 2 i + 1 are taken from.
template <int kSize, int kStride>
struct Taps {
  Part parts[kStride * kSize];
  bool all;
  Taps(const Call& c, int64_t column) {
    all = column >= c.pad_w && (column + kLanes) * kStride + kSize <= c.w + c.pad_w;
    for (int i = 0; i < kStride * kSize && !all; ++i) {
      const int64_t first = column * kStride + (kStride == 1 ? i : i & ~1) + (kStride == 1 ? 0 : i % 2 * kLanes) - c.pad_w;
      parts[i] = Part(-first, c.w - first);
    }
  }
};

// kCount rows of the output, a vector of each; `lines` are those of the input at the column of the first tap.
template <int kSize, int kStride, int kCount, bool kAll>
inline void depthwise_vector(const float* const* lines, int64_t column, const Taps<kSize, kStride>& taps,
                             const float* weights, float bias, vec* sum) {
  for (int r = 0; r < kCount; ++r) sum[r] = same(bias);
#pragma GCC unroll 32
  for (int m = 0; m < (kCount - 1) * kStride + kSize; ++m) {
    const float* line = lines[m] + column;
#pragma GCC unroll 8
    for (int b = 0; b < kSize; ++b) {
      const int i = kStride == 1 ? b : b & ~1;
      vec pixels = kAll ? load(line + i) : load(line + i, taps.parts[i]);
      if (kStride == 2) {
        const vec next = kAll ? load(line + i + kLanes) : load(line + i + kLanes, taps.parts[i + 1]);
        pixels = b % 2 ? odd_of(pixels, next) : even_of(pixels, next);
      }
      in_register(pixels);
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
        const int tap = m - r * kStride;
        if (tap >= 0 && tap < kSize) sum[r] += same(weights[tap * kSize + b]) * pixels;
      }
    }
  }
}

// A channel of an image.
struct Plane {
  const float* x;
  const float* zeros;
  const float* weights;
  float bias;
  float* y;
  const float* residual;
};

// kCount rows of the output from `row`.
template <int kSize, int kStride, int kCount>
inline void depthwise_rows(const Call& c, const Plane& plane, const Range& range, int64_t row) {
  constexpr int kLines = (kCount - 1) * kStride + kSize;
  const float* lines[kLines];
  for (int m = 0; m < kLines; ++m) {
    const int64_t line = row * kStride + m - c.pad_h;
    const int64_t place = c.ring ? (line + c.ring_first) % c.ring : line;
    lines[m] = line >= 0 && line < c.h ? plane.x + place * c.w : plane.zeros;
  }
  const Part part(0, c.w_out);
  for (int64_t start = 0; start < c.w_out; start += kLanes) {
    const int64_t column = std::max<int64_t>(0, std::min(start, c.w_out - kLanes));  // the last two vectors may overlap
    const Taps<kSize, kStride> taps(c, column);
    const int64_t from = column * kStride - c.pad_w;
    vec sum[kCount];
    if (taps.all) depthwise_vector<kSize, kStride, kCount, true>(lines, from, taps, plane.weights, plane.bias, sum);
    else depthwise_vector<kSize, kStride, kCount, false>(lines, from, taps, plane.weights, plane.bias, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const int64_t p = (row + r) * c.w_out + column;
      if (c.w_out >= kLanes) {
        if (plane.residual) sum[r] += load(plane.residual + p);
        store(plane.y + p, range(sum[r]));
      } else {
        if (plane.residual) sum[r] += load(plane.residual + p, part);
        store(plane.y + p, range(sum[r]), part);
      }
    }
  }
}

// What comes after a channel's last pixel, while it is in the first cache.
inline void finish_plane(const Call& c, int64_t image, int64_t channel, float* y) {
  const int64_t pixels = (end_row(c) - c.first_row) * c.w_out;
  finish(y + c.first_row * c.w_out, pixels, c.activation);
  if (c.means) image_of(c.means, image, c.means_image, c.c_out)[channel] = mean_of(y, pixels);
}

template <int kSize, int kStride>
void run_depthwise(const Call& c, const Member& member) {
  const Range range(c.activation);
  const int64_t planes = c.n * c.c_in;
  float* zeros = scratch(c.w);
  std::fill(zeros, zeros + c.w, 0.0f);
  for (int64_t task = member.begin(planes); task < member.end(planes); ++task) {
    const int64_t image = task / c.c_in, channel = task % c.c_in;
    const Plane plane = {x_of(c, image, channel),
                         zeros,
                         c.values + channel * kSize * kSize,
                         c.bias ? c.bias[channel] : 0.0f,
                         y_of(c, image, channel),
                         residual_of(c, image, channel)};
    const int64_t last = end_row(c);
    int64_t row = c.first_row;
    if ((last - row) % 7 == 0)
      for (; row < last; row += 7) depthwise_rows<kSize, kStride, 7>(c, plane, range, row);
    for (; row + 4 <= last; row += 4) depthwise_rows<kSize, kStride, 4>(c, plane, range, row);
    for (; row < last; ++row) depthwise_rows<kSize, kStride, 1>(c, plane, range, row);
    finish_plane(c, image, channel, plane.y);
  }
}

// Wide strides, whose outputs have few pixels in common: a vector is taps that are neighbours, each output is summed up
// in one of its own, and their lanes at last. An image is read from a copy with its border.
void run_depthwise_wide(const Call& c, const Member& member) {
  const int64_t parts = (c.kw + kLanes - 1) / kLanes, span = parts * kLanes, lines = (c.h_out - 1) * c.stride_h + c.kh;
  const int64_t pitch = std::max(c.pad_w + c.w, (round_up(c.w_out, kLanes) - 1) * c.stride_w + span);
  float *padded = scratch(lines * pitch + c.kh * span), *weights = padded + lines * pitch;
  std::fill(padded, weights + c.kh * span, 0.0f);
  ivec taps;  // of a line's last vector; pixels beside them may be no numbers
  for (int j = 0; j < kLanes; ++j) taps[j] = (parts - 1) * kLanes + j < c.kw ? -1 : 0;
  const Range range(c.activation);
  for (int64_t task = member.begin(c.n * c.c_in); task < member.end(c.n * c.c_in); ++task) {
    const int64_t image = task / c.c_in, channel = task % c.c_in;
    const float *x = x_of(c, image, channel), *residual = residual_of(c, image, channel);
    float* y = y_of(c, image, channel);
    for (int64_t i = std::max<int64_t>(0, c.pad_h); i < std::min(lines, c.pad_h + c.h); ++i)
      copy(padded + i * pitch + c.pad_w, x + (i - c.pad_h) * c.w, c.w);
    for (int64_t a = 0; a < c.kh; ++a) copy(weights + a * span, c.values + (channel * c.kh + a) * c.kw, c.kw);
    const float bias = c.bias ? c.bias[channel] : 0.0f;
    for (int64_t row = 0; row < c.h_out; ++row) {
      for (int64_t k = 0; k < c.w_out; k += kLanes) {
        vec sum[kLanes] = {};
        for (int64_t a = 0; a < c.kh; ++a) {
          const float* line = padded + (row * c.stride_h + a) * pitch + k * c.stride_w;
          for (int64_t t = 0; t < parts; ++t, line += kLanes) {
            const vec weight = load(weights + a * span + t * kLanes);
            const ivec mask = t + 1 < parts ? taps | -1 : taps;
            for (int j = 0; j < kLanes; ++j) sum[j] += weight * masked(load(line + j * c.stride_w), mask);
          }
        }
        const int64_t p = row * c.w_out + k;
        const Part part(0, c.w_out - k);
        vec v = sums_of(sum) + bias;
        if (residual) v += load(residual + p, part);
        store(y + p, range(v), part);
      }
    }
    finish_plane(c, image, channel, y);
  }
}

// A vector of row `row` of the output, from position `k`.
inline vec depthwise_taps(const Call& c, const Phases& phases, const float* weights, int64_t row, int64_t k, vec sum) {
  for (int64_t a = 0; a < c.kh; ++a, weights += c.kw) {
    const int64_t line = row * c.stride_h + a - c.pad_h;
    if (line < 0 || line >= c.h) continue;
    for (int64_t f = 0; f < c.stride_w; ++f)
      for (int64_t i = k, b = f; b < c.kw; ++i, b += c.stride_w) sum += same(weights[b]) * load(phases.phase(line, f) + i);
  }
  return sum;
}

// Any kernel and stride that is not wide.
void run_depthwise_lines(const Call& c, const Member& member) {
  Phases phases(c, c.h, 0, 0.0f);
  const Range range(c.activation);
  for (int64_t task = member.begin(c.n * c.c_in); task < member.end(c.n * c.c_in); ++task) {
    const int64_t image = task / c.c_in, channel = task % c.c_in;
    const float *x = x_of(c, image, channel), *residual = residual_of(c, image, channel);
    float* y = y_of(c, image, channel);
    const vec bias = same(c.bias ? c.bias[channel] : 0.0f);
    for (int64_t line = 0; line < c.h; ++line) phases.split(c, x + line * c.w, line);
    for (int64_t row = 0; row < c.h_out; ++row) {
      const int64_t p = row * c.w_out;
      for (int64_t k = 0; k < c.w_out; k += kLanes) {
        const Part part(0, c.w_out - k);
        const vec first = residual ? bias + load(residual + p + k, part) : bias;
        store(y + p + k, range(depthwise_taps(c, phases, c.values + channel * c.kh * c.kw, row, k, first)), part);
      }
    }
    finish_plane(c, image, channel, y);
  }
}

void run_depthwise_any(const Call& c, const Member& member) {
  const bool square = c.kh == c.kw && c.stride_h == c.stride_w;
  switch (square && c.stride_h <= 2 ? c.kh * 10 + c.stride_h : 0) {
    case 31: return run_depthwise<3, 1>(c, member);
    case 32: return run_depthwise<3, 2>(c, member);
    case 51: return run_depthwise<5, 1>(c, member);
    case 52: return run_depthwise<5, 2>(c, member);
    case 71: return run_depthwise<7, 1>(c, member);
    case 72: return run_depthwise<7, 2>(c, member);
    default: return c.stride_w > 2 ? run_depthwise_wide(c, member) : run_depthwise_lines(c, member);
  }
}

}  // namespace
