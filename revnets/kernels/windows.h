// Convolutions of any window, stride and dilation in training: of small planes, too.
//
// The input's planes are first laid into a frame: padded, and cut into phases by the stride, so that what a tap reads for
// neighbouring outputs are neighbours, and no read leaves the frame. Pixels of the output are counted through the images
// of a frame, so that planes smaller than a vector waste nothing. A block of them is packed into a panel, a line per
// input channel and tap, which the non-zeros then multiply as those of convolution.h and weight_grad.h do. The gradient
// of the input is such a convolution of dy, for each phase of the input one, whose pixels lie `y_column` apart.

#pragma once

#include "call.h"
#include "weight_grad.h"

extern "C" {

// Structure as in Call, with lines (input channel, tap) instead of inputs. A tap is the row and the column, in the padded
// input, of what the first pixel of the output reads; pixel (i, j) reads stride * (i, j) further.
struct WindowCall {
  const float* x;
  const float* values;
  const int16_t* columns;
  const int32_t* rows;
  const float* bias;      // may be null
  const int32_t* taps;    // (count, 2)
  float* y;               // of a gradient: dy, which is only read
  const int32_t* places;  // of a gradient: see GradCall
  float* gradient;
  int64_t n, c_in, h, w, x_image, x_channel;  // distances of images and channels
  int64_t c_out, h_out, w_out, y_image, y_channel, y_row, y_column;
  int64_t tap_count, stride_h, stride_w, pad_top, pad_left, frame_h, frame_w;  // frame: of a phase
  int64_t chunk;
};

}  // extern "C"

namespace {

constexpr int64_t kFrame = 1 << 18;      // floats: what stays in the second cache
constexpr int64_t kWindowPanel = 8192;   // floats
constexpr int64_t kLongest = 8 * kLanes;  // pixels of a block

// --- frames ----------------------------------------------------------------------------------------------------------

// Images whose frames are made together, shared out evenly.
struct Units {
  int64_t images, count, largest;
  explicit Units(const WindowCall& c) : images(c.n) {
    const int64_t one = c.c_in * c.stride_h * c.stride_w * c.frame_h * c.frame_w;
    const int64_t most = std::max<int64_t>(1, kFrame / std::max<int64_t>(1, one));
    count = (images + most - 1) / most;
    largest = count ? (images + count - 1) / count : 0;
  }
  int64_t first(int64_t unit) const { return unit * images / count; }
};

struct Frame {
  float* start;
  int64_t plane, phase, channel;  // distances of images, phases and channels
  std::vector<int64_t> taps;      // where they read for the first pixel
  std::vector<char> used;         // phases that a tap reads
  Frame(const WindowCall& c, int64_t images, float* memory)
      : start(memory), taps(c.tap_count), used(c.stride_h * c.stride_w) {
    plane = c.frame_h * c.frame_w;
    phase = images * plane;
    channel = c.stride_h * c.stride_w * phase;
    for (int64_t t = 0; t < c.tap_count; ++t) {
      const int64_t row = c.taps[2 * t], column = c.taps[2 * t + 1];
      const int64_t which = row % c.stride_h * c.stride_w + column % c.stride_w;
      taps[t] = which * phase + row / c.stride_h * c.frame_w + column / c.stride_w;
      used[which] = 1;
    }
  }
  static int64_t size(const WindowCall& c, int64_t images) {
    return c.c_in * c.stride_h * c.stride_w * images * c.frame_h * c.frame_w + kLongest;
  }
};

// A line of the image into its phases, of which `to` is the first.
void fill_line(const WindowCall& c, const Frame& f, const char* used, const float* x, float* to) {
  for (int64_t b = 0; b < c.stride_w; ++b, to += f.phase) {
    if (!used[b]) continue;
    // pixel `first + k * stride` belongs to position `at + k`
    int64_t first = (b - c.pad_left) % c.stride_w;
    if (first < 0) first += c.stride_w;
    int64_t at = (first + c.pad_left - b) / c.stride_w;
    if (at < 0) {
      first -= at * c.stride_w;
      at = 0;
    }
    const int64_t count = std::min((c.w - first + c.stride_w - 1) / c.stride_w, c.frame_w - at);
    if (first >= c.w || count <= 0) continue;
    if (c.stride_w == 1) {
      copy(to + at, x + first, count);
    } else if (c.stride_w == 2) {
      copy_even(to + at, x + first, count);
    } else {
      for (int64_t k = 0; k < count; ++k) to[at + k] = x[first + k * c.stride_w];
    }
  }
}

void fill(const WindowCall& c, const Frame& f, int64_t first, int64_t images) {
  std::fill(f.start, f.start + Frame::size(c, images), 0.0f);
  for (int64_t k = 0; k < c.c_in; ++k) {
    for (int64_t image = 0; image < images; ++image) {
      const float* x = c.x + (first + image) * c.x_image + k * c.x_channel;
      float* to = f.start + k * f.channel + image * f.plane;
      for (int64_t i = std::max<int64_t>(0, -c.pad_top); i < c.h; ++i) {
        const int64_t row = i + c.pad_top, line = row / c.stride_h;
        if (line >= c.frame_h) break;
        const int64_t which = row % c.stride_h * c.stride_w;
        fill_line(c, f, f.used.data() + which, x + i * c.w, to + which * f.phase + line * c.frame_w);
      }
    }
  }
}

// --- blocks ----------------------------------------------------------------------------------------------------------

// Neighbouring pixels of the output, through the images of a frame, and the parts of them that lie in one row.
struct Window {
  int64_t start, length, vectors, count;
  int32_t from[kLongest], lengths[kLongest];  // in the frame; pixels

  Window(const WindowCall& c, const Frame& f, int64_t begin, int64_t end, int64_t number)
      : start(begin), length(end - begin), vectors(number), count(0) {
    const int64_t plane = c.h_out * c.w_out;
    for (int64_t p = begin; p < end; p += lengths[count++]) {
      const int64_t image = p / plane, row = p % plane / c.w_out, column = p % c.w_out;
      from[count] = static_cast<int32_t>(image * f.plane + row * c.frame_w + column);
      lengths[count] = static_cast<int32_t>(std::min(end - p, c.w_out - column));
    }
  }
};

// Lines `first` to `last` of the panel. Whole vectors are written: what is too much, the next part or line overwrites.
void pack_windows(const WindowCall& c, const Frame& f, const Window& w, int64_t first, int64_t last, float* panel) {
  const int64_t pitch = w.vectors * kLanes;
  int64_t channel = first / c.tap_count, tap = first % c.tap_count;
  for (int64_t k = first; k < last; ++k, panel += pitch) {
    const float* base = f.start + channel * f.channel + f.taps[tap];
    float* to = panel;
    for (int64_t r = 0; r < w.count; to += w.lengths[r++]) {
      const float* from = base + w.from[r];
      for (int64_t p = 0; p < w.lengths[r]; p += kLanes) store(to + p, load(from + p));
    }
    for (float* end = panel + pitch; to < end; ++to) *to = 0.0f;
    if (++tap == c.tap_count) {
      tap = 0;
      ++channel;
    }
  }
}

// Calls work(offset in y, offset in the block, pixels) for the parts of a block that are neighbours in y, or whose
// pixels are y_column apart.
template <typename Work>
void parts_of(const WindowCall& c, int64_t first_image, const Window& w, const Work& work) {
  const bool whole = c.y_column == 1 && c.y_row == c.w_out;
  const int64_t plane = c.h_out * c.w_out, step = whole ? plane : c.w_out;
  for (int64_t done = 0; done < w.length;) {
    const int64_t p = w.start + done, image = p / plane, rest = p % plane;
    const int64_t length = std::min(step - p % step, w.length - done);
    const int64_t offset = whole ? rest : rest / c.w_out * c.y_row + rest % c.w_out * c.y_column;
    work((first_image + image) * c.y_image + offset, done, length);
    done += length;
  }
}

// --- multiplying -----------------------------------------------------------------------------------------------------

template <int kNumber, typename Weights>
void multiply_lines(const Weights& c, const int32_t* rows, int64_t begin, int64_t end, const float* panel,
                    bool first, float* sums) {
  const char* start = reinterpret_cast<const char*>(__builtin_assume_aligned(panel, REVNETS_VECTOR));
  for (int64_t o = begin; o < end; ++o, sums += kNumber * kLanes) {
    vec sum[kNumber];
    if (first) {
      const vec bias = same(c.bias ? c.bias[o] : 0.0f);
      for (int j = 0; j < kNumber; ++j) sum[j] = bias;
    } else {
      for (int j = 0; j < kNumber; ++j) sum[j] = load(sums + j * kLanes);
    }
    const int32_t last = rows[o + 1];
    for (int32_t i = rows[o]; i < last; ++i) {
      const vec* line = reinterpret_cast<const vec*>(start + c.columns[i] * static_cast<int64_t>(kNumber * sizeof(vec)));
      const vec weight = same(c.values[i]);
      for (int j = 0; j < kNumber; ++j) sum[j] = multiply_add(weight, line[j], sum[j]);
    }
    for (int j = 0; j < kNumber; ++j) store(sums + j * kLanes, sum[j]);
  }
}

template <int kNumber, typename Weights>
void multiply_lines_any(int64_t vectors, const Weights& c, const int32_t* rows, int64_t begin, int64_t end,
                        const float* panel, bool first, float* sums) {
  if constexpr (kNumber > 1) {
    if (vectors < kNumber) return multiply_lines_any<kNumber - 1>(vectors, c, rows, begin, end, panel, first, sums);
  }
  multiply_lines<kNumber>(c, rows, begin, end, panel, first, sums);
}

// --- sharing out -----------------------------------------------------------------------------------------------------

// Calls work(window, panel's memory) for the blocks of a unit.
template <typename Work>
void blocks_of(const WindowCall& c, const Frame& f, int64_t images, int64_t most, const Work& work) {
  const int64_t pixels = images * c.h_out * c.w_out, vectors = (pixels + kLanes - 1) / kLanes;
  const int64_t count = (vectors + most - 1) / most;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t from = vectors * b / count, to = vectors * (b + 1) / count;
    work(Window(c, f, from * kLanes, std::min(to * kLanes, pixels), to - from));
  }
}

// The member's units, or of every unit its output channels: a sum is the same whoever makes it.
void run_windows(const WindowCall& c, const Member& member) {
  const int64_t lines = c.c_in * c.tap_count, chunks = (lines + c.chunk - 1) / c.chunk;
  const int64_t height = std::min(c.chunk, lines);
  const int64_t most = std::max<int64_t>(4, std::min<int64_t>(8, kWindowPanel / kLanes / std::max<int64_t>(1, height)));
  const Units units(c);
  const bool by_unit = units.count >= 2 * member.size;
  const int64_t first_unit = by_unit ? member.begin(units.count) : 0, last_unit = by_unit ? member.end(units.count) : units.count;
  const int64_t begin = by_unit ? 0 : boundary(c.rows, c.c_out, chunks, 0, c.c_out, member.id, member.size);
  const int64_t end = by_unit ? c.c_out : boundary(c.rows, c.c_out, chunks, 0, c.c_out, member.id + 1, member.size);
  const int64_t panel_size = height * most * kLanes + kLongest, sums_size = (end - begin) * most * kLanes;
  float* panel = scratch(panel_size + sums_size + Frame::size(c, units.largest));
  float* sums = panel + panel_size;
  for (int64_t u = first_unit; u < last_unit; ++u) {
    const int64_t first = units.first(u), images = units.first(u + 1) - first;
    const Frame frame(c, images, sums + sums_size);
    fill(c, frame, first, images);
    blocks_of(c, frame, images, most, [&](const Window& w) {
      for (int64_t j = 0; j < chunks; ++j) {
        pack_windows(c, frame, w, j * c.chunk, std::min(lines, (j + 1) * c.chunk), panel);
        multiply_lines_any<8>(w.vectors, c, c.rows + j * c.c_out, begin, end, panel, j == 0, sums);
      }
      const float* line = sums;
      for (int64_t o = begin; o < end; ++o, line += w.vectors * kLanes) {
        float* y = c.y + o * c.y_channel;
        parts_of(c, first, w, [&](int64_t offset, int64_t done, int64_t length) {
          if (c.y_column == 1) return copy(y + offset, line + done, length);
          for (int64_t k = 0; k < length; ++k) y[offset + k * c.y_column] = line[done + k];
        });
      }
    });
  }
}

// The member's output channels, in all pixels.
void run_windows_grad(const WindowCall& c, const Member& member, float* sums) {
  const int64_t lines = c.c_in * c.tap_count, chunks = (lines + c.chunk - 1) / c.chunk;
  const int64_t height = std::min(c.chunk, lines), most = kGradVectors;
  const int64_t begin = boundary(c.rows, c.c_out, chunks, 0, c.c_out, member.id, member.size);
  const int64_t end = boundary(c.rows, c.c_out, chunks, 0, c.c_out, member.id + 1, member.size);
  if (begin == end) return;
  for (int64_t j = 0; j < chunks; ++j) {
    const int32_t* rows = c.rows + j * c.c_out;
    std::fill(sums + rows[begin], sums + rows[end], 0.0f);
  }
  const Units units(c);
  const int64_t panel_size = height * most * kLanes + kLongest, dy_size = (end - begin) * most * kLanes;
  float* panel = scratch(panel_size + dy_size + Frame::size(c, units.largest));
  float* dy = panel + panel_size;
  GradCall grad = {};
  grad.columns = c.columns;
  for (int64_t u = 0; u < units.count; ++u) {
    const int64_t first = units.first(u), images = units.first(u + 1) - first;
    const Frame frame(c, images, dy + dy_size);
    fill(c, frame, first, images);
    blocks_of(c, frame, images, most, [&](const Window& w) {
      float* line = dy;
      for (int64_t o = begin; o < end; ++o, line += w.vectors * kLanes) {
        const float* from = c.y + o * c.y_channel;
        parts_of(c, first, w, [&](int64_t offset, int64_t done, int64_t length) { copy(line + done, from + offset, length); });
        std::fill(line + w.length, line + w.vectors * kLanes, 0.0f);
      }
      for (int64_t j = 0; j < chunks; ++j) {
        pack_windows(c, frame, w, j * c.chunk, std::min(lines, (j + 1) * c.chunk), panel);
        grad_rows_any<kGradVectors>(w.vectors, grad, c.rows + j * c.c_out, begin, end, panel, dy, sums);
      }
    });
  }
  scatter(c.rows, c.places, sums, c.c_out, chunks, lines, begin, end, c.gradient);
}

}  // namespace
