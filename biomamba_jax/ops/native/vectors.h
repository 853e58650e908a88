// XLA's buffers; vectors of the CPU that the compiler targets, their exponential and logarithm; loops on XLA's threads.
//
// GCC's and Clang's vector extensions work on every architecture; the compiler's flags choose AVX2, AVX-512 or others.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace native {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using Out = ffi::Result<F32>;

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES)));

inline int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The pointer of an optional input; null if the caller gave none.
template <typename Buffer>
auto optional(Buffer& v) {
  return v.element_count() ? v.typed_data() : nullptr;
}

inline V load(const float* from, int count = LANES) {
  V v{};
  if (count == LANES) {
    std::memcpy(&v, from, sizeof v);
  } else {
    for (int i = 0; i < count; ++i) v[i] = from[i];
  }
  return v;
}

inline void store(V v, float* to, int count = LANES) {
  if (count == LANES) {
    std::memcpy(to, &v, sizeof v);
  } else {
    for (int i = 0; i < count; ++i) to[i] = v[i];
  }
}

// [channels N] in memory <-> [N] vectors of channels.
inline void load_columns(const float* from, int64_t N, int count, float scale, V* to) {
  for (int64_t n = 0; n < N; ++n) {
    to[n] = V{};
    for (int i = 0; i < count; ++i) to[n][i] = from[i * N + n] * scale;
  }
}

inline void store_columns(const V* from, int64_t N, int count, float* to) {
  for (int64_t n = 0; n < N; ++n)
    for (int i = 0; i < count; ++i) to[i * N + n] = from[n][i];
}

inline float sum(V v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#elif defined(__AVX__)
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
#endif
}

// The sums of 8 vectors.
inline void sum8(const V* v, float* to) {
#if defined(__AVX__) && !defined(__AVX512F__)
  const V a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const V b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  store((V)_mm256_permute2f128_ps(a, b, 0x20) + (V)_mm256_permute2f128_ps(a, b, 0x31), to);
#else
  for (int i = 0; i < 8; ++i) to[i] = sum(v[i]);
#endif
}

constexpr float LOG2_E = 1.44269504f, LOG2_E_REST = 1.92596303e-8f;
constexpr float TO_INTEGER = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, held in the lowest bits

// 2^f times 2^n, where f is in [-1/2, 1/2] and n the lowest bits of `rounded`. The polynomial is the minimax one of
// degree 5 with the constant 1: its error, 9e-8 relative, vanishes with f, so that decays next to 1 have no bias.
inline V scaled_exp2(V f, V rounded) {
  V p = 1.32647e-3f * f + 9.67151e-3f;
  p = p * f + 5.550734e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314698e-1f;
  p = p * f + 1.f;
  return (V)((Bits)p + ((Bits)rounded << 23));
}

// The larger and the smaller value, v where it is NaN. Compilers that heed NaN make two instructions of a selection.
inline V at_least(float bound, V v) {
#if defined(__AVX512F__)
  return _mm512_max_ps(_mm512_set1_ps(bound), v);
#elif defined(__AVX__)
  return _mm256_max_ps(_mm256_set1_ps(bound), v);
#else
  return v < bound ? V{} + bound : v;
#endif
}

inline V at_most(float bound, V v) {
#if defined(__AVX512F__)
  return _mm512_min_ps(_mm512_set1_ps(bound), v);
#elif defined(__AVX__)
  return _mm256_min_ps(_mm256_set1_ps(bound), v);
#else
  return v > bound ? V{} + bound : v;
#endif
}

// 2^v, at least 2^-126 and from 2^128 on infinity; NaN stays NaN.
inline V exp2(V v) {
  v = at_most(128.f, at_least(-126.f, v));
  V rounded = v + TO_INTEGER;
  return scaled_exp2(v - (rounded - TO_INTEGER), rounded);
}

// e^v for v <= 0, to the last bits of its result.
inline V exp_negative(V v) {
  v = at_least(-87.f, v);
  V rounded = v * LOG2_E + TO_INTEGER;
  return scaled_exp2((v * LOG2_E - (rounded - TO_INTEGER)) + v * LOG2_E_REST, rounded);
}

// log(1 + v) for v in [0, 1] as 2 atanh(v / (2 + v)); relative error 1e-10 before rounding.
inline V log1p(V v) {
  V s = v / (2.f + v), t = s * s;
  V p = 2.42895580e-1f * t + 2.14307410e-1f;
  p = p * t + 2.86165970e-1f;
  p = p * t + 3.99988880e-1f;
  p = p * t + 6.66666760e-1f;
  return s * (p * t + 2.f);
}

inline V absolute(V v) { return (V)((Bits)v & 0x7fffffff); }

struct Softplus {
  V value, derivative;  // log(1 + e^v), 1 / (1 + e^-v)
};

inline Softplus softplus(V v) {
  V w = exp_negative(-absolute(v)), inverse = 1.f / (1.f + w);
  return {(v > 0.f ? v : V{}) + log1p(w), v > 0.f ? inverse : w * inverse};
}

inline V sigmoid(V v) {
  V w = exp_negative(-absolute(v)), inverse = 1.f / (1.f + w);
  return v > 0.f ? inverse : w * inverse;
}

// Calls f(0) ... f(count - 1) on this thread and XLA's. This thread takes its share and then waits only for calls that
// run already, so a pool whose threads are all busy delays nothing; a thread that comes late finds no call left.
template <typename F>
void parallel(xla::ffi::ThreadPool pool, int64_t count, const F& f) {
  struct Progress {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, count, &f] {
    int64_t calls = 0;
    for (int64_t i; (i = progress->next++) < count; ++calls) f(i);
    if (!calls) return;
    std::lock_guard<std::mutex> lock(progress->mutex);
    if ((progress->done += calls) == count) progress->all_done.notify_all();
  };
  for (int64_t i = std::min(pool.num_threads(), count); i > 1; --i) pool.Schedule([work] { work(); });
  work();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done == count; });
}

}  // namespace native
