// Convolutions of images of one pixel with dense weights: linear layers, the gates of squeeze-and-excite.
//
// Weights are read once, one after the other, as fast as memory gives them; each output is summed up in vectors of its
// own, and the lanes of as many outputs as a vector has are added up at once.

#pragma once

#include "call.h"

namespace {

// A row of weights times an image.
inline vec product(const float* weights, const float* x, int64_t length) {
  vec sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLanes <= length; k += 4 * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sums[j] = multiply_add(load(weights + k + j * kLanes), load(x + k + j * kLanes), sums[j]);
  for (; k + kLanes <= length; k += kLanes) sums[0] = multiply_add(load(weights + k), load(x + k), sums[0]);
  if (k < length) {
    const Part part(0, length - k);
    sums[1] = multiply_add(load(weights + k, part), load(x + k, part), sums[1]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

void run_linear(const Call& c, const Member& member) {
  const int64_t parts = (c.c_out + kLanes - 1) / kLanes, begin = member.begin(parts) * kLanes;
  const int64_t end = std::min(c.c_out, member.end(parts) * kLanes);
  const Range range(c.activation);
  float* gated = c.gates ? scratch(c.c_in) : nullptr;
  for (int64_t image = 0; image < c.n && begin < end; ++image) {
    const float *x = x_of(c, image), *residual = residual_of(c, image);
    float* y = y_of(c, image);
    if (c.gates) {
      const float* gates = image_of(c.gates, image, c.gates_image, c.c_in);
      for (int64_t i = 0; i < c.c_in; ++i) gated[i] = x[i] * gates[i];
      x = gated;
    }
    for (int64_t o = begin; o < end; o += kLanes) {
      const int64_t number = std::min<int64_t>(kLanes, end - o);
      vec sums[kLanes] = {};
      for (int64_t r = 0; r < number; ++r) sums[r] = product(c.values + (o + r) * c.c_in, x, c.c_in);
      const Part part(0, number);
      vec v = sums_of(sums);
      if (c.bias) v += load(c.bias + o, part);
      if (residual) v += load(residual + o, part);
      store(y + o, range(v), part);
    }
    finish(y + begin, end - begin, c.activation);
  }
}

}  // namespace
