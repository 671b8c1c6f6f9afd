// Depthwise convolutions of bytes, dense weights: each channel's taps of a line are multiplied four at a time.
//
// An image of four channels is copied into a frame of its zero point. A vector of the frame is arranged so that of some
// pixels of the output each channel has four taps side by side (without VNNI twice two, in 16 bits), which are multiplied
// and added at once; a line so arranged serves all rows of the output that it is near to.
//
// Weights: (C / 4, kh, ceil(kw / 4), 4 channels, 4 taps) int8, zeros behind the last tap.

#pragma once

#include "bytes.h"

namespace {

// Four channels of an image in a frame, and where they go.
struct ByteFrame {
  const uint8_t* pixels;
  int64_t pitch;  // of a line, in pixels
  const int8_t* weights;
  const int32_t* bias;
  const float* scales;
  int64_t y;  // of the output's first pixel, in bytes
};

inline void finish_byte(const Call& c, int64_t at, int32_t sum, float scale) {
  float t = rounded_product(static_cast<float>(sum), scale);
  if (c.residual) t += rounded_product(static_cast<float>(bytes_of(c.residual)[at] - c.zero_residual), c.residual_scale);
  bytes_of(c.y)[at] = byte_of(c, t);
}

// Any kernel, a row of the output.
void byte_depthwise_row(const Call& c, const ByteFrame& frame, int64_t row, int32_t* sums) {
  const int64_t groups = (c.kw + 3) / 4, width = 4 * c.w_out;
  for (int64_t k = 0; k < width; ++k) sums[k] = frame.bias[k % 4];
  for (int64_t a = 0; a < c.kh; ++a) {
    const uint8_t* line = frame.pixels + 4 * (row * c.stride_h + a * c.dil_h) * frame.pitch;
    for (int64_t b = 0; b < c.kw; ++b) {
      const int8_t* weights = frame.weights + 16 * (a * groups + b / 4) + b % 4;
      const int32_t w[4] = {weights[0], weights[4], weights[8], weights[12]};
      const uint8_t* from = line + 4 * b * c.dil_w;
      for (int64_t k = 0; k < c.w_out; ++k)
        for (int64_t i = 0; i < 4; ++i) sums[4 * k + i] += w[i] * from[4 * k * c.stride_w + i];
    }
  }
  for (int64_t k = 0; k < width; ++k) finish_byte(c, frame.y + 4 * row * c.w_out + k, sums[k], frame.scales[k % 4]);
}

#if defined(REVNETS_BYTE_VECTOR)

// What the taps of a line are multiplied by, and how: of kPixels / 4 pixels of the output, four sums each.
#if defined(REVNETS_VNNI)
struct Arranged {
  Bytes all;  // four taps of each channel
  explicit Arranged(Bytes v) : all(transposed_fours(v)) {}
};
struct ByteTaps {
  const int8_t* weights;
  ByteTaps(const int8_t* some, int64_t) : weights(some) {}
  inline Bytes add(Bytes sum, const Arranged& x, int64_t line) const {
    const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights) + line);
    return REVNETS_OF(dpbusd_epi32)(sum, x.all, repeated(four));
  }
};
#else
struct Arranged {
  Bytes first, last;  // two taps of each channel, in 16 bits
  explicit Arranged(Bytes v) {
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    const Bytes pairs = REVNETS_OF(shuffle_epi8)(v, repeated(order)), zero = REVNETS_OF(set1_epi8)(0);
    first = REVNETS_OF(unpacklo_epi8)(pairs, zero);
    last = REVNETS_OF(unpackhi_epi8)(pairs, zero);
  }
};
struct ByteTaps {
  static constexpr int64_t kMost = 10;  // lines of four taps
  __m128i pairs[2 * kMost];
  ByteTaps(const int8_t* weights, int64_t lines) {
    for (int64_t i = 0; i < lines; ++i)
      for (int part = 0; part < 2; ++part) {
        int16_t some[8];
        for (int k = 0; k < 8; ++k) some[k] = weights[16 * i + k / 2 * 4 + 2 * part + k % 2];
        std::memcpy(pairs + 2 * i + part, some, 16);
      }
  }
  inline Bytes add(Bytes sum, const Arranged& x, int64_t line) const {
    sum = REVNETS_OF(add_epi32)(sum, REVNETS_OF(madd_epi16)(x.first, repeated(pairs[2 * line])));
    return REVNETS_OF(add_epi32)(sum, REVNETS_OF(madd_epi16)(x.last, repeated(pairs[2 * line + 1])));
  }
};
#endif

// How a vector of the frame becomes one with four pixels for each of the output's, and the sums' bytes pixels again.
struct Arrangement {
  Bytes pixels, back;
  explicit Arrangement(const Call& c) {
    alignas(64) int32_t index[kPixels];
    for (int k = 0; k < kPixels; ++k) index[k] = static_cast<int32_t>(k / 4 * c.stride_w + k % 4 * c.dil_w);
    pixels = load_bytes(index);
    constexpr int kEach = kPixels / 4;
    for (int k = 0; k < kPixels; ++k) index[k] = k % kEach * 4 + k / kEach;
    back = load_bytes(index);
  }
  static bool fits(const Call& c) { return (kPixels / 4 - 1) * c.stride_w + 3 * c.dil_w < kPixels && c.dil_h == 1; }
  Arranged operator()(const uint8_t* p) const { return Arranged(permuted(load_any(p), pixels)); }
};

// kPixels pixels of kRows rows of the output.
template <int kHeight, int kGroups, int kStride, int kRows>
inline void byte_depthwise_pixels(const Call& c, const ByteFrame& frame, const Arrangement& arranged, const ByteTaps& taps,
                                  const ToBytes& to_bytes, int64_t row, int64_t column) {
  constexpr int kAtOnce = REVNETS_BYTE_VECTOR == 64 ? 4 : 1;  // vectors of a row: AVX2 has few registers
  const Bytes bias = repeated(_mm_loadu_si128(reinterpret_cast<const __m128i*>(frame.bias)));
  Bytes sums[kRows][4];
#pragma GCC unroll 4
  for (int first = 0; first < 4; first += kAtOnce) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      for (int j = first; j < first + kAtOnce; ++j) sums[r][j] = bias;
#pragma GCC unroll 16
    for (int m = 0; m < (kRows - 1) * kStride + kHeight; ++m) {
      const uint8_t* line = frame.pixels + 4 * ((row * kStride + m) * frame.pitch + column * c.stride_w);
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 4
        for (int j = first; j < first + kAtOnce; ++j) {
          const Arranged pixels = arranged(line + kPixels * j * c.stride_w + 16 * g * c.dil_w);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const int tap = m - r * kStride;
            if (tap >= 0 && tap < kHeight) sums[r][j] = taps.add(sums[r][j], pixels, tap * kGroups + g);
          }
        }
      }
    }
  }
  const Reals scale = repeated_reals(frame.scales);
  const Lanes lanes = first_lanes(c.w_out - column);
  for (int r = 0; r < kRows; ++r) {
    const int64_t at = frame.y + 4 * ((row + r) * c.w_out + column);
    alignas(64) uint8_t residual[kBytes + 16];
    if (c.residual) store_bytes(residual, load_lanes(bytes_of(c.residual) + at, lanes));
    Bytes q[4];
    for (int j = 0; j < 4; ++j) {
      Reals t = product(REVNETS_OF(cvtepi32_ps)(sums[r][j]), scale);
      if (c.residual) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(residual + kPixels * j));
        const Bytes zero = REVNETS_OF(set1_epi32)(static_cast<int>(c.zero_residual));
        const Reals x = REVNETS_OF(cvtepi32_ps)(REVNETS_OF(sub_epi32)(REVNETS_OF(cvtepu8_epi32)(bytes), zero));
        t = REVNETS_OF(add_ps)(t, product(x, REVNETS_OF(set1_ps)(c.residual_scale)));
      }
      q[j] = REVNETS_OF(cvtps_epi32)(t);
    }
    const Bytes all = to_bytes(REVNETS_OF(packs_epi32)(q[0], q[1]), REVNETS_OF(packs_epi32)(q[2], q[3]));
    store_lanes(bytes_of(c.y) + at, permuted(all, arranged.back), lanes);
  }
}

template <int kHeight, int kGroups, int kStride>
void byte_depthwise_rows(const Call& c, const ByteFrame& frame) {
  const Arrangement arranged(c);
  const ByteTaps taps(frame.weights, kHeight * kGroups);
  const ToBytes to_bytes(c);
  int64_t row = 0;
  for (; row + 4 <= c.h_out; row += 4)
    for (int64_t k = 0; k < c.w_out; k += kPixels)
      byte_depthwise_pixels<kHeight, kGroups, kStride, 4>(c, frame, arranged, taps, to_bytes, row, k);
  for (; row < c.h_out; ++row)
    for (int64_t k = 0; k < c.w_out; k += kPixels)
      byte_depthwise_pixels<kHeight, kGroups, kStride, 1>(c, frame, arranged, taps, to_bytes, row, k);
}

// Whether these have loops of their own.
bool byte_depthwise_fast(const Call& c, const ByteFrame& frame) {
  if (!Arrangement::fits(c) || c.kh != c.kw || c.stride_h > 2) return false;
  switch (c.kh * 10 + c.stride_h) {
    case 31: return byte_depthwise_rows<3, 1, 1>(c, frame), true;
    case 32: return byte_depthwise_rows<3, 1, 2>(c, frame), true;
    case 51: return byte_depthwise_rows<5, 2, 1>(c, frame), true;
    case 52: return byte_depthwise_rows<5, 2, 2>(c, frame), true;
    default: return false;
  }
}

#else
bool byte_depthwise_fast(const Call&, const ByteFrame&) { return false; }
#endif

void run_byte_depthwise(const Call& c, const Member& member) {
  const int64_t lines = std::max((c.h_out - 1) * c.stride_h + (c.kh - 1) * c.dil_h + 1, c.h + c.pad_h);
  const int64_t reach = (round_up(c.w_out, 16) + 4) * c.stride_w + (c.kw + 4) * c.dil_w + 16;  // of a vector's last pixel
  const int64_t pitch = round_up(std::max(reach, c.w + c.pad_w), 16), size = 4 * lines * pitch;
  uint8_t* pixels = byte_scratch(size + 16 * c.w_out);
  std::memset(pixels, static_cast<int>(c.zero_in), size);
  const int64_t blocks = c.c_in / 4, weights = 16 * c.kh * ((c.kw + 3) / 4);
  for (int64_t task = member.begin(c.n * blocks); task < member.end(c.n * blocks); ++task) {
    const int64_t block = task % blocks;
    const uint8_t* x = bytes_of(c.x) + 4 * task * c.h * c.w;
    for (int64_t line = 0; line < c.h; ++line)
      std::memcpy(pixels + 4 * ((line + c.pad_h) * pitch + c.pad_w), x + 4 * line * c.w, 4 * c.w);
    const ByteFrame frame = {pixels,
                             pitch,
                             reinterpret_cast<const int8_t*>(c.values) + block * weights,
                             reinterpret_cast<const int32_t*>(c.bias) + 4 * block,
                             c.scales + 4 * block,
                             4 * task * c.h_out * c.w_out};
    if (byte_depthwise_fast(c, frame)) continue;
    for (int64_t row = 0; row < c.h_out; ++row) byte_depthwise_row(c, frame, row, reinterpret_cast<int32_t*>(pixels + size));
  }
}

}  // namespace
