// Batch norm and activation in training, forwards and backwards, in as few passes over the maps as that takes.
//
// Maps are planes, or by pixel. A sum per channel is made in floats for so many pixels as lose nothing by it, and of
// those in doubles; always in one order, since threads share out channels. Values and gradients are computed from the
// input alone: neither the norm's output nor the activation's is read again.

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

// --- by pixel --------------------------------------------------------------------------------------------------------

// work(how many, first pixel, image) for the pixels of a few at a time; those of an image in order.
template <typename Work>
void rows_of(int64_t start, int64_t end, const Work& work) {
  for (; start + kRows <= end; start += kRows) work(Number<kRows>(), start);
  for (; start < end; ++start) work(Number<1>(), start);
}

double* doubles(int64_t count) {
  static thread_local std::vector<double> memory;
  memory.assign(count, 0.0);
  return memory.data();
}

// Mean and sum of squared distances of some rows, joined to those of `before` rows.
template <int kNumber, typename Lanes>
inline void join_rows(const float* x, int64_t pitch, const Lanes& lanes, int64_t ahead, int64_t before, float* mean,
                      float* squares) {
  vec v[kNumber], own = vec{}, spread = vec{};
  for (int r = 0; r < kNumber; ++r) own += v[r] = load_soon(x + r * pitch, lanes, ahead);
  own *= 1.0f / kNumber;
  for (int r = 0; r < kNumber; ++r) spread += (v[r] - own) * (v[r] - own);
  const float share = static_cast<float>(kNumber) / static_cast<float>(before + kNumber);
  const vec known = load(mean), apart = own - known;
  store(mean, known + apart * share);
  store(squares, load(squares) + spread + apart * apart * (share * static_cast<float>(before)));
}

// Of `count` numbers, joined to those of `before`.
inline void join(double own, double spread, double count, double before, double* mean, double* squares) {
  const double apart = own - *mean, share = count / (before + count);
  *mean += apart * share;
  *squares += spread + apart * apart * before * share;
}

void pixel_statistics(const NormCall& c, const Member& member) {
  const Channels channels(c, member, 2);
  const int64_t ahead = ahead_of(c);
  const int64_t pixels = c.n * c.plane, count = channels.end - channels.begin;
  double *mean = doubles(2 * channels.pitch), *squares = mean + channels.pitch;
  for (int64_t start = 0; start < pixels; start += kNear) {
    const int64_t end = std::min(pixels, start + kNear);
    std::fill(channels.memory, channels.row(2), 0.0f);
    rows_of(start, end, [&](auto number, int64_t row) {
      channels.each([&](int64_t k, int64_t at, const auto& lanes) {
        join_rows<number.value>(c.x + row * c.channels + k, c.channels, lanes, ahead, row - start,
                                channels.row(0) + at, channels.row(1) + at);
      });
    });
    for (int64_t k = 0; k < count; ++k)
      join(channels.row(0)[k], channels.row(1)[k], end - start, start, mean + k, squares + k);
  }
  for (int64_t k = 0; k < count; ++k) {
    c.mean[channels.begin + k] = static_cast<float>(mean[k]);
    c.var[channels.begin + k] = static_cast<float>(squares[k] / pixels);
  }
}

// The gradient of z.
template <typename Act, typename Lanes>
inline vec grad_at(const NormCall& c, int64_t at, int64_t of_image, vec z, const Lanes& lanes, int64_t ahead) {
  vec dy = load_soon(c.dy + at, lanes, ahead);
  if (c.gates) dy *= load(c.gates + of_image, lanes);
  if (c.more) dy += load(c.more + of_image, lanes);
  return Act::grad(z, dy);
}

template <typename Act>
void pixel_normed(const NormCall& c, const Member& member) {
  const Channels channels(c, member, 2);
  const int64_t ahead = ahead_of(c);
  affine_rows(c, channels, false);
  for (int64_t image = 0; image < c.n; ++image) {
    rows_of(image * c.plane, (image + 1) * c.plane, [&](auto number, int64_t row) {
      channels.each([&](int64_t k, int64_t at, const auto& lanes) {
        const vec scale = load(channels.row(0) + at), shift = load(channels.row(1) + at);
        const vec gate = c.gates ? load(c.gates + image * c.channels + k, lanes) : same(1.0f);
        const int64_t first = row * c.channels + k;
        for (int r = 0; r < number.value; ++r) {
          const vec v = Act::value(multiply_add(load_soon(c.x + first + r * c.channels, lanes, ahead), scale, shift));
          store(c.y + first + r * c.channels, v * gate, lanes);
        }
      });
    });
  }
}

// Sums over an image's pixels of the activation's value, times dy if there is one.
template <typename Act>
void pixel_planes(const NormCall& c, const Member& member) {
  const Channels channels(c, member, 3);
  const int64_t ahead = ahead_of(c);
  affine_rows(c, channels, false);
  const int64_t count = channels.end - channels.begin;
  for (int64_t image = 0; image < c.n; ++image) {
    double* sums = doubles(channels.pitch);
    for (int64_t start = image * c.plane, last = start + c.plane; start < last; start += kNear) {
      std::fill(channels.row(2), channels.row(3), 0.0f);
      rows_of(start, std::min(last, start + kNear), [&](auto number, int64_t row) {
        channels.each([&](int64_t k, int64_t at, const auto& lanes) {
          const vec scale = load(channels.row(0) + at), shift = load(channels.row(1) + at);
          vec sum = load(channels.row(2) + at);
          for (int r = 0; r < number.value; ++r) {
            const int64_t place = (row + r) * c.channels + k;
            const vec v = Act::value(multiply_add(load_soon(c.x + place, lanes, ahead), scale, shift));
            sum += c.dy ? v * load_soon(c.dy + place, lanes, ahead) : v;
          }
          store(channels.row(2) + at, sum);
        });
      });
      for (int64_t k = 0; k < count; ++k) sums[k] += channels.row(2)[k];
    }
    float* to = c.planes + image * c.channels + channels.begin;
    for (int64_t k = 0; k < count; ++k) to[k] = static_cast<float>(c.dy ? sums[k] : sums[k] / c.plane);
  }
}

template <typename Act>
void pixel_affine_sums(const NormCall& c, const Member& member) {
  const Channels channels(c, member, 4);
  const int64_t ahead = ahead_of(c);
  affine_rows(c, channels, false);
  const int64_t count = channels.end - channels.begin;
  double *of_bias = doubles(2 * channels.pitch), *of_weight = of_bias + channels.pitch;
  for (int64_t image = 0; image < c.n; ++image) {
    for (int64_t start = image * c.plane, last = start + c.plane; start < last; start += kNear) {
      std::fill(channels.row(2), channels.row(4), 0.0f);
      rows_of(start, std::min(last, start + kNear), [&](auto number, int64_t row) {
        channels.each([&](int64_t k, int64_t at, const auto& lanes) {
          const vec scale = load(channels.row(0) + at), shift = load(channels.row(1) + at), mean = load(c.mean + k, lanes);
          vec sum = load(channels.row(2) + at), sum_x = load(channels.row(3) + at);
          for (int r = 0; r < number.value; ++r) {
            const int64_t place = (row + r) * c.channels + k;
            const vec x = load_soon(c.x + place, lanes, ahead);
            const vec g = grad_at<Act>(c, place, image * c.channels + k, multiply_add(x, scale, shift), lanes, ahead);
            sum += g;
            sum_x = multiply_add(g, x - mean, sum_x);
          }
          store(channels.row(2) + at, sum);
          store(channels.row(3) + at, sum_x);
        });
      });
      for (int64_t k = 0; k < count; ++k) {
        of_bias[k] += channels.row(2)[k];
        of_weight[k] += channels.row(3)[k];
      }
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    c.of_bias[channels.begin + k] = static_cast<float>(of_bias[k]);
    c.of_weight[channels.begin + k] = static_cast<float>(of_weight[k] / deviation(c, channels.begin + k));
  }
}

template <typename Act>
void pixel_gradient(const NormCall& c, const Member& member) {
  const Channels channels(c, member, 4);
  const int64_t ahead = ahead_of(c);
  affine_rows(c, channels, true);
  for (int64_t image = 0; image < c.n; ++image) {
    rows_of(image * c.plane, (image + 1) * c.plane, [&](auto number, int64_t row) {
      channels.each([&](int64_t k, int64_t at, const auto& lanes) {
        const vec scale = load(channels.row(0) + at), shift = load(channels.row(1) + at);
        const vec slope = load(channels.row(2) + at), offset = load(channels.row(3) + at);
        for (int r = 0; r < number.value; ++r) {
          const int64_t place = (row + r) * c.channels + k;
          const vec x = load_soon(c.x + place, lanes, ahead);
          const vec g = grad_at<Act>(c, place, image * c.channels + k, multiply_add(x, scale, shift), lanes, ahead);
          store(c.y + place, multiply_add(g, scale, multiply_add(x, slope, offset)), lanes);
        }
      });
    });
  }
}

// --- planes ----------------------------------------------------------------------------------------------------------

// work(place, which lanes) for the pixels from `start` on.
template <typename Work>
inline void pixels_of(int64_t start, int64_t end, const Work& work) {
  for (; start + kLanes <= end; start += kLanes) work(start, Whole());
  if (start < end) work(start, Part(0, end - start));
}

// work(channel, image, first pixel's place, the one behind the last) for the member's planes, in parts.
template <typename Work>
void plane_parts(const NormCall& c, int64_t channel, const Work& work) {
  for (int64_t image = 0; image < c.n; ++image) {
    const int64_t start = (image * c.channels + channel) * c.plane;
    for (int64_t at = 0; at < c.plane; at += kNearPlane)
      work(image * c.channels + channel, start + at, start + std::min(c.plane, at + kNearPlane));
  }
}

void plane_statistics(const NormCall& c, const Member& member) {
  for (int64_t k = member.begin(c.channels); k < member.end(c.channels); ++k) {
    double mean = 0.0, squares = 0.0, before = 0.0;
    plane_parts(c, k, [&](int64_t, int64_t start, int64_t end) {
      const float own = mean_of(c.x + start, end - start);
      vec spread = {};
      int64_t p = start;
      for (; p + kLanes <= end; p += kLanes) {
        const vec apart = load(c.x + p) - own;
        spread += apart * apart;
      }
      double sum = total(spread);
      for (; p < end; ++p) sum += static_cast<double>(c.x[p] - own) * (c.x[p] - own);
      join(own, sum, end - start, before, &mean, &squares);
      before += end - start;
    });
    c.mean[k] = static_cast<float>(mean);
    c.var[k] = static_cast<float>(squares / before);
  }
}

template <typename Act>
void plane_normed(const NormCall& c, const Member& member) {
  for (int64_t k = member.begin(c.channels); k < member.end(c.channels); ++k) {
    float scale, shift;
    affine(c, k, &scale, &shift);
    const vec by = same(scale), plus = same(shift);
    plane_parts(c, k, [&](int64_t of_image, int64_t start, int64_t end) {
      const vec gate = same(c.gates ? c.gates[of_image] : 1.0f);
      pixels_of(start, end, [&](int64_t p, const auto& lanes) {
        store(c.y + p, Act::value(multiply_add(load(c.x + p, lanes), by, plus)) * gate, lanes);
      });
    });
  }
}

template <typename Act>
void plane_planes(const NormCall& c, const Member& member) {
  for (int64_t k = member.begin(c.channels); k < member.end(c.channels); ++k) {
    float scale, shift;
    affine(c, k, &scale, &shift);
    const vec by = same(scale), plus = same(shift);
    double sum = 0.0;
    plane_parts(c, k, [&](int64_t of_image, int64_t start, int64_t end) {
      vec part = {};
      pixels_of(start, end, [&](int64_t p, const auto& lanes) {
        const vec v = Act::value(multiply_add(load(c.x + p, lanes), by, plus));
        part += only(c.dy ? v * load(c.dy + p, lanes) : v, lanes);
      });
      if (start == of_image * c.plane) sum = 0.0;
      sum += total(part);
      if (end == (of_image + 1) * c.plane) c.planes[of_image] = static_cast<float>(c.dy ? sum : sum / c.plane);
    });
  }
}

// The gradient of z at `p`, which is in the plane number `of_image`.
template <typename Act, typename Lanes>
inline vec plane_grad(const NormCall& c, int64_t p, int64_t of_image, vec z, const Lanes& lanes) {
  vec dy = load(c.dy + p, lanes);
  if (c.gates) dy *= c.gates[of_image];
  if (c.more) dy += c.more[of_image];
  return Act::grad(z, only(dy, lanes));
}

template <typename Act>
void plane_affine_sums(const NormCall& c, const Member& member) {
  for (int64_t k = member.begin(c.channels); k < member.end(c.channels); ++k) {
    float scale, shift;
    affine(c, k, &scale, &shift);
    const vec by = same(scale), plus = same(shift);
    double of_bias = 0.0, of_weight = 0.0;
    plane_parts(c, k, [&](int64_t of_image, int64_t start, int64_t end) {
      vec sum = {}, sum_x = {};
      pixels_of(start, end, [&](int64_t p, const auto& lanes) {
        const vec x = load(c.x + p, lanes), g = plane_grad<Act>(c, p, of_image, multiply_add(x, by, plus), lanes);
        sum += g;
        sum_x = multiply_add(g, x - c.mean[k], sum_x);
      });
      of_bias += total(sum);
      of_weight += total(sum_x);
    });
    c.of_bias[k] = static_cast<float>(of_bias);
    c.of_weight[k] = static_cast<float>(of_weight / deviation(c, k));
  }
}

template <typename Act>
void plane_gradient(const NormCall& c, const Member& member) {
  for (int64_t k = member.begin(c.channels); k < member.end(c.channels); ++k) {
    float scale, shift, slope, offset;
    affine(c, k, &scale, &shift);
    gradient_terms(c, k, scale, &slope, &offset);
    const vec by = same(scale), plus = same(shift), by_x = same(slope), last = same(offset);
    plane_parts(c, k, [&](int64_t of_image, int64_t start, int64_t end) {
      pixels_of(start, end, [&](int64_t p, const auto& lanes) {
        const vec x = load(c.x + p, lanes), g = plane_grad<Act>(c, p, of_image, multiply_add(x, by, plus), lanes);
        store(c.y + p, multiply_add(g, by, multiply_add(x, by_x, last)), lanes);
      });
    });
  }
}

// --- what is asked for -----------------------------------------------------------------------------------------------

// Of the member's channels: nothing of one depends on another.
template <typename Act, bool kByPixel>
void run_norm_act(const NormCall& c, int64_t work, const Member& member) {
  if (work & kStatistics) kByPixel ? pixel_statistics(c, member) : plane_statistics(c, member);
  if (work & kPlaneSums) kByPixel ? pixel_planes<Act>(c, member) : plane_planes<Act>(c, member);
  if (work & kNormed) kByPixel ? pixel_normed<Act>(c, member) : plane_normed<Act>(c, member);
  if (work & kAffineSums) kByPixel ? pixel_affine_sums<Act>(c, member) : plane_affine_sums<Act>(c, member);
  if (work & kNormGrad) kByPixel ? pixel_gradient<Act>(c, member) : plane_gradient<Act>(c, member);
}

void run_norm(const NormCall& c, int64_t work, const Member& member) {
  with_activation(c.activation, [&](auto act) {
    using Which = decltype(act);
    c.by_pixel ? run_norm_act<Which, true>(c, work, member) : run_norm_act<Which, false>(c, work, member);
  });
}

}  // namespace
