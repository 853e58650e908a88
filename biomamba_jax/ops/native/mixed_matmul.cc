// Products of float32 rows with weights of float32, bfloat16 or int8 on the CPU, for few rows, where reading the weights
// is what takes the time: each is read once, and widened in a register. All sums are float32.
#include "vectors.h"

namespace native {
namespace {

constexpr int64_t TASK = 1 << 16;  // weights that a thread handles at a time
constexpr int64_t AHEAD = 4096;    // bytes
constexpr int64_t LINE = 64;       // bytes that memory moves at once

struct BFloat16 {
  uint16_t bits;
};

inline V widen(const float* from) { return load(from); }

inline V widen(const BFloat16* from) {
#if defined(__AVX512F__)
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(__AVX2__)
  return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
  Bits bits;
  for (int i = 0; i < LANES; ++i) bits[i] = from[i].bits << 16;
  return (V)bits;
#endif
}

inline V widen(const int8_t* from) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  V v;
  for (int i = 0; i < LANES; ++i) v[i] = from[i];
  return v;
#endif
}

template <typename W>
inline V widen(const W* from, int count) {
  if (count == LANES) return widen(from);
  W padded[LANES]{};
  std::memcpy(padded, from, count * sizeof(W));
  return widen(padded);
}

template <typename W>
struct Product {
  int64_t rows, inputs, outputs;
  const float* x;      // [rows inputs]
  const W* weight;     // [outputs inputs]
  const float* scale;  // [outputs]; null for 1
  float* y;            // [rows outputs]

  // Fetches COUNT weights that are needed soon. The processor alone does not see that one row of weights follows another.
  template <int COUNT>
  void prefetch(const W* from) const {
    for (size_t byte = 0; byte < COUNT * sizeof(W); byte += LINE)
      __builtin_prefetch(reinterpret_cast<const char*>(from) + AHEAD + byte);
  }

  // One row times one output, in four sums.
  void dot(int64_t output) const {
    const W* w = weight + output * inputs;
    V sums[4]{};
    int64_t i = 0;
    for (; i + 4 * LANES <= inputs; i += 4 * LANES) {
      prefetch<4 * LANES>(w + i);
      sums[0] += widen(w + i) * load(x + i);
      sums[1] += widen(w + i + LANES) * load(x + i + LANES);
      sums[2] += widen(w + i + 2 * LANES) * load(x + i + 2 * LANES);
      sums[3] += widen(w + i + 3 * LANES) * load(x + i + 3 * LANES);
    }
    for (; i < inputs; i += LANES) {
      const int count = std::min<int64_t>(LANES, inputs - i);
      sums[0] += widen(w + i, count) * load(x + i, count);
    }
    write(0, output, sums[0] + sums[1] + sums[2] + sums[3]);
  }

  // R rows times O outputs, whose sums stay in registers.
  template <int R, int O>
  void tile(int64_t row, int64_t output) const {
    V sums[R][O]{};
    const auto add = [&](int64_t i, int count) __attribute__((always_inline)) {
      V w[O];
      for (int o = 0; o < O; ++o) w[o] = widen(weight + (output + o) * inputs + i, count);
      for (int r = 0; r < R; ++r) {
        const V v = load(x + (row + r) * inputs + i, count);
        for (int o = 0; o < O; ++o) sums[r][o] += w[o] * v;
      }
    };
    int64_t i = 0;
    for (; i + LANES <= inputs; i += LANES) {
      if (!row)
        for (int o = 0; o < O; ++o) prefetch<LANES>(weight + (output + o) * inputs + i);
      add(i, LANES);
    }
    if (i < inputs) add(i, inputs - i);
    for (int r = 0; r < R; ++r)
      for (int o = 0; o < O; ++o) write(row + r, output + o, sums[r][o]);
  }

  void write(int64_t row, int64_t output, V terms) const {
    y[row * outputs + output] = sum(terms) * (scale ? scale[output] : 1.f);
  }

  // All rows times O outputs, whose weights stay in the cache meanwhile.
  template <int O>
  void block(int64_t output) const {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) tile<4, O>(row, output);
    if (rows - row == 3) tile<3, O>(row, output);
    if (rows - row == 2) tile<2, O>(row, output);
    if (rows - row == 1) tile<1, O>(row, output);
  }

  void run(int64_t first, int64_t end) const {
    constexpr int O = LANES == 16 ? 4 : 3;  // of 32 registers, and of 16
    if (rows > 1)
      for (; first + O <= end; first += O) block<O>(first);
    for (; first < end; ++first) rows > 1 ? block<1>(first) : dot(first);
  }
};

template <typename W>
ffi::Error multiply(ffi::ThreadPool& pool, F32& x, ffi::AnyBuffer& weight, F32& scale, F32& y) {
  const Product<W> product{x.dimensions()[0], x.dimensions()[1], weight.dimensions()[0],
                           x.typed_data(), static_cast<const W*>(weight.untyped_data()), optional(scale),
                           y.typed_data()};
  const int64_t outputs = 12 * cdiv(TASK, 12 * product.inputs);  // whole tiles
  parallel(pool, cdiv(product.outputs, outputs), [&](int64_t task) {
    product.run(task * outputs, std::min(product.outputs, (task + 1) * outputs));
  });
  return ffi::Error::Success();
}

ffi::Error run(ffi::ThreadPool pool, F32 x, F32 scale, ffi::AnyBuffer weight, ffi::Result<F32> y) {
  switch (weight.element_type()) {
    case ffi::DataType::F32: return multiply<float>(pool, x, weight, scale, *y);
    case ffi::DataType::BF16: return multiply<BFloat16>(pool, x, weight, scale, *y);
    case ffi::DataType::S8: return multiply<int8_t>(pool, x, weight, scale, *y);
    default: return ffi::Error::InvalidArgument("mixed_matmul: weights must be float32, bfloat16 or int8");
  }
}

}  // namespace
}  // namespace native

XLA_FFI_DEFINE_HANDLER_SYMBOL(mixed_matmul, native::run,
                              xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Arg<native::F32>().Arg<native::F32>()
                                  .Arg<xla::ffi::AnyBuffer>().Ret<native::F32>());
