// Norms of planes: pixels are lanes.

#pragma once

#include "norm_parts.h"

namespace {

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

// work(channel, what its input is multiplied by, what is added then) for the member's channels.
template <typename Work>
void plane_channels(const NormCall& c, const Member& member, const Work& work) {
  for (int64_t k = member.begin(c.channels); k < member.end(c.channels); ++k) {
    float scale, shift;
    affine(c, k, &scale, &shift);
    work(k, scale, shift);
  }
}

template <typename Act>
void plane_normed(const NormCall& c, const Member& member) {
  plane_channels(c, member, [&](int64_t k, float scale, float shift) {
    const vec by = same(scale), plus = same(shift);
    plane_parts(c, k, [&](int64_t of_image, int64_t start, int64_t end) {
      const vec gate = same(c.gates ? c.gates[of_image] : 1.0f);
      pixels_of(start, end, [&](int64_t p, const auto& lanes) {
        store(c.y + p, Act::value(multiply_add(load(c.x + p, lanes), by, plus)) * gate, lanes);
      });
    });
  });
}

template <typename Act>
void plane_planes(const NormCall& c, const Member& member) {
  plane_channels(c, member, [&](int64_t k, float scale, float shift) {
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
  });
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
  plane_channels(c, member, [&](int64_t k, float scale, float shift) {
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
  });
}

template <typename Act>
void plane_gradient(const NormCall& c, const Member& member) {
  plane_channels(c, member, [&](int64_t k, float scale, float shift) {
    float slope, offset;
    gradient_terms(c, k, scale, &slope, &offset);
    const vec by = same(scale), plus = same(shift), by_x = same(slope), last = same(offset);
    plane_parts(c, k, [&](int64_t of_image, int64_t start, int64_t end) {
      pixels_of(start, end, [&](int64_t p, const auto& lanes) {
        const vec x = load(c.x + p, lanes), g = plane_grad<Act>(c, p, of_image, multiply_add(x, by, plus), lanes);
        store(c.y + p, multiply_add(g, by, multiply_add(x, by_x, last)), lanes);
      });
    });
  });
}

}  // namespace
