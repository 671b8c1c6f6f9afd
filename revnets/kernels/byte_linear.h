// Linear layers of bytes, on images of one pixel: outputs are the lanes of vectors, weights are dense.
//
// Weights: (C_out / 16, C_in / 4, 16 outputs, 4 inputs) int8. A vector of them serves several images. Without VNNI they are
// widened to 16 bits, and an output's two sums of pairs are added at the end.

#pragma once

#include "bytes.h"

namespace {

inline void finish_linear(const Call& c, int64_t image, int64_t o, int32_t sum) {
  const int64_t at = image * c.c_out + o;
  float t = rounded_product(static_cast<float>(sum), c.scales[o]);
  if (c.residual) t += rounded_product(static_cast<float>(bytes_of(c.residual)[at] - c.zero_residual), c.residual_scale);
  if (!c.to_float) bytes_of(c.y)[at] = byte_of(c, t);
  else if (o < c.count) c.y[image * c.count + o] = t;
}

#if defined(REVNETS_VNNI)
constexpr int kLinearImages = 4, kLinearBlocks = 4;
#elif REVNETS_BYTE_VECTOR == 64
constexpr int kLinearImages = 4, kLinearBlocks = 2;
#else
constexpr int kLinearImages = 2, kLinearBlocks = 1;
#endif

// The sums of 16 outputs from `block` * 16 on, of kImages images, of kBlocks such blocks.
template <int kImages, int kBlocks>
void linear_sums(const Call& c, int64_t image, int64_t block) {
  const int64_t inputs = c.c_in / 4;
  const int8_t* weights = reinterpret_cast<const int8_t*>(c.values) + 64 * block * inputs;
  const uint8_t* x = bytes_of(c.x) + image * c.c_in;
  alignas(64) int32_t sums[kImages][kBlocks][16];
#if defined(REVNETS_VNNI)
  __m512i sum[kImages][kBlocks];
  for (int i = 0; i < kImages; ++i)
    for (int b = 0; b < kBlocks; ++b) sum[i][b] = _mm512_loadu_si512(reinterpret_cast<const int32_t*>(c.bias) + 16 * (block + b));
  for (int64_t k = 0; k < inputs; ++k) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const __m512i some = _mm512_loadu_si512(weights + 64 * (b * inputs + k));
#pragma GCC unroll 4
      for (int i = 0; i < kImages; ++i) {
        int32_t four;
        std::memcpy(&four, x + i * c.c_in + 4 * k, 4);
        sum[i][b] = _mm512_dpbusd_epi32(sum[i][b], _mm512_set1_epi32(four), some);
      }
    }
  }
  for (int i = 0; i < kImages; ++i)
    for (int b = 0; b < kBlocks; ++b) _mm512_store_si512(sums[i][b], sum[i][b]);
#elif defined(REVNETS_BYTE_VECTOR)
  constexpr int kParts = 128 / kBytes;  // vectors of 16 outputs, two sums each
  Bytes sum[kImages][kBlocks][kParts];
  for (int i = 0; i < kImages; ++i)
    for (int b = 0; b < kBlocks; ++b)
      for (int p = 0; p < kParts; ++p) sum[i][b][p] = REVNETS_OF(set1_epi32)(0);
  for (int64_t k = 0; k < inputs; ++k) {
    Bytes four[kImages];
#pragma GCC unroll 4
    for (int i = 0; i < kImages; ++i) {
      int32_t some;
      std::memcpy(&some, x + i * c.c_in + 4 * k, 4);
      four[i] = repeated(_mm_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(some))));
    }
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        const Bytes wide = widened(weights + 64 * (b * inputs + k) + kBytes / 2 * p);
#pragma GCC unroll 4
        for (int i = 0; i < kImages; ++i)
          sum[i][b][p] = REVNETS_OF(add_epi32)(sum[i][b][p], REVNETS_OF(madd_epi16)(four[i], wide));
      }
  }
  for (int i = 0; i < kImages; ++i)
    for (int b = 0; b < kBlocks; ++b) {
      alignas(64) int32_t halves[32];
      for (int p = 0; p < kParts; ++p) store_bytes(halves + kPixels * p, sum[i][b][p]);
      for (int o = 0; o < 16; ++o)
        sums[i][b][o] = reinterpret_cast<const int32_t*>(c.bias)[16 * (block + b) + o] + halves[2 * o] + halves[2 * o + 1];
    }
#else
  for (int i = 0; i < kImages; ++i)
    for (int b = 0; b < kBlocks; ++b) {
      int32_t* sum = sums[i][b];
      std::memcpy(sum, reinterpret_cast<const int32_t*>(c.bias) + 16 * (block + b), 64);
      for (int64_t k = 0; k < inputs; ++k) {
        const int8_t* some = weights + 64 * (b * inputs + k);
        for (int o = 0; o < 16; ++o)
          for (int t = 0; t < 4; ++t) sum[o] += some[4 * o + t] * x[i * c.c_in + 4 * k + t];
      }
    }
#endif
  for (int i = 0; i < kImages; ++i)
    for (int64_t o = 0; o < 16 * kBlocks && 16 * block + o < c.c_out; ++o)
      finish_linear(c, image + i, 16 * block + o, sums[i][o / 16][o % 16]);
}

void run_byte_linear(const Call& c, const Member& member) {
  int64_t block = member.begin((c.c_out + 15) / 16);
  const int64_t end = member.end((c.c_out + 15) / 16);
  constexpr int kI = kLinearImages, kB = kLinearBlocks;
  while (block < end) {
    const bool many = block + kB <= end;
    int64_t image = 0;
    for (; many && image + kI <= c.n; image += kI) linear_sums<kI, kB>(c, image, block);
    for (; image < c.n; ++image) many ? linear_sums<1, kB>(c, image, block) : linear_sums<1, 1>(c, image, block);
    block += many ? kB : 1;
  }
}

}  // namespace
