// Products of float32 rows with weights of float32, bfloat16 or int8 on the CPU, for few rows, where reading the weights
// is what takes the time: each is read once, and widened in a register. All sums are float32.
#include "vectors.h"

namespace native {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;

constexpr int64_t TASK = 1 << 16;  // weights that a thread handles at a time

struct BFloat16 {
  uint16_t bits;
};

inline V widen(const float* from) { return load(from); }

inline V widen(const BFloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
  typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
  Halves v;
  std::memcpy(&v, from, sizeof v);
  return (V)(__builtin_convertvector(v, Words) << 16);
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

  // R rows times O outputs, whose sums stay in registers; a vector holds inputs.
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
    for (; i + LANES <= inputs; i += LANES) add(i, LANES);
    if (i < inputs) add(i, inputs - i);
    for (int r = 0; r < R; ++r)
      for (int o = 0; o < O; ++o)
        y[(row + r) * outputs + output + o] = sum(sums[r][o]) * (scale ? scale[output + o] : 1.f);
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
    for (; first + 4 <= end; first += 4) block<4>(first);
    for (; first < end; ++first) block<1>(first);
  }
};

template <typename W>
ffi::Error multiply(ffi::ThreadPool& pool, F32& x, ffi::AnyBuffer& weight, F32& scale, F32& y) {
  const Product<W> product{x.dimensions()[0], x.dimensions()[1], weight.dimensions()[0],
                           x.typed_data(), static_cast<const W*>(weight.untyped_data()), optional(scale),
                           y.typed_data()};
  const int64_t outputs = 4 * cdiv(TASK, 4 * product.inputs);
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
