// Norms of images by pixel (channels last): a few rows of pixels at a time, channels are lanes.

#pragma once

#include "norm_parts.h"

namespace {

// work(how many, the first) for a few pixels at a time.
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

}  // namespace
