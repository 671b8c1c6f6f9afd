// What stands between convolutions of bytes: means, sums, tables, gates, max pools; floats to bytes and back.

#pragma once

#include "bytes.h"

namespace {

// The mean of each plane; scale[0] is that of the sum of pixels.
void run_byte_mean(const Call& c, const Member& member) {
  const int64_t blocks = c.n * c.c_in / 4, pixels = c.h * c.w;
  for (int64_t task = member.begin(blocks); task < member.end(blocks); ++task) {
    const uint8_t* x = bytes_of(c.x) + 4 * task * pixels;
    int32_t sums[16] = {};
    int64_t k = 0;
    for (; k + 4 <= pixels; k += 4)
      for (int i = 0; i < 16; ++i) sums[i] += x[4 * k + i];
    for (; k < pixels; ++k)
      for (int i = 0; i < 4; ++i) sums[i] += x[4 * k + i];
    for (int i = 0; i < 4; ++i) {
      const int64_t sum = sums[i] + sums[i + 4] + sums[i + 8] + sums[i + 12] - c.zero_in * pixels;
      bytes_of(c.y)[4 * task + i] = byte_of(c, rounded_product(static_cast<float>(sum), c.scale));
    }
  }
}

// (x - zero_in) * scale, with a residual the sum of both.
void run_byte_map(const Call& c, const Member& member) {
  const int64_t all = c.n * c.c_in * c.h * c.w;
  const uint8_t *x = bytes_of(c.x), *residual = bytes_of(c.residual);
  for (int64_t k = member.begin(all); k < member.end(all); ++k) {
    float t = rounded_product(static_cast<float>(x[k] - c.zero_in), c.scale);
    if (residual) t += rounded_product(static_cast<float>(residual[k] - c.zero_residual), c.residual_scale);
    bytes_of(c.y)[k] = byte_of(c, t);
  }
}

// Each plane times its gate, (N, C / 4, 1, 1, 4) in `residual`: the product of both, less their zero points, times scale.
void run_byte_scale(const Call& c, const Member& member) {
  const int64_t blocks = c.n * c.c_in / 4, pixels = c.h * c.w;
  for (int64_t task = member.begin(blocks); task < member.end(blocks); ++task) {
    int32_t gates[4];
    for (int i = 0; i < 4; ++i) gates[i] = bytes_of(c.residual)[4 * task + i] - static_cast<int32_t>(c.zero_residual);
    for (int64_t k = 4 * task * pixels; k < 4 * (task + 1) * pixels; ++k) {
      const int32_t x = bytes_of(c.x)[k] - static_cast<int32_t>(c.zero_in);
      bytes_of(c.y)[k] = byte_of(c, rounded_product(static_cast<float>(x * gates[k % 4]), c.scale));
    }
  }
}

// The largest pixel under a window; the zero points of both sides are one.
void run_byte_max_pool(const Call& c, const Member& member) {
  const int64_t blocks = c.n * c.c_in / 4, line = 4 * c.w;
  uint8_t* column = byte_scratch(line);
  for (int64_t task = member.begin(blocks); task < member.end(blocks); ++task) {
    const uint8_t* x = bytes_of(c.x) + task * c.h * line;
    uint8_t* y = bytes_of(c.y) + 4 * task * c.h_out * c.w_out;
    for (int64_t row = 0; row < c.h_out; ++row) {
      const int64_t top = row * c.stride_h - c.pad_h;
      std::memset(column, 0, line);
      for (int64_t i = std::max<int64_t>(0, top); i < std::min(c.h, top + c.kh); ++i) {
        const uint8_t* from = x + i * line;
        for (int64_t k = 0; k < line; ++k) column[k] = std::max(column[k], from[k]);
      }
      for (int64_t k = 0; k < c.w_out; ++k, y += 4) {
        const int64_t left = k * c.stride_w - c.pad_w;
        uint8_t best[4] = {};
        for (int64_t i = std::max<int64_t>(0, left); i < std::min(c.w, left + c.kw); ++i)
          for (int j = 0; j < 4; ++j) best[j] = std::max(best[j], column[4 * i + j]);
        std::memcpy(y, best, 4);
      }
    }
  }
}

// Floats (N, count, H, W) to bytes: round(x * scale) + zero_out.
void run_to_bytes(const Call& c, const Member& member) {
  const int64_t blocks = c.c_out / 4, pixels = c.h * c.w;
  for (int64_t task = member.begin(c.n * blocks); task < member.end(c.n * blocks); ++task) {
    uint8_t* y = bytes_of(c.y) + 4 * task * pixels;
    const int64_t first = 4 * (task % blocks), channels = std::min<int64_t>(4, c.count - first);
    const float* x = c.x + (task / blocks * c.count + first) * pixels;
    int64_t k = 0;
#if defined(REVNETS_BYTE_VECTOR)
    const ToBytes to_bytes(c);
    const Reals scale = REVNETS_OF(set1_ps)(c.scale), least = REVNETS_OF(set1_ps)(-512.0f), most = REVNETS_OF(set1_ps)(512.0f);
    for (; k < pixels; k += kPixels) {
      const Lanes lanes = first_lanes(pixels - k);
      Bytes q[4] = {};
      for (int64_t i = 0; i < channels; ++i) {
        const Reals t = product(reals_of(load_lanes(x + i * pixels + k, lanes)), scale);
        // the second operand comes out where the first is no number
        q[i] = REVNETS_OF(cvtps_epi32)(REVNETS_OF(min_ps)(REVNETS_OF(max_ps)(t, least), most));
      }
      const Bytes bytes = to_bytes(REVNETS_OF(packs_epi32)(q[0], q[1]), REVNETS_OF(packs_epi32)(q[2], q[3]));
      store_lanes(y + 4 * k, transposed_fours(bytes), lanes);
    }
#endif
    for (; k < pixels; ++k)
      for (int64_t i = 0; i < 4; ++i)
        y[4 * k + i] = byte_of(c, i < channels ? rounded_product(x[i * pixels + k], c.scale) : 0.0f);
  }
}

// Bytes to floats (N, count, H, W): (x - zero_in) * scale.
void run_from_bytes(const Call& c, const Member& member) {
  const int64_t pixels = c.h * c.w;
  for (int64_t task = member.begin(c.n * c.count); task < member.end(c.n * c.count); ++task) {
    const int64_t image = task / c.count, channel = task % c.count;
    const uint8_t* x = bytes_of(c.x) + 4 * (image * (c.c_in / 4) + channel / 4) * pixels + channel % 4;
    float* y = c.y + task * pixels;
    for (int64_t k = 0; k < pixels; ++k) y[k] = static_cast<float>(x[4 * k] - c.zero_in) * c.scale;
  }
}

}  // namespace
