// What stands between convolutions: means, gates, sums, activations, copies of channels, bilinear upsampling, max pools.

#pragma once

#include "call.h"

namespace {

// The mean of each plane.
void run_mean(const Call& c, const Member& member) {
  const int64_t planes = c.n * c.c_in;
  for (int64_t task = member.begin(planes); task < member.end(planes); ++task) {
    const int64_t image = task / c.c_in, channel = task % c.c_in;
    *y_of(c, image, channel) = mean_of(x_of(c, image, channel), c.h * c.w);
  }
}

// Each plane times its gate, (N, C, 1, 1) in `residual`.
void run_scale(const Call& c, const Member& member) {
  const int64_t planes = c.n * c.c_in, pixels = c.h * c.w;
  for (int64_t task = member.begin(planes); task < member.end(planes); ++task) {
    const int64_t image = task / c.c_in, channel = task % c.c_in;
    const float* x = x_of(c, image, channel);
    const float gate = image_of(c.residual, image, c.residual_image, c.c_in)[channel];
    float* y = y_of(c, image, channel);
    for (int64_t k = 0; k < pixels; ++k) y[k] = x[k] * gate;
  }
}

// activation(x + residual), element by element.
void run_map(const Call& c, const Member& member) {
  const Range range(c.activation);
  const int64_t planes = c.n * c.c_in, pixels = c.h * c.w;
  for (int64_t image = 0; image < c.n; ++image) {
    const int64_t first = std::max(member.begin(planes) - image * c.c_in, int64_t{0});
    const int64_t length = (std::min(member.end(planes) - image * c.c_in, c.c_in) - first) * pixels;
    if (length <= 0) continue;
    const float *x = x_of(c, image, first), *other = residual_of(c, image, first);
    float* y = y_of(c, image, first);
    int64_t k = 0;
    for (; k + kLanes <= length; k += kLanes) store(y + k, range(other ? load(x + k) + load(other + k) : load(x + k)));
    const Part part(0, length - k);
    const vec rest = load(x + k, part);
    store(y + k, range(other ? rest + load(other + k, part) : rest), part);
    finish(y, length, c.activation);
  }
}

// `count` channels from `first_in` on to those from `first_out` on.
void run_copy(const Call& c, const Member& member) {
  const int64_t planes = c.n * c.count;
  for (int64_t task = member.begin(planes); task < member.end(planes); ++task) {
    const int64_t image = task / c.count, channel = task % c.count;
    copy(y_of(c, image, c.first_out + channel), x_of(c, image, c.first_in + channel), c.h * c.w);
  }
}

// Where a vector of the output lies between pixels of a line: torch's bilinear interpolation, align_corners=False.
struct Between {
  int64_t base;   // of the pixels that it needs: a vector of them, since the output has at least twice as many
  ivec low;       // which of them is before each
  vec weight;     // of the one behind it
};

// The pixel before position `at` of `size_out`, of `size`, and the weight of the one behind it.
inline int64_t before(int64_t at, int64_t size, int64_t size_out, float* weight) {
  const float scale = static_cast<float>(size) / static_cast<float>(size_out);
  const float exact = std::max((static_cast<float>(at) + 0.5f) * scale - 0.5f, 0.0f);
  const int64_t low = std::min<int64_t>(static_cast<int64_t>(exact), size - 1);
  *weight = exact - static_cast<float>(low);
  return low;
}

// To them `residual` is added, if there is one.
void run_upsample(const Call& c, const Member& member) {
  const Range range(c.activation);
  static thread_local std::vector<Between> columns;
  columns.resize((c.w_out + kLanes - 1) / kLanes);
  for (int64_t k = 0; k < c.w_out; ++k) {
    Between& at = columns[k / kLanes];
    float weight;
    const int64_t low = before(k, c.w, c.w_out, &weight);
    if (k % kLanes == 0) at.base = low;
    at.low[k % kLanes] = static_cast<int32_t>(low - at.base);
    at.weight[k % kLanes] = weight;
  }
  float* line = scratch(c.w + kLanes);
  for (int64_t task = member.begin(c.n * c.c_in); task < member.end(c.n * c.c_in); ++task) {
    const int64_t image = task / c.c_in, channel = task % c.c_in;
    const float *x = x_of(c, image, channel), *other = residual_of(c, image, channel);
    float* y = y_of(c, image, channel);
    for (int64_t row = 0; row < c.h_out; ++row, y += c.w_out, other = other ? other + c.w_out : nullptr) {
      float weight;
      const int64_t low = before(row, c.h, c.h_out, &weight);
      const float *top = x + low * c.w, *bottom = x + std::min(low + 1, c.h - 1) * c.w;
      for (int64_t k = 0; k < c.w; ++k) line[k] = (1.0f - weight) * top[k] + weight * bottom[k];
      line[c.w] = line[c.w - 1];
      const auto between = [&](int64_t k) {
        const Between& at = columns[k / kLanes];
        const vec pixels = load(line + at.base);
        return (1.0f - at.weight) * lanes_of(pixels, at.low) + at.weight * lanes_of(pixels, at.low + 1);
      };
      int64_t k = 0;
      for (; k + kLanes <= c.w_out; k += kLanes) {
        const vec v = between(k);
        store(y + k, range(other ? v + load(other + k) : v));
      }
      if (k == c.w_out) continue;
      const Part part(0, c.w_out - k);
      const vec v = between(k);
      store(y + k, range(other ? v + load(other + k, part) : v), part);
    }
    finish(y - c.h_out * c.w_out, c.h_out * c.w_out, c.activation);
  }
}

// The larger of two; not a number where either is none.
inline vec larger(vec a, vec b) { return ((a == a) & ((a < b) | (b != b))) ? b : a; }

void run_max_pool(const Call& c, const Member& member) {
  const vec lowest = same(-__builtin_inff());
  Phases phases(c, 1, c.w + kLanes, lowest[0]);
  float* line = phases.rest();
  for (int64_t task = member.begin(c.n * c.c_in); task < member.end(c.n * c.c_in); ++task) {
    const float* x = x_of(c, task / c.c_in, task % c.c_in);
    float* y = y_of(c, task / c.c_in, task % c.c_in);
    for (int64_t row = 0; row < c.h_out; ++row, y += c.w_out) {
      const int64_t top = row * c.stride_h - c.pad_h, first = std::max<int64_t>(0, top), last = std::min(c.h, top + c.kh);
      for (int64_t k = 0; k < c.w; k += kLanes) {
        const Part part(0, c.w - k);
        vec best = lowest;
        for (int64_t i = first; i < last; ++i) best = larger(best, load(x + i * c.w + k, part));
        store(line + k, best);
      }
      phases.split(c, line, 0);
      for (int64_t k = 0; k < c.w_out; k += kLanes) {
        vec best = lowest;
        for (int64_t f = 0; f < c.stride_w; ++f)
          for (int64_t i = 0, b = f; b < c.kw; ++i, b += c.stride_w) best = larger(best, load(phases.phase(0, f) + k + i));
        store(y + k, best, Part(0, c.w_out - k));
      }
    }
  }
}

}  // namespace
