// The layers of a network that the kernel computes, one after the other, by a team of threads. Plain C interface.

#include <chrono>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "byte_convolution.h"
#include "byte_depthwise.h"
#include "byte_linear.h"
#include "byte_planes.h"
#include "call.h"
#include "convolution.h"
#include "depthwise.h"
#include "linear.h"
#include "norms.h"
#include "pixels.h"
#include "planes.h"
#include "transpose.h"
#include "turns.h"
#include "weight_grad.h"
#include "windows.h"

namespace {

void run(const Call& c, const Member& member) {
  switch (c.kind) {
    case kConvolution: return run_convolution(c, member);
    case kDepthwise: return run_depthwise_any(c, member);
    case kMean: return run_mean(c, member);
    case kScale: return run_scale(c, member);
    case kMap: return run_map(c, member);
    case kCopy: return run_copy(c, member);
    case kUpsample: return run_upsample(c, member);
    case kMaxPool: return run_max_pool(c, member);
    case kLinear: return run_linear(c, member);
    case kByteConvolution: return run_byte_convolution(c, member);
    case kByteDepthwise: return run_byte_depthwise(c, member);
    case kByteLinear: return run_byte_linear(c, member);
    case kByteMean: return run_byte_mean(c, member);
    case kByteMap: return run_byte_map(c, member);
    case kByteScale: return run_byte_scale(c, member);
    case kByteMaxPool: return run_byte_max_pool(c, member);
    case kToBytes: return run_to_bytes(c, member);
    case kFromBytes: return run_from_bytes(c, member);
  }
}

template <typename Work>
void together(int64_t threads, const Work& work) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    work(Member{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  (void)threads;
  work(Member{0, 1});
}

}  // namespace

extern "C" {

const char* revnets_target() { return REVNETS_TARGET; }
const char* revnets_byte_target() { return REVNETS_BYTE_TARGET; }
// Whether convolutions of bytes take their blocks by twos, see byte_pairs.py.
int64_t revnets_byte_pairs() {
#if defined(REVNETS_BYTE_PAIRS)
  return 1;
#else
  return 0;
#endif
}
// Whether convolutions may come by quads, see quads.h.
int64_t revnets_quads() {
#if defined(__AVX512F__)
  return 1;
#else
  return 0;
#endif
}
int64_t revnets_call_size() { return sizeof(Call); }
int64_t revnets_lanes() { return kLanes; }
int64_t revnets_grad_call_size() { return sizeof(GradCall); }
int64_t revnets_pixel_call_size() { return sizeof(PixelCall); }
int64_t revnets_window_call_size() { return sizeof(WindowCall); }
int64_t revnets_norm_call_size() { return sizeof(NormCall); }

// Whether a layer's structure, see Call, stays within `values` weights and `inputs` inputs of an output channel, and
// names each of them once, in order.
int64_t revnets_fits(const int16_t* columns, const int32_t* rows, int64_t outputs, int64_t values, int64_t inputs) {
  bool fits = rows[0] == 0 && rows[outputs] == values;
  for (int64_t o = 0; o < outputs; ++o) fits &= rows[o] <= rows[o + 1];
  for (int64_t i = 0; i < values; ++i) fits &= columns[i] >= 0 && columns[i] < inputs;
  if (!fits) return false;
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t i = rows[o] + 1; i < rows[o + 1]; ++i) fits &= columns[i - 1] < columns[i];
  return fits;
}

// Layers in order; each may read what the ones before have written. Threads are woken once, not once per layer.
// `seconds`, of each layer what it took, may be null.
void revnets_run(const Call* calls, int64_t count, int64_t threads, double* seconds) {
#ifdef _OPENMP
  if (threads > 1) {
    Turns turns(count, threads);
#pragma omp parallel num_threads(static_cast<int>(threads))
    for (int64_t i = 0; i < count; ++i)
      turns.take(i, calls[i], seconds ? seconds + i : nullptr, [&](const Member& member) { run(calls[i], member); });
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) {
    const double start = seconds ? seconds_now() : 0.0;
    run(calls[i], {0, 1});
    if (seconds) seconds[i] = seconds_now() - start;
  }
}

// Gradient of a layer's weights; `sums` has room for as many floats as there are non-zeros.
void revnets_weight_grad(const GradCall* call, float* sums, int64_t threads) {
  together(threads, [&](const Member& member) { run_weight_grad(*call, member, sums); });
}

// A convolution of any window, and the gradient of its weights.
void revnets_windows(const WindowCall* call, int64_t threads) {
  together(threads, [&](const Member& member) { run_windows(*call, member); });
}
void revnets_windows_grad(const WindowCall* call, float* sums, int64_t threads) {
  together(threads, [&](const Member& member) { run_windows_grad(*call, member, sums); });
}

// A 1x1 convolution of images by pixel.
void revnets_pixels(const PixelCall* call, int64_t threads) {
  together(threads, [&](const Member& member) { run_pixels(*call, member); });
}

// A batch norm with its activation: of what there is in NormWork, that which is asked for.
void revnets_norm(const NormCall* call, int64_t work, int64_t threads) {
  together(threads, [&](const Member& member) { run_norm(*call, work, member); });
}

// weight * mask, of bytes 0 and 1; y may be the weight itself.
void revnets_mask(const float* weight, const uint8_t* mask, int64_t count, float* y, int64_t threads) {
  together(threads, [&](const Member& member) { run_mask(weight, mask, count, y, member); });
}

// to[k] = from[places[k]]
void revnets_gather(const float* from, const int32_t* places, int64_t count, float* to, int64_t threads) {
  together(threads, [&](const Member& member) { run_gather(from, places, count, to, member); });
}

// A matrix of `height` lines of `width` numbers.
void revnets_transpose(const float* x, int64_t height, int64_t width, float* y, int64_t threads) {
  together(threads, [&](const Member& member) { run_transpose(x, height, width, y, member); });
}

}  // extern "C"
