// A layer as Python hands it over, and a thread's part of it.

#pragma once

#include <cstdint>
#include <vector>

#include "vectors.h"

extern "C" {

enum Kind { kConvolution = 0, kDepthwise, kMean, kScale, kMap, kCopy, kUpsample, kMaxPool,
            kLinear,  // of images of one pixel
            // of bytes, see bytes.h
            kByteConvolution, kByteDepthwise, kByteLinear, kByteMean, kByteMap, kByteScale, kByteMaxPool, kToBytes,
            kFromBytes };

// One layer. Weights of a convolution: the flattened (C_in / groups, kh, kw) of a group is cut into chunks of `chunk`
// inputs; of chunk j and output channel o, values[i] is the weight of input j * chunk + columns[i], for i from
// rows[j * c_out + o] to rows[j * c_out + o + 1]. Depthwise: values are (C, kh, kw), linear: (C_out, C_in), dense. bias
// and residual (of the output's shape, added before the activation) may be null. A convolution with `gates` multiplies
// each input channel of each image with its own; a depthwise one with `means` writes each plane's mean there, too.
struct Call {
  const float* x;
  const float* values;
  const int16_t* columns;
  const int32_t* rows;
  const float* bias;
  const float* residual;
  float* y;
  const float* scales;   // the rest is of bytes
  const uint8_t* table;
  int64_t n, c_in, h, w;
  int64_t c_out, h_out, w_out;
  int64_t kh, kw, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
  int64_t activation, kind, chunk;
  int64_t first_in, first_out, count;  // channels of a copy
  int64_t zero_in, zero_out, zero_residual, low, high, to_float;
  const float* gates;
  float* means;
  // Floats from one image to the next, of operands that are some channels of others; 0 where nothing is between them.
  int64_t x_image, residual_image, y_image, gates_image, means_image;
  float scale, residual_scale;
  const int16_t* counts;  // of a convolution by quads, see quads.h; else null
  // Some rows of the output of a convolution, where the last is not 0, and floats from one channel to the next, where
  // they are not those of an image; of a depthwise one, row r of the input is its row (r + ring_first) % ring, see bands.py.
  int64_t first_row, end_row, x_plane, y_plane, ring, ring_first;
};

}  // extern "C"

namespace {

// Where an image of an operand begins that has `size` floats.
template <typename Float>
inline Float* image_of(Float* first, int64_t image, int64_t apart, int64_t size) {
  return first ? first + image * (apart ? apart : size) : nullptr;
}
inline int64_t x_plane(const Call& c) { return c.x_plane ? c.x_plane : c.h * c.w; }
inline int64_t y_plane(const Call& c) { return c.y_plane ? c.y_plane : c.h_out * c.w_out; }
inline int64_t end_row(const Call& c) { return c.end_row ? c.end_row : c.h_out; }
// Planes of a channel of an image, of floats.
inline const float* x_of(const Call& c, int64_t image, int64_t channel = 0) {
  return image_of(c.x, image, c.x_image, c.c_in * c.h * c.w) + channel * x_plane(c);
}
inline float* y_of(const Call& c, int64_t image, int64_t channel = 0) {
  return image_of(c.y, image, c.y_image, c.c_out * c.h_out * c.w_out) + channel * y_plane(c);
}
inline const float* residual_of(const Call& c, int64_t image, int64_t channel = 0) {
  const int64_t plane = c.h_out * c.w_out;
  return c.residual ? image_of(c.residual, image, c.residual_image, c.c_out * plane) + channel * plane : nullptr;
}

// One of `size` threads that share a layer.
struct Member {
  int64_t id, size;
  // its part of so many things
  int64_t begin(int64_t things) const { return things * id / size; }
  int64_t end(int64_t things) const { return things * (id + 1) / size; }
};

// Output channel, of `outputs` from `first` on, where the share `part / parts` of their work is reached.
int64_t boundary(const int32_t* rows, int64_t c_out, int64_t chunks, int64_t first, int64_t outputs, int64_t part,
                 int64_t parts) {
  const auto work = [&](int64_t outputs_before) {
    int64_t sum = 2 * chunks * outputs_before;  // a row costs its weights and its store
    for (int64_t j = 0; j < chunks; ++j) sum += rows[j * c_out + first + outputs_before] - rows[j * c_out + first];
    return sum;
  };
  if (part <= 0 || part >= parts) return first + (part <= 0 ? 0 : outputs);
  const int64_t all = work(outputs);
  int64_t low = 0, high = outputs;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (work(middle) * parts < all * part) low = middle + 1; else high = middle;
  }
  return first + low;
}

// Memory of the thread, aligned, kept: allocating pages costs more than a small convolution.
float* scratch(int64_t size) {
  static thread_local std::vector<float> floats;
  size += 2 * kLanes;
  if (static_cast<int64_t>(floats.size()) < size) floats.resize(size);
  float* start = floats.data();
  return start + -reinterpret_cast<uintptr_t>(start) / sizeof(float) % kLanes;
}

// Lines of the input in parts: phase f has pixels f, f + stride, f + 2 stride, ... of a padded line, so that what a tap
// reads for neighbouring outputs are neighbours. `border` stands outside the image.
class Phases {
 public:
  // for so many lines, with `rest` more floats
  Phases(const Call& c, int64_t lines, int64_t rest, float border)
      : pitch_(round_up(c.w_out + c.kw / c.stride_w, kLanes) + kLanes), stride_(c.stride_w) {
    const int64_t size = lines * stride_ * pitch_;
    start_ = scratch(size + round_up(rest, kLanes));
    rest_ = start_ + size;
    std::fill(start_, rest_, border);
  }
  const float* phase(int64_t line, int64_t f) const { return start_ + (line * stride_ + f) * pitch_; }
  float* rest() const { return rest_; }
  void split(const Call& c, const float* x, int64_t line) {
    float* to = start_ + line * stride_ * pitch_;
    for (int64_t f = 0; f < stride_; ++f, to += pitch_) {
      const int64_t shift = f - c.pad_w, first = shift < 0 ? (stride_ - 1 - shift) / stride_ : 0;
      const int64_t last = std::min(pitch_, (c.w - shift + stride_ - 1) / stride_);
      for (int64_t i = first; i < last; ++i) to[i] = x[i * stride_ + shift];
    }
  }

 private:
  int64_t pitch_, stride_;
  float *start_, *rest_;
};

}  // namespace
