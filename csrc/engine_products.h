// Part of Engine: the three products of a linear layer, in the state's precision or on bfloat16 operands.

  // Weights in the order in which the kernels read them, once per call; threads share the work.
  void pack(const Local& l) const {
    for (int p = 0; p < int(plan.params.size()); ++p) {
      const Param& w = plan.params[p];
      if (!w.matrix || p % l.threads != l.thread) continue;
      const T* source = static_cast<const T*>(call.params[p]);
      if constexpr (std::is_same<T, float>::value) {
        if (call.bf16) {
          pack_bf16(source, w, packed[p], backward ? const_cast<T*>(plain[p]) : nullptr);
          continue;
        }
      }
      if (packed[p]) pack_rows<T, NV>(source, w.cols, w.rows, w.cols, packed[p]);
    }
  }

#ifdef GK_BF16
  using LowProduct = Pairs;
  static void pack_bf16(const float* w, const Param& shape, float* forward_copy, float* backward_copy) {
    const long half = (shape.cols + 1) / 2;
    if (forward_copy)  // pairs along the input, then blocks as for floats
      pack_pairs(w, shape, forward_copy, half);
    if (backward_copy)  // pairs along the output
      for (long j = 0; j < shape.rows; j += 2)
        for (long k = 0; k < shape.cols; ++k)
          backward_copy[j / 2 * shape.cols + k] =
              pair(w[j * shape.cols + k], j + 1 < shape.rows ? w[(j + 1) * shape.cols + k] : 0.0f);
  }
  static void pack_pairs(const float* w, const Param& shape, float* out, long half) {
    const int blocks = (shape.rows + kMaxRows<NV> - 1) / kMaxRows<NV>;
    const int base = shape.rows / blocks, longer = shape.rows % blocks;
    for (int b = 0, first = 0; b < blocks; ++b) {
      const int n = base + (b < longer);
      for (long l = 0; l < half; ++l)
        for (int i = 0; i < n; ++i) {
          const float* row = w + long(first + i) * shape.cols;
          out[first * half + l * n + i] = pair(row[2 * l], 2 * l + 1 < shape.cols ? row[2 * l + 1] : 0.0f);
        }
      first += n;
    }
  }
  static float pair(float low, float high) {
    const V<float> both = {low, high};
    const V<float> rounded = round_bf16(both);
    uint32_t bits[2];
    const float parts[2] = {rounded[0], rounded[1]};
    __builtin_memcpy(bits, parts, 8);
    const uint32_t word = bits[1] | (bits[0] >> 16);
    float out;
    __builtin_memcpy(&out, &word, 4);
    return out;
  }
#else
  // Without bfloat16 products: operands rounded, multiplied as floats. The same results up to the order of sums.
  using LowProduct = Plain<float>;
  static void pack_bf16(const float* w, const Param& shape, float* forward_copy, float* backward_copy) {
    if (forward_copy) {
      pack_rows<float, NV>(w, shape.cols, shape.rows, shape.cols, forward_copy);
      round_bf16(forward_copy, shape.size(), forward_copy);
    }
    if (backward_copy) round_bf16(w, shape.size(), backward_copy);
  }
#endif

  // y = W x + b
  void product_forward(const Local& l, const Op& op, const T* x, T* y) const {
    const Param& w = plan.params[op.param[0]];
    const T* bias = param(op.param[1]);
    const int init = bias ? kBias : kZero;
    if constexpr (std::is_same<T, float>::value) {
      if (call.bf16) {
#ifdef GK_BF16
        pair_rows(x, R, w.cols, R, l.operand, R);
        Gemm<float, Pairs, NV>::run(packed[op.param[0]], 0, true, w.rows, (w.cols + 1) / 2, l.operand, R, y, R, init,
                                    bias);
#else
        round_bf16(x, long(w.cols) * R, l.operand);
        Gemm<T, Product, NV>::run(packed[op.param[0]], 0, true, w.rows, w.cols, l.operand, R, y, R, init, bias);
#endif
        return;
      }
    }
    Gemm<T, Product, NV>::run(packed[op.param[0]], 0, true, w.rows, w.cols, x, R, y, R, init, bias);
  }

  // dx (+)= W^T g
  void product_backward_input(const Local& l, const Op& op, const T* g, T* dx, bool add) const {
    const Param& w = plan.params[op.param[0]];
    const int init = add ? kAdd : kZero;
    if constexpr (std::is_same<T, float>::value) {
      if (call.bf16) {
#ifdef GK_BF16
        pair_rows(g, R, w.rows, R, l.operand, R);
        Gemm<float, Pairs, NV>::run(plain[op.param[0]], w.cols, false, w.cols, (w.rows + 1) / 2, l.operand, R, dx, R,
                                    init, nullptr);
#else
        round_bf16(g, long(w.rows) * R, l.operand);
        Gemm<T, Product, NV>::run(plain[op.param[0]], w.cols, false, w.cols, w.rows, l.operand, R, dx, R, init, nullptr);
#endif
        return;
      }
    }
    Gemm<T, Product, NV>::run(plain[op.param[0]], w.cols, false, w.cols, w.rows, g, R, dx, R, init, nullptr);
  }

  // dW += g x^T over the rows of the tile. Both are turned to [row][width], so that dW has inputs along the lanes.
  void product_backward_weight(const Local& l, const Op& op, const T* x, const T* g, long tile, T* dw) const {
    const Param& w = plan.params[op.param[0]];
    // Whole blocks of features are turned: tiles have room for them, and padding columns end up in padding of dW.
    const long ld = GK_ROUND_UP(w.cols, L), ldt = padded;
    long depth = valid(tile);
    const T* coef = l.gradient;
    if constexpr (std::is_same<T, float>::value) {
      if (call.bf16) {
#ifdef GK_BF16
        depth = (depth + 1) / 2;
        pair_columns(x, w.cols, l.operand);
        transpose_padded(l.operand, R / 2, w.cols, R / 2, l.transposed, ldt);
        pair_columns(g, w.rows, l.operand);
        transpose_padded(l.operand, R / 2, w.rows, R / 2, l.gradient, ldt);
        accumulate_weight<LowProduct>(coef, w, depth, l.transposed, ldt, dw, ld);
#else
        round_bf16(x, long(w.cols) * R, l.operand);
        transpose_padded(l.operand, R, w.cols, R, l.transposed, ldt);
        round_bf16(g, long(w.rows) * R, l.operand);
        transpose_padded(l.operand, R, w.rows, R, l.gradient, ldt);
        accumulate_weight<Product>(coef, w, depth, l.transposed, ldt, dw, ld);
#endif
        return;
      }
    }
    transpose_padded(x, R, w.cols, R, l.transposed, ldt);
    transpose_padded(g, R, w.rows, R, l.gradient, ldt);
    accumulate_weight<Product>(coef, w, depth, l.transposed, ldt, dw, ld);
  }

  template <class P>
  static void accumulate_weight(const T* coef, const Param& w, long depth, const T* x, long ldx, T* dw, long ld) {
    long c = 0;
    for (; c + 4 * L <= ld; c += 4 * L)
      Gemm<T, P, 4>::run(coef, ldx, false, w.rows, depth, x + c, ldx, dw + c, ld, kAdd, nullptr);
    for (; c + 2 * L <= ld; c += 2 * L)
      Gemm<T, P, 2>::run(coef, ldx, false, w.rows, depth, x + c, ldx, dw + c, ld, kAdd, nullptr);
    for (; c < ld; c += L)
      Gemm<T, P, 1>::run(coef, ldx, false, w.rows, depth, x + c, ldx, dw + c, ld, kAdd, nullptr);
  }

#ifdef GK_BF16
  // words[c][r / 2] = (bf16 x[c][r], bf16 x[c][r + 1])
  static void pair_columns(const float* x, int width, float* words) {
    uint16_t* out = reinterpret_cast<uint16_t*>(words);
    for (long i = 0; i < long(width) * R; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
  }
#endif
