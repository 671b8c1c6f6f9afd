// What norms.h is made of in either layout: the call, activations with their derivatives, a norm's numbers per channel.

#pragma once

#include <cmath>
#include <type_traits>

#include "weight_grad.h"

extern "C" {

// What is asked for, in this order: mean and variance; means of the value over an image's pixels, or sums of its products
// with dy where there is one; the value; gradients of weight and bias; gradient of x, from those.
enum NormWork { kStatistics = 1, kPlaneSums = 2, kNormed = 4, kAffineSums = 8, kNormGrad = 16 };

// act(x * scale + shift) * gates, scale and shift being those of the norm.
struct NormCall {
  const float* x;
  const float* dy;      // of what is computed; a gradient of x may take its place
  const float* weight;  // of the norm, per channel
  const float* bias;
  const float* gates;   // (n, channels), may be null
  const float* more;    // likewise: of gradients, added to gates * dy
  float* mean;          // per channel, and the biased variance: results of the statistics
  float* var;
  float* of_weight;     // gradients, per channel
  float* of_bias;
  float* planes;        // (n, channels): means or sums
  float* y;             // a map
  int64_t n, channels, plane, by_pixel, activation;
  float eps;
};

}  // extern "C"

namespace {

constexpr int kRows = 4;              // pixels at a time
constexpr int64_t kAhead = 1024;      // floats
constexpr int64_t kNear = 128;        // of which sums are floats
constexpr int64_t kNearPlane = 2048;  // likewise where pixels are lanes

// --- activations -----------------------------------------------------------------------------------------------------

template <int kKind>
struct Act {
  static vec value(vec z) {
    if constexpr (kKind == kRelu) return clamp(z, same(0.0f), same(__builtin_inff()));
    if constexpr (kKind == kRelu6) return clamp(z, 0.0f, 6.0f);
    if constexpr (kKind == kHardswish) return z * hard_gate(z);
    if constexpr (kKind == kSilu) return z / (1.0f + exponential(-z));
    return z;
  }
  static vec grad(vec z, vec dy) {
    if constexpr (kKind == kRelu) return z <= 0.0f ? vec{} : dy;
    if constexpr (kKind == kRelu6) return (z <= 0.0f) | (z >= 6.0f) ? vec{} : dy;
    if constexpr (kKind == kHardswish) return z <= -3.0f ? vec{} : z >= 3.0f ? dy : dy * (z * (1.0f / 3.0f) + 0.5f);
    if constexpr (kKind == kSilu) {
      const vec gate = 1.0f / (1.0f + exponential(-z));
      return dy * gate * (1.0f + z * (1.0f - gate));
    }
    return dy;
  }
};

template <typename Work>
void with_activation(int64_t kind, const Work& work) {
  switch (kind) {
    case kRelu: return work(Act<kRelu>());
    case kRelu6: return work(Act<kRelu6>());
    case kHardswish: return work(Act<kHardswish>());
    case kSilu: return work(Act<kSilu>());
    default: return work(Act<kNone>());
  }
}

// --- channels --------------------------------------------------------------------------------------------------------

struct Whole {};
inline vec load(const float* p, const Whole&) { return load(p); }
inline void store(float* p, vec v, const Whole&) { store(p, v); }
// 0 in the lanes that are not there.
inline vec only(vec v, const Whole&) { return v; }
inline vec only(vec v, const Part& part) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(part.mask, v);
#elif defined(__AVX__)
  return masked(v, reinterpret_cast<ivec>(part.mask));
#else
  for (int j = 0; j < kLanes; ++j)
    if (j < part.from || j >= part.to) v[j] = 0.0f;
  return v;
#endif
}
template <int kNumber>
using Number = std::integral_constant<int, kNumber>;

// How far before its turn a pixel is asked for: the processor does not foresee so many rows at a time.
inline int64_t ahead_of(const NormCall& c) { return kRows * c.channels * std::max<int64_t>(1, kAhead / (kRows * c.channels)); }
template <typename Lanes>
inline vec load_soon(const float* p, const Lanes& lanes, int64_t ahead) {
  __builtin_prefetch(p + ahead, 0, 2);
  return load(p, lanes);
}

// The member's, in whole vectors, with numbers of each in the thread's memory.
struct Channels {
  int64_t begin, end, pitch;
  float* memory;
  Channels(const NormCall& c, const Member& member, int64_t numbers) {
    const int64_t vectors = (c.channels + kLanes - 1) / kLanes;
    begin = std::min(c.channels, member.begin(vectors) * kLanes);
    end = std::min(c.channels, member.end(vectors) * kLanes);
    pitch = round_up(end - begin, kLanes);
    memory = scratch(numbers * pitch);
    std::fill(memory, memory + numbers * pitch, 0.0f);
  }
  float* row(int64_t number) const { return memory + number * pitch; }
  // work(channel, place in a row, which lanes there are)
  template <typename Work>
  void each(const Work& work) const {
    int64_t k = begin;
    for (; k + kLanes <= end; k += kLanes) work(k, k - begin, Whole());
    if (k < end) work(k, k - begin, Part(0, end - k));
  }
};

inline double deviation(const NormCall& c, int64_t channel) { return std::sqrt(static_cast<double>(c.var[channel]) + c.eps); }

// What a channel's input is multiplied by, and what is added then.
inline void affine(const NormCall& c, int64_t channel, float* scale, float* shift) {
  *scale = static_cast<float>(c.weight[channel] / deviation(c, channel));
  *shift = c.bias[channel] - c.mean[channel] * *scale;
}

// dx = scale * g + slope * x + offset
inline void gradient_terms(const NormCall& c, int64_t channel, float scale, float* slope, float* offset) {
  const double count = static_cast<double>(c.n * c.plane);
  const double by = -scale * (c.of_weight[channel] / count) / deviation(c, channel);
  *slope = static_cast<float>(by);
  *offset = static_cast<float>(-scale * (c.of_bias[channel] / count) - by * c.mean[channel]);
}

void affine_rows(const NormCall& c, const Channels& channels, bool gradient) {
  for (int64_t k = 0; k < channels.end - channels.begin; ++k) {
    affine(c, channels.begin + k, channels.row(0) + k, channels.row(1) + k);
    if (gradient)
      gradient_terms(c, channels.begin + k, channels.row(0)[k], channels.row(2) + k, channels.row(3) + k);
  }
}

}  // namespace
