// Layers of uint8 pixels with a zero point: their memory order, sums of products, how sums become bytes again.
//
// Four channels of a pixel are neighbours: (N, C / 4, H, W, 4), channels that are missing have weights of 0. So a vector
// holds four channels of 16 pixels, and one instruction (vpdpbusd) multiplies it by a broadcast block of four int8
// weights and adds the four products of each pixel to its int32 sum, exactly. Zero points of inputs are in the bias.
//
// An int32 sum becomes a byte so, in float32, every operation rounded to nearest, ties to even:
//   t = float(sum) * scale[channel], and with a residual t = t + float(r - zero_residual) * residual_scale
//   q = min(max(round(t) + zero_out, low), high), with a table q = table[q]
// That and no more is what every path computes. |t| is below 2^30, which those who make calls see to.

#pragma once

#include "call.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define REVNETS_VNNI
#define REVNETS_BYTE_TARGET "AVX-512 VNNI"
#elif defined(__AVX2__)
#define REVNETS_BYTE_TARGET "AVX2"
#else
#define REVNETS_BYTE_TARGET "portable"
#endif

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

// --- sums of four channels of some pixels ----------------------------------------------------------------------------

#if defined(REVNETS_VNNI)
constexpr int kPixels = 16;
struct Sum {
  __m512i v;
};
typedef __m512i Weights;
inline Weights weights_of(int32_t four) { return _mm512_set1_epi32(four); }
inline Sum sum_of(int32_t bias) { return {_mm512_set1_epi32(bias)}; }
inline void add(Sum& sum, const uint8_t* pixels, const Weights& weights) {
  sum.v = _mm512_dpbusd_epi32(sum.v, _mm512_load_si512(pixels), weights);
}
#elif defined(__AVX2__)
// vpmaddubsw would saturate: 16 bits are multiplied, and the two halves of a pixel's sum added at the end.
constexpr int kPixels = 8;
struct Sum {
  __m256i low, high;
};
typedef __m256i Weights;
inline Weights weights_of(int32_t four) { return _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four))); }
inline Sum sum_of(int32_t bias) {
  const __m256i start = _mm256_set1_epi64x(static_cast<int64_t>(static_cast<uint32_t>(bias)));
  return {start, start};
}
inline void add(Sum& sum, const uint8_t* pixels, const Weights& weights) {
  const __m128i* from = reinterpret_cast<const __m128i*>(pixels);
  sum.low = _mm256_add_epi32(sum.low, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_load_si128(from)), weights));
  sum.high = _mm256_add_epi32(sum.high, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_load_si128(from + 1)), weights));
}
inline void totals(const Sum& sum, int32_t* to) {
  const __m256i pairs = _mm256_hadd_epi32(sum.low, sum.high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(pairs, 0xD8));
}
#else
constexpr int kPixels = 4;
struct Sum {
  int32_t v[kPixels];
};
struct Weights {
  int8_t v[4];
};
inline Weights weights_of(int32_t four) {
  Weights weights;
  std::memcpy(weights.v, &four, 4);
  return weights;
}
inline Sum sum_of(int32_t bias) { return {{bias, bias, bias, bias}}; }
inline void add(Sum& sum, const uint8_t* pixels, const Weights& weights) {
  for (int p = 0; p < kPixels; ++p)
    for (int k = 0; k < 4; ++k) sum.v[p] += pixels[4 * p + k] * weights.v[k];
}
inline void totals(const Sum& sum, int32_t* to) { std::memcpy(to, sum.v, sizeof(sum.v)); }
#endif

constexpr int kBytes = 4 * kPixels;  // of a vector

// --- vectors of sums -------------------------------------------------------------------------------------------------

#if defined(REVNETS_VNNI)

inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1); }

// Bytes by the table.
inline __m512i looked_up(const uint8_t* table, __m512i bytes) {
#if defined(__AVX512VBMI__)
  const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), bytes, _mm512_loadu_si512(table + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), bytes, _mm512_loadu_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(bytes), low, high);
#else
  alignas(64) uint8_t some[64];
  _mm512_store_si512(some, bytes);
  for (uint8_t& one : some) one = table[one];
  return _mm512_load_si512(some);
#endif
}

// What four int32 vectors, scaled and rounded, become.
struct ToBytes {
  __m512i zero, low, high;
  const uint8_t* table;
  explicit ToBytes(const Call& c)
      : zero(_mm512_set1_epi16(static_cast<int16_t>(c.zero_out))),
        low(_mm512_set1_epi8(static_cast<char>(c.low))),
        high(_mm512_set1_epi8(static_cast<char>(c.high))),
        table(c.table) {}
  // of pairs that _mm512_packs_epi32 has made
  __m512i operator()(__m512i first, __m512i second) const {
    __m512i q = _mm512_packus_epi16(_mm512_adds_epi16(first, zero), _mm512_adds_epi16(second, zero));
    q = _mm512_min_epu8(_mm512_max_epu8(q, low), high);
    return table ? looked_up(table, q) : q;
  }
};

inline __m512 product(__m512 a, __m512 b) {
  __m512 found = _mm512_mul_ps(a, b);
  asm("" : "+v"(found));  // not fused with a sum
  return found;
}

#endif

}  // namespace
