// How a team of threads shares layers: pieces are taken as threads come, and nobody is waited for who has taken none.
//
// A thread that another program keeps from its core would hold up all others at a barrier, layer after layer. So each
// layer is cut into as many pieces as there are threads, whoever is there takes the next, and a layer is over when all
// of them are: one thread takes all where the others do not come, and those who come late pass by.

#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "call.h"

namespace {

// Whether a layer takes less than it costs to hand half of it to another core, some tenths of a microsecond.
bool is_tiny(const Call& c) {
  const bool is_mixing = c.kind == kConvolution || c.kind == kLinear || c.kind == kByteConvolution || c.kind == kByteLinear;
  const int64_t window = std::max<int64_t>(1, c.kh * c.kw) * (is_mixing ? c.c_in / std::max<int64_t>(1, c.groups) : 1);
  return c.n * std::max(c.c_in * c.h * c.w, c.c_out * c.h_out * c.w_out * window) < 16384;
}

// Seconds of a clock that only goes on.
double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class Turns {
 public:
  Turns(int64_t layers, int64_t threads) : threads_(threads), layers_(new Layer[layers]) {}
  // Computes pieces of a layer by `work` as long as there are any, and returns when all are done.
  template <typename Work>
  void take(int64_t number, const Call& call, double* seconds, const Work& work) {
    Layer& layer = layers_[number];
    const int32_t pieces = is_tiny(call) ? 1 : static_cast<int32_t>(threads_);
    for (int32_t piece; (piece = layer.taken.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      if (seconds && !piece) layer.start = seconds_now();
      work(Member{piece, pieces});
      if (layer.done.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces && seconds) *seconds = seconds_now() - layer.start;
    }
    for (int spins = 0; layer.done.load(std::memory_order_acquire) < pieces; ++spins) wait(spins);
  }

 private:
  struct alignas(64) Layer {
    std::atomic<int32_t> taken{0}, done{0};
    double start = 0.0;  // when the first piece was taken
  };
  static constexpr int kSpins = 4000;  // some 50 to 100 microseconds
  static void wait(int spins) {
    if (spins > kSpins) return std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }
  const int64_t threads_;
  std::unique_ptr<Layer[]> layers_;
};

}  // namespace
