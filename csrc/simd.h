// One SIMD vector type per element type, in GCC and Clang vector extensions, for the instruction set this file is
// compiled for. Included once per instruction set inside its own namespace: nothing here may leak into another's code,
// so no standard containers or templates are used in the kernels either.
#ifndef GK_VECTOR_BYTES
#error "define GK_VECTOR_BYTES and GK_ACCUMULATORS before including simd.h"
#endif

#define GK_INLINE inline __attribute__((always_inline))

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(GK_VECTOR_BYTES)));
  typedef float U __attribute__((vector_size(GK_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(GK_VECTOR_BYTES)));
  static constexpr int lanes = GK_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(GK_VECTOR_BYTES)));
  typedef double U __attribute__((vector_size(GK_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(GK_VECTOR_BYTES)));
  static constexpr int lanes = GK_VECTOR_BYTES / 8;
};

template <class T>
using V = typename Simd<T>::V;
template <class T>
constexpr int kLanes = Simd<T>::lanes;

template <class T>
GK_INLINE V<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::U*>(p);
}
template <class T>
GK_INLINE void store(T* p, V<T> v) {
  *reinterpret_cast<typename Simd<T>::U*>(p) = v;
}
// The first n lanes alone: the others are not read (and zero), or not written.
template <class T>
GK_INLINE V<T> load_first(const T* p, long n) {
#if defined(GK_X86) && GK_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return V<T>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
  if constexpr (sizeof(T) == 8) return V<T>(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
#else
  T part[kLanes<T>] = {};
  for (long i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
#endif
}
template <class T>
GK_INLINE void store_first(T* p, V<T> v, long n) {
#if defined(GK_X86) && GK_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), __m512(v));
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), __m512d(v));
#else
  for (long i = 0; i < n; ++i) p[i] = v[i];
#endif
}
template <class T>
GK_INLINE V<T> splat(T x) {
  return x - V<T>{};  // x - 0 is x to the compiler; x + 0 is not, for -0
}

// The sum of the lanes, in a fixed order: halves are added until one number is left.
template <class T>
GK_INLINE T horizontal_sum(V<T> v) {
  T part[kLanes<T>];
  store(part, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

// dst[c][r] = src[r][c] for r < rows, c < cols; leading dimensions in elements. Square blocks of lanes × lanes are
// transposed in registers by log2(lanes) rounds of pairwise interleaving.
template <class T, int... I>
GK_INLINE void interleave_round(V<T>* v, std::integer_sequence<int, I...>) {
  constexpr int L = kLanes<T>;
  V<T> out[L];
#pragma GCC unroll 16
  for (int i = 0; i < L / 2; ++i) {
    out[2 * i] = __builtin_shufflevector(v[i], v[i + L / 2], ((I % 2) * L + I / 2)...);
    out[2 * i + 1] = __builtin_shufflevector(v[i], v[i + L / 2], ((I % 2) * L + I / 2 + L / 2)...);
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) v[i] = out[i];
}

template <class T>
GK_INLINE void transpose_registers(V<T>* v) {
  for (int width = kLanes<T>; width > 1; width /= 2)
    interleave_round<T>(v, std::make_integer_sequence<int, kLanes<T>>{});
}

template <class T>
GK_INLINE void transpose_block(const T* src, long ld_src, T* dst, long ld_dst) {
  constexpr int L = kLanes<T>;
  V<T> v[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) v[i] = load(src + i * ld_src);
  transpose_registers<T>(v);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) store(dst + i * ld_dst, v[i]);
}

// The same in whole blocks: src is read up to whole blocks of rows and columns, dst written likewise. For buffers that
// have the room; what lands beyond rows and cols is not to be used.
template <class T>
void transpose_padded(const T* src, long ld_src, long rows, long cols, T* dst, long ld_dst) {
  constexpr int L = kLanes<T>;
  for (long r = 0; r < rows; r += L)
    for (long c = 0; c < cols; c += L) transpose_block(src + r * ld_src + c, ld_src, dst + c * ld_dst + r, ld_dst);
}

template <class T>
void transpose(const T* src, long ld_src, long rows, long cols, T* dst, long ld_dst) {
  constexpr int L = kLanes<T>;
  const long full_rows = rows - rows % L, full_cols = cols - cols % L;
  for (long r = 0; r < full_rows; r += L)
    for (long c = 0; c < full_cols; c += L)
      transpose_block(src + r * ld_src + c, ld_src, dst + c * ld_dst + r, ld_dst);
  for (long r = 0; r < rows; ++r)
    for (long c = r < full_rows ? full_cols : 0; c < cols; ++c) dst[c * ld_dst + r] = src[r * ld_src + c];
}
