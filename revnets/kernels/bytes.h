// Layers of uint8 pixels with a zero point: their memory order, sums of products, how sums become bytes again.
//
// Four channels of a pixel are neighbours: (N, C / 4, H, W, 4), channels that are missing have weights of 0. So a vector
// holds four channels of 16 pixels, and one instruction (vpdpbusd) multiplies it by a broadcast block of four int8
// weights and adds the four products of each pixel to its int32 sum, exactly. Without VNNI blocks go by twos, see
// add_pair. Zero points of inputs are in the bias.
//
// An int32 sum becomes a byte so, in float32, every operation rounded to nearest, ties to even:
//   t = float(sum) * scale[channel], and with a residual t = t + float(r - zero_residual) * residual_scale
//   q = min(max(round(t) + zero_out, low), high), with a table q = table[q]
// That and no more is what every path computes. |t| is below 2^30, which those who make calls see to.

#pragma once

#include "byte_vectors.h"

namespace {

inline const uint8_t* bytes_of(const float* p) { return reinterpret_cast<const uint8_t*>(p); }
inline uint8_t* bytes_of(float* p) { return reinterpret_cast<uint8_t*>(p); }
// Of the thread, see scratch; with room for a vector more.
inline uint8_t* byte_scratch(int64_t size) { return bytes_of(scratch((size + 3) / 4 + 64)); }

// --- a number at a time ----------------------------------------------------------------------------------------------

// Keeps a product from being fused with the sum that it goes into.
inline float rounded_product(float a, float b) {
  float product = a * b;
#if defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

// To the nearest whole number, ties to even; beyond 512, and what is no number, as far as a byte can tell.
inline int32_t nearest(float t) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: above it floats are whole numbers
  t = t > -512.0f ? t : -512.0f;
  t = t < 512.0f ? t : 512.0f;
  return static_cast<int32_t>((t + kShift) - kShift);
}

inline uint8_t byte_of(const Call& c, float t) {
  const int64_t q = std::min(std::max<int64_t>(nearest(t) + c.zero_out, c.low), c.high);
  return c.table ? c.table[q] : static_cast<uint8_t>(q);
}

// --- sums of blocks --------------------------------------------------------------------------------------------------

// Of some vectors of pixels: `add_row` adds the blocks of an output channel, from `begin` to `end`.
struct PanelBlocks {
  const uint8_t* panel;
  int64_t pitch;  // of its lines, in bytes
  const int16_t* columns;
  const int32_t* weights;
  const uint8_t* line(int32_t i) const { return panel + columns[i] * pitch; }
};

#if defined(REVNETS_BYTE_VECTOR)
#define REVNETS_UNROLLED _Pragma("GCC unroll 8")
struct Sum {
  Bytes v;
};
inline Sum sum_of(int32_t bias) { return {REVNETS_OF(set1_epi32)(bias)}; }
#else
struct Sum {
  int32_t v[kPixels];
};
inline Sum sum_of(int32_t bias) { return {{bias, bias, bias, bias}}; }
#define REVNETS_UNROLLED
#endif

#if defined(REVNETS_BYTE_VECTOR) && !defined(REVNETS_VNNI)
#define REVNETS_BYTE_PAIRS
// vpmaddubsw multiplies bytes and adds two neighbours in 16 bits, where it would saturate: byte_pairs.py has seen to it
// that it does not, whatever the pixels. Two blocks that fit together are widened once.
template <int kNumber>
inline void add_pair(Sum* sum, const PanelBlocks& blocks, int32_t i) {
  const uint8_t *first = blocks.line(i), *second = blocks.line(i + 1);
  const Bytes four = REVNETS_OF(set1_epi32)(blocks.weights[i]), other = REVNETS_OF(set1_epi32)(blocks.weights[i + 1]);
  const Bytes ones = REVNETS_OF(set1_epi16)(1);
  REVNETS_UNROLLED
  for (int j = 0; j < kNumber; ++j) {
    const Bytes a = REVNETS_OF(maddubs_epi16)(load_bytes(first + j * kBytes), four);
    const Bytes b = REVNETS_OF(maddubs_epi16)(load_bytes(second + j * kBytes), other);
    sum[j].v = REVNETS_OF(add_epi32)(sum[j].v, REVNETS_OF(madd_epi16)(REVNETS_OF(add_epi16)(a, b), ones));
  }
}
// A block alone, some of whose pixels are turned: 255 less themselves.
template <int kNumber>
inline void add_one(Sum* sum, const PanelBlocks& blocks, int32_t i) {
  const uint8_t* from = blocks.line(i);
  const Bytes four = REVNETS_OF(set1_epi32)(blocks.weights[i]), turned = REVNETS_OF(set1_epi32)(blocks.weights[i + 1]);
  const Bytes ones = REVNETS_OF(set1_epi16)(1);
  REVNETS_UNROLLED
  for (int j = 0; j < kNumber; ++j) {
    const Bytes a = REVNETS_OF(maddubs_epi16)(different(load_bytes(from + j * kBytes), turned), four);
    sum[j].v = REVNETS_OF(add_epi32)(sum[j].v, REVNETS_OF(madd_epi16)(a, ones));
  }
}
template <int kNumber>
inline void add_row(Sum* sum, const PanelBlocks& blocks, int32_t begin, int32_t alone, int32_t end) {
  for (int32_t i = begin; i < alone; i += 2) add_pair<kNumber>(sum, blocks, i);
  for (int32_t i = alone; i < end; i += 2) add_one<kNumber>(sum, blocks, i);
}
#else
template <int kNumber>
inline void add_row(Sum* sum, const PanelBlocks& blocks, int32_t begin, int32_t end) {
  for (int32_t i = begin; i < end; ++i) {
    const uint8_t* from = blocks.line(i);
#if defined(REVNETS_VNNI)
    const Bytes four = _mm512_set1_epi32(blocks.weights[i]);
    REVNETS_UNROLLED
    for (int j = 0; j < kNumber; ++j) sum[j].v = _mm512_dpbusd_epi32(sum[j].v, load_bytes(from + j * kBytes), four);
#else
    int8_t four[4];
    std::memcpy(four, blocks.weights + i, 4);
    for (int j = 0; j < kNumber * kPixels; ++j)
      for (int k = 0; k < 4; ++k) sum[j / kPixels].v[j % kPixels] += from[4 * j + k] * four[k];
#endif
  }
}
#endif

}  // namespace
