// Gradient of the weights of a 1x1 convolution, at the non-zeros only: sums over pixels of x times dy.
//
// Pixels are counted through the batch, so that planes smaller than a vector waste nothing. A block of them is packed:
// a line per output channel, and a line per input channel of a chunk. A line of dy stays in registers while the row's
// non-zeros multiply theirs of x, four at a time, whose sums over the lanes are then made together.

#pragma once

#include "call.h"
#include "transpose.h"

extern "C" {

// Structure as in Call: of chunk j and output channel o, columns[i] counts from input j * chunk of the group, for i from
// rows[j * c_out + o] to rows[j * c_out + o + 1]; gradient[places[i]] is where its sum goes, the rest becomes 0.
// x and dy are both planes, or, by pixel, both (n * plane, channels).
struct GradCall {
  const float* x;
  const float* dy;
  const int16_t* columns;
  const int32_t* rows;
  const int32_t* places;
  float* gradient;
  int64_t n, c_in, c_out, plane, groups, chunk, by_pixel;
};

}  // extern "C"

namespace {

constexpr int kGradVectors = 8;  // of a line, at most; they and four sums fit the 16 registers of AVX2

typedef float quad __attribute__((vector_size(16)));
typedef float loose_quad __attribute__((vector_size(16), aligned(4), may_alias));

// --- sums over the lanes ---------------------------------------------------------------------------------------------

// Of a and b, both seen as quads (0 1 2 3): (a0 b0 a1 b1) + (a2 b2 a3 b3).
inline vec add_pairs(vec a, vec b) {
  ivec low, high;
  for (int j = 0; j < kLanes; ++j) {
    low[j] = j / 4 * 4 + j % 4 / 2 + j % 2 * kLanes;
    high[j] = low[j] + 2;
  }
  return shuffled(a, b, low) + shuffled(a, b, high);
}

// Of a and b, both seen as quads: (a0 a1 b0 b1) + (a2 a3 b2 b3).
inline vec add_halves(vec a, vec b) {
  ivec low, high;
  for (int j = 0; j < kLanes; ++j) {
    low[j] = j / 4 * 4 + j % 2 + j % 4 / 2 * kLanes;
    high[j] = low[j] + 2;
  }
  return shuffled(a, b, low) + shuffled(a, b, high);
}

// The sum of a vector's quads.
inline quad add_quads(vec v) {
  quad parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof(v));
  for (int step = kLanes / 8; step; step /= 2) {
    for (int j = 0; j < step; ++j) parts[j] += parts[j + step];
  }
  return parts[0];
}

inline float total(vec v) {
  const quad q = add_quads(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// --- packing ---------------------------------------------------------------------------------------------------------

// Neighbouring pixels of the batch, from image * plane + offset on.
struct Span {
  int64_t image, offset, length, vectors;
};

// Lines of `count` channels from `channel` on; what the last vector has too much becomes 0.
void pack_lines(const float* x, int64_t channels, int64_t plane, const Span& span, int64_t channel, int64_t count,
                float* to) {
  const int64_t pitch = span.vectors * kLanes;
  for (int64_t k = 0; k < count; ++k, to += pitch) {
    const float* from = x + (span.image * channels + channel + k) * plane;
    int64_t done = 0, offset = span.offset;
    for (; done < span.length; from += channels * plane, offset = 0) {
      const int64_t length = std::min(plane - offset, span.length - done);
      copy(to + done, from + offset, length);
      done += length;
    }
    for (; done < pitch; ++done) to[done] = 0.0f;
  }
}

// The same lines of images by pixel, from the span's first pixel on.
void pack_pixels(const float* x, int64_t channels, int64_t start, int64_t length, int64_t channel, int64_t count,
                 float* to, int64_t pitch) {
  transpose_part(x + start * channels + channel, channels, length, count, to, pitch);
  if (length == pitch) return;
  for (int64_t k = 0; k < count; ++k) std::fill(to + k * pitch + length, to + (k + 1) * pitch, 0.0f);
}

// --- multiplying -----------------------------------------------------------------------------------------------------

template <int kNumber>
void grad_rows(const GradCall& c, const int32_t* rows, int64_t begin, int64_t end, const float* panel,
               const float* lines, float* sums) {
  const char* start = reinterpret_cast<const char*>(__builtin_assume_aligned(panel, REVNETS_VECTOR));
  const auto line = [&](int32_t i) {
    return reinterpret_cast<const vec*>(start + c.columns[i] * static_cast<int64_t>(kNumber * sizeof(vec)));
  };
  for (int64_t o = begin; o < end; ++o, lines += kNumber * kLanes) {
    int32_t i = rows[o];
    const int32_t last = rows[o + 1];
    if (i == last) continue;
    vec d[kNumber];
    for (int j = 0; j < kNumber; ++j) d[j] = load(lines + j * kLanes);
    for (; i + 4 <= last; i += 4) {
      const vec *x0 = line(i), *x1 = line(i + 1), *x2 = line(i + 2), *x3 = line(i + 3);
      vec s0 = d[0] * x0[0], s1 = d[0] * x1[0], s2 = d[0] * x2[0], s3 = d[0] * x3[0];
      for (int j = 1; j < kNumber; ++j) {
        s0 += d[j] * x0[j];
        s1 += d[j] * x1[j];
        s2 += d[j] * x2[j];
        s3 += d[j] * x3[j];
      }
      loose_quad* sum = reinterpret_cast<loose_quad*>(sums + i);
      *sum += add_quads(add_halves(add_pairs(s0, s1), add_pairs(s2, s3)));
    }
    for (; i < last; ++i) {
      const vec* x0 = line(i);
      vec s0 = d[0] * x0[0], s1 = vec{};
      for (int j = 1; j < kNumber; ++j) {
        if (j % 2) s1 += d[j] * x0[j]; else s0 += d[j] * x0[j];
      }
      sums[i] += total(s0 + s1);
    }
  }
}

template <int kNumber>
void grad_rows_any(int64_t vectors, const GradCall& c, const int32_t* rows, int64_t begin, int64_t end,
                   const float* panel, const float* lines, float* sums) {
  if constexpr (kNumber > 1) {
    if (vectors < kNumber) return grad_rows_any<kNumber - 1>(vectors, c, rows, begin, end, panel, lines, sums);
  }
  grad_rows<kNumber>(c, rows, begin, end, panel, lines, sums);
}

// The sums of output channels `first` to `last` to their places among zeros: a row while it is in the first cache.
void scatter(const int32_t* rows, const int32_t* places, const float* sums, int64_t c_out, int64_t chunks, int64_t inputs,
             int64_t first, int64_t last, float* gradient) {
  for (int64_t o = first; o < last; ++o) {
    std::fill(gradient + o * inputs, gradient + (o + 1) * inputs, 0.0f);
    for (int64_t j = 0; j < chunks; ++j) {
      for (int32_t i = rows[j * c_out + o]; i < rows[j * c_out + o + 1]; ++i) gradient[places[i]] = sums[i];
    }
  }
}

// --- sharing out -----------------------------------------------------------------------------------------------------

// The member's output channels, in all pixels: what a sum is made of does not depend on the number of threads.
void run_weight_grad(const GradCall& c, const Member& member, float* sums) {
  const int64_t inputs = c.c_in / c.groups, outputs = c.c_out / c.groups, chunks = (inputs + c.chunk - 1) / c.chunk;
  const int64_t first = boundary(c.rows, c.c_out, chunks, 0, c.c_out, member.id, member.size);
  const int64_t last = boundary(c.rows, c.c_out, chunks, 0, c.c_out, member.id + 1, member.size);
  if (first == last) return;
  for (int64_t j = 0; j < chunks; ++j) {
    const int32_t* rows = c.rows + j * c.c_out;
    std::fill(sums + rows[first], sums + rows[last], 0.0f);
  }
  const int64_t pixels = c.n * c.plane, vectors = (pixels + kLanes - 1) / kLanes;
  const int64_t blocks = (vectors + kGradVectors - 1) / kGradVectors, pitch = kGradVectors * kLanes;
  float* panel = scratch((std::min(c.chunk, inputs) + outputs) * pitch);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t from = vectors * b / blocks, to = vectors * (b + 1) / blocks, start = from * kLanes;
    const Span span = {start / c.plane, start % c.plane, std::min(to * kLanes, pixels) - start, to - from};
    const auto packed = [&](const float* x, int64_t channels, int64_t channel, int64_t count, float* to) {
      if (!c.by_pixel) return pack_lines(x, channels, c.plane, span, channel, count, to);
      pack_pixels(x, channels, start, span.length, channel, count, to, span.vectors * kLanes);
    };
    for (int64_t g = first / outputs; g * outputs < last; ++g) {
      const int64_t begin = std::max(first, g * outputs), end = std::min(last, (g + 1) * outputs);
      float* lines = panel + std::min(c.chunk, inputs) * pitch;
      packed(c.dy, c.c_out, begin, end - begin, lines);
      for (int64_t j = 0; j < chunks; ++j) {
        const int64_t channel = j * c.chunk, count = std::min(c.chunk, inputs - channel);
        packed(c.x, c.c_in, g * inputs + channel, count, panel);
        grad_rows_any<kGradVectors>(span.vectors, c, c.rows + j * c.c_out, begin, end, panel, lines, sums);
      }
    }
  }
  scatter(c.rows, c.places, sums, c.c_out, chunks, inputs, first, last, c.gradient);
}

}  // namespace
