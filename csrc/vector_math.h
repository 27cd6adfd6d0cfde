// Elementary functions on vectors. float: own minimax fits, a few units in the last place; double: the C library,
// lane by lane, since double exists for checking gradients and not for speed.

// Written out for x86: compilers do not turn the loop over lanes into one instruction.
template <class T>
GK_INLINE V<T> vsqrt(V<T> x) {
#if defined(GK_X86) && GK_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return V<T>(_mm512_sqrt_ps(__m512(x)));
  if constexpr (sizeof(T) == 8) return V<T>(_mm512_sqrt_pd(__m512d(x)));
#elif defined(GK_X86) && GK_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) return V<T>(_mm256_sqrt_ps(__m256(x)));
  if constexpr (sizeof(T) == 8) return V<T>(_mm256_sqrt_pd(__m256d(x)));
#elif defined(GK_X86)
  if constexpr (sizeof(T) == 4) return V<T>(_mm_sqrt_ps(__m128(x)));
  if constexpr (sizeof(T) == 8) return V<T>(_mm_sqrt_pd(__m128d(x)));
#else
  for (int i = 0; i < kLanes<T>; ++i) x[i] = sizeof(T) == 4 ? T(__builtin_sqrtf(float(x[i]))) : T(__builtin_sqrt(x[i]));
  return x;
#endif
}

#if defined(GK_X86) && GK_VECTOR_BYTES == 64
// GCC warns of the undefined lanes of intrinsics without a mask.
constexpr __mmask16 kAll = __mmask16(-1);
#endif

// The nearest whole number, |x| < 2^22.
GK_INLINE V<float> round_to_even(V<float> x) {
#if defined(GK_X86) && GK_VECTOR_BYTES == 64
  return V<float>(_mm512_maskz_roundscale_ps(kAll, __m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const V<float> magic = splat<float>(12582912.0f);  // 1.5 · 2^23
  return (x + magic) - magic;
#endif
}

// The smaller and the larger; NaN where x is NaN.
GK_INLINE V<float> vmin(float limit, V<float> x) {
#if defined(GK_X86) && GK_VECTOR_BYTES == 64
  return V<float>(_mm512_maskz_min_ps(kAll, _mm512_set1_ps(limit), __m512(x)));
#else
  return x > limit ? splat<float>(limit) : x;
#endif
}
GK_INLINE V<float> vmax(float limit, V<float> x) {
#if defined(GK_X86) && GK_VECTOR_BYTES == 64
  return V<float>(_mm512_maskz_max_ps(kAll, _mm512_set1_ps(limit), __m512(x)));
#else
  return x < limit ? splat<float>(limit) : x;
#endif
}

// 2^n for whole n in -126 .. 127.
GK_INLINE V<float> vpower_of_two(V<float> n) {
  return (V<float>)((__builtin_convertvector(n, Simd<float>::I) + 127) << 23);
}

// e^x = 2^n (1 + q) with x = n ln 2 + r, |r| <= ln 2 / 2. q is e^r - 1, to a few units in its last place.
GK_INLINE void vexp_parts(V<float> x, V<float>& n, V<float>& q) {
  n = round_to_even(x * 1.44269504088896341f);
  const V<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V<float> p = splat<float>(1.3813144392e-3f);
  p = p * r + 8.3694188465e-3f;
  p = p * r + 4.1668456790e-2f;
  p = p * r + 1.6666514791e-1f;
  p = p * r + 4.9999993051e-1f;
  q = p * (r * r) + r;
}

// e^x, relative error about 1e-7; 0 below -87.3 and e^88.3 above.
GK_INLINE V<float> vexp(V<float> x) {
  V<float> n, q;
#if defined(GK_X86) && GK_VECTOR_BYTES == 64
  vexp_parts(vmax(-104.0f, vmin(88.3f, x)), n, q);  // what is subnormal on the way down to 0 is flushed
  return V<float>(_mm512_maskz_scalef_ps(kAll, __m512(q + 1.0f), __m512(n)));
#else
  vexp_parts(vmin(88.3f, x), n, q);
  return x < -87.3f ? V<float>{} : (q + 1.0f) * vpower_of_two(n);
#endif
}

GK_INLINE V<float> vsigmoid(V<float> x) { return 1.0f / (1.0f + vexp(-x)); }

// (e^2x - 1) / (e^2x + 1), from e^2x - 1 without cancellation: relative error below 2e-7 for all x.
GK_INLINE V<float> vtanh(V<float> x) {
  V<float> n, q;
  vexp_parts(2.0f * vmax(-9.02f, vmin(9.02f, x)), n, q);
  const V<float> power = vpower_of_two(n);
  const V<float> e = q * power + (power - 1.0f);
  return e / (e + 2.0f);
}

// Phi(x) and phi(x), the normal distribution and its density: what GELU and its derivative are made of.
// erfc(u) = exp(-u²) t Q(t), t = 1 / (1 + u/2): one exponential serves both.
GK_INLINE void vnormal(V<float> x, V<float>& distribution, V<float>& density) {
  const V<float> u = (x < 0.0f ? -x : x) * 0.70710678118654752f;
  const V<float> e = vexp(-u * u);
  const V<float> t = 1.0f / (1.0f + 0.5f * u);
  V<float> q = splat<float>(6.9312870434e-3f);
  q = q * t - 9.5076228718e-2f;
  q = q * t + 3.6501829300e-1f;
  q = q * t - 5.8830628450e-1f;
  q = q * t + 3.5657322041e-1f;
  q = q * t - 6.5532761271e-2f;
  q = q * t + 2.1494772155e-1f;
  q = q * t + 2.4074291135e-1f;
  q = q * t + 2.8262664885e-1f;
  q = q * t + 2.8207516355e-1f;
  const V<float> half = 0.5f * (e * t * q);
  distribution = x < 0.0f ? half : 1.0f - half;
  density = e * 0.39894228040143268f;
}

// ln x for normal positive x.
GK_INLINE V<float> vlog(V<float> x) {
  using I = Simd<float>::I;
  // exponent and mantissa in [sqrt(1/2), sqrt(2))
  const I bits = (I)(x);
  const I exponent = (bits - 0x3f3504f3) >> 23;
  const I mantissa = bits - (exponent << 23);
  const V<float> f = (V<float>)(mantissa) - 1.0f;
  const V<float> n = __builtin_convertvector(exponent, V<float>);
  V<float> p = splat<float>(-7.6344930240e-2f);
  p = p * f + 1.2761575644e-1f;
  p = p * f - 1.3160183063e-1f;
  p = p * f + 1.4201758234e-1f;
  p = p * f - 1.6623357298e-1f;
  p = p * f + 2.0001226865e-1f;
  p = p * f - 2.5000821036e-1f;
  p = p * f + 3.3333331708e-1f;
  const V<float> s = f * f;
  return n * 0.693359375f + (f + (p * s * f - 0.5f * s - n * 2.12194440e-4f));
}

// cos and sin of 2 pi u for u in (0, 1): the reduction by quarter turns is exact.
GK_INLINE void vcossin_turns(V<float> u, V<float>& cosine, V<float>& sine) {
  using I = Simd<float>::I;
  const V<float> quarter = round_to_even(4.0f * u);
  const V<float> r = u - 0.25f * quarter;
  const V<float> s = r * r;
  V<float> p = splat<float>(-75.391512960f);
  p = p * s + 81.592313449f;
  p = p * s - 41.341661268f;
  p = p * s + 6.2831852867f;
  const V<float> sin_r = p * r;
  V<float> q = splat<float>(59.218803817f);
  q = q * s - 85.442808428f;
  q = q * s + 64.939315845f;
  q = q * s - 19.739208649f;
  const V<float> cos_r = q * s + 1.0f;
  const I k = __builtin_convertvector(quarter, I) & 3;
  const I swap = (k & 1) != 0;
  const V<float> c = swap ? sin_r : cos_r, d = swap ? cos_r : sin_r;
  cosine = ((k == 1) | (k == 2)) ? -c : c;
  sine = k >= 2 ? -d : d;
}

template <double (*F)(double)>
GK_INLINE V<double> lanewise(V<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = F(x[i]);
  return x;
}
GK_INLINE V<double> vexp(V<double> x) { return lanewise<::exp>(x); }
GK_INLINE V<double> vlog(V<double> x) { return lanewise<::log>(x); }
GK_INLINE V<double> vtanh(V<double> x) { return lanewise<::tanh>(x); }
GK_INLINE V<double> vsigmoid(V<double> x) { return 1.0 / (1.0 + vexp(-x)); }
GK_INLINE void vnormal(V<double> x, V<double>& distribution, V<double>& density) {
  distribution = 0.5 * lanewise<::erfc>(x * -0.70710678118654752440);
  density = vexp(-0.5 * x * x) * 0.39894228040143267794;
}

// e^x − 1 for x <= 0, through tanh(x / 2), which keeps its digits near 0; what it gives for x > 0 is not used.
template <class W>
GK_INLINE W vexpm1_negative(W x) {
  const W t = vtanh(W(x * 0.5f));
  return t * 2.0f / (1.0f - t);
}

// ln(1 + e^x) = max(x, 0) + log1p(e^-|x|), and x above 20. log1p(e) = ln(u) e / (u − 1) with u = 1 + e as rounded.
template <class W>
GK_INLINE W vsoftplus(W x) {
  const W e = vexp(W(x < 0.0f ? x : -x));
  const W u = e + 1.0f, rounded = u - 1.0f;
  const W low = rounded == 0.0f ? e : vlog(u) * e / rounded;
  return x > 20.0f ? x : (x < 0.0f ? W{} : x) + low;
}

GK_INLINE void vcossin_turns(V<double> u, V<double>& cosine, V<double>& sine) {
  cosine = lanewise<::cos>(u * 6.28318530717958647693);
  sine = lanewise<::sin>(u * 6.28318530717958647693);
}

