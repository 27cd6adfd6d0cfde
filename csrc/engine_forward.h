// Part of Engine: forward of a range of operations on one tile, BatchNorm across tiles, and the walk over steps.

  void run_ops(Local& l, long tile, long k, int begin, int end) const {
    const View value = values(l, tile, k);
    for (int i = begin; i < end; ++i) {
      const Op& op = plan.ops[i];
      const T* x = value[op.in[0]];
      T* y = value[op.out];
      const long n = long(op.width) * R;
      switch (op.kind) {
        case Kind::Linear:
          product_forward(l, op, x, y);
          break;
        case Kind::BatchNorm:  // statistics known: the fresh ones of the segment before, or those of the first time
          batch_norm_coefficients(op, stats_row(k) + op.stats, stats_row(k) + op.stats + op.width, l.mean, l.scale);
          Tile::forward(x, op.width, l.mean, l.scale, param(op.param[1]), y);
          break;
        case Kind::BatchNormEval:
          batch_norm_coefficients(op, param(op.param[2]), param(op.param[3]), l.mean, l.scale);
          Tile::forward(x, op.width, l.mean, l.scale, param(op.param[1]), y);
          break;
        case Kind::LayerNorm:
        case Kind::RmsNorm:
          RowNorm<T, NV>::forward(x, op.width, op.kind == Kind::LayerNorm, T(op.attr[0]), param(op.param[0]),
                                  param(op.param[1]), valid(tile), y, value.norm(i));
          break;
        case Kind::Add: {
          const T* b = value[op.in[1]];
          for (long j = 0; j < n; j += L) store(y + j, V<T>(load(x + j) + load(b + j)));
          break;
        }
        case Kind::Mul: {
          const T* b = value[op.in[1]];
          for (long j = 0; j < n; j += L) store(y + j, V<T>(load(x + j) * load(b + j)));
          break;
        }
        case Kind::Affine:
          for (long j = 0; j < n; j += L) store(y + j, V<T>(load(x + j) * T(op.attr[0]) + T(op.attr[1])));
          break;
        case Kind::Slice:
          x += long(op.attr[0]) * R;
          if (y != x) __builtin_memcpy(y, x, sizeof(T) * n);  // equal: a view of the state
          break;
        case Kind::Concat:
          for (size_t j = 0; j < op.in.size(); ++j) {
            const long size = long(plan.width[op.in[j]]) * R;
            const T* part = value[op.in[j]];
            if (part != y) __builtin_memcpy(y, part, sizeof(T) * size);  // equal: computed there
            y += size;
          }
          break;
        default:
          Activation<T>{op.kind, T(op.attr[0])}.forward(x, y, n);
      }
    }
  }

  T* stats_row(long k) const { return static_cast<T*>(call.stats) + k * plan.stats_width; }

  // The mean, and scale = weight / sqrt(var + eps), per feature.
  void batch_norm_coefficients(const Op& op, const T* mean, const T* var, T* mean_out, T* scale_out) const {
    const T* weight = param(op.param[0]);
    const T eps = T(op.attr[0]);
    int c = 0;
    for (; c + L <= op.width; c += L) {
      store(mean_out + c, load(mean + c));
      store(scale_out + c, V<T>((weight ? load(weight + c) : splat<T>(1)) / vsqrt<T>(load(var + c) + eps)));
    }
    for (; c < op.width; ++c) {
      const V<T> root = vsqrt<T>(splat<T>(var[c] + eps));
      mean_out[c] = mean[c];
      scale_out[c] = (weight ? weight[c] : T(1)) / root[0];
    }
  }

  T* partial_of(const Local& l, long tile) const { return partial + (l.parity * t.tiles + tile) * 2 * padded; }

  // Batch statistics of a BatchNorm's input: moments per tile, all tiles, then combined in their order (Chan et al.,
  // 1983). Every thread combines for itself: cheaper than a second meeting.
  void batch_moments(Local& l, long k, int at) {
    const Op& op = plan.ops[at];
    each_tile(l, [&](long tile, long) {
      set_mask(l, tile);
      Tile::moments(values(l, tile, k)[op.in[0]], op.width, l.mask, valid(tile), partial_of(l, tile), padded);
    });
    barrier.wait(l.threads);
    const int n = GK_ROUND_UP(op.width, L);
    for (int c = 0; c < n; c += L) {
      V<T> mean = load(partial_of(l, 0) + c), square = load(partial_of(l, 0) + padded + c);
      T count = T(valid(0));
      for (long tile = 1; tile < t.tiles; ++tile) {
        const T more = T(valid(tile)), share = more / (count + more);
        const V<T> delta = load(partial_of(l, tile) + c) - mean;
        square += load(partial_of(l, tile) + padded + c) + delta * delta * (count * share);
        mean += delta * share;
        count += more;
      }
      store(l.offset + c, mean);
      store(l.slope + c, V<T>(square / count));
    }
    l.parity ^= 1;
    // All threads find the same numbers and need them in run_ops; each writes them, to its own copy except for one.
    if (l.thread == 0) {
      __builtin_memcpy(stats_row(k) + op.stats, l.offset, sizeof(T) * op.width);
      __builtin_memcpy(stats_row(k) + op.stats + op.width, l.slope, sizeof(T) * op.width);
    }
  }

  // After batch_moments: the BatchNorm itself, from this thread's own copy of the statistics.
  void apply_batch_norm(Local& l, long tile, long k, int at) const {
    const Op& op = plan.ops[at];
    const View value = values(l, tile, k);
    Tile::forward(value[op.in[0]], op.width, l.batch_mean, l.batch_scale, param(op.param[1]), value[op.out]);
  }

  // The denoiser on all of this thread's tiles at step k, meeting the other threads at each BatchNorm.
  void run_coupled(Local& l, long k) {
    int begin = 0;
    each_tile(l, [&](long tile, long) { load_tables(l, tile, k); });
    for (size_t b = 0; b <= plan.batch_norms.size(); ++b) {
      const int end = b < plan.batch_norms.size() ? plan.batch_norms[b] : int(plan.ops.size());
      each_tile(l, [&](long tile, long) {
        if (b > 0) apply_batch_norm(l, tile, k, plan.batch_norms[b - 1]);
        run_ops(l, tile, k, begin, end);
      });
      if (b == plan.batch_norms.size()) break;
      batch_moments(l, k, end);
      batch_norm_coefficients(plan.ops[end], l.offset, l.slope, l.batch_mean, l.batch_scale);
      begin = end + 1;
    }
  }

  // z' = a z + b prediction + s noise, into the next step's arena, or `last` after the last step.
  void ddim_update(Local& l, long tile, long k, T* last) const {
    const double* c = call.coefficients + 3 * k;
    const T a = T(c[0]), b = T(c[1]), s = T(c[2]);
    const View value = values(l, tile, k);
    const T *z = value[0], *prediction = value[plan.output];
    T* next = k + 1 < call.steps ? values(l, tile, k + 1)[0] : last;
    if (s != T(0)) draw(tile, uint32_t(k + 1), l.noise);
    for (long i = 0; i < long(plan.features) * R; i += L) {
      V<T> out = a * load(z + i) + b * load(prediction + i);
      if (s != T(0)) out += s * load(l.noise + i);
      store(next + i, out);
    }
  }

  void keep_state(const Local& l, long tile, long k) const {
    if (call.save == kSaveStates && !call.prior)
      __builtin_memcpy(saved_state(k, tile), values(l, tile, k)[0], sizeof(T) * plan.features * R);
  }

  void forward_thread(int thread, int threads) {
    Local l = local(thread, threads);
    pack(l);
    barrier.wait(threads);
    if (!coupled) {
      each_tile(l, [&](long tile, long) {
        load_outer(l, tile);
        start(l, tile, values(l, tile, 0)[0]);
        for (long k = 0; k < call.steps; ++k) {
          keep_state(l, tile, k);
          load_tables(l, tile, k);
          run_ops(l, tile, k, 0, int(plan.ops.size()));
          ddim_update(l, tile, k, l.start);
        }
        store_rows(l.start, plan.features, tile, call.z_hat);
      });
      return;
    }
    each_tile(l, [&](long tile, long) {
      load_outer(l, tile);
      start(l, tile, values(l, tile, 0)[0]);
    });
    for (long k = 0; k < call.steps; ++k) {
      if (call.save == kSaveStates) each_tile(l, [&](long tile, long) { keep_state(l, tile, k); });
      run_coupled(l, k);
      each_tile(l, [&](long tile, long) {
        ddim_update(l, tile, k, l.start);
        if (k + 1 == call.steps) store_rows(l.start, plan.features, tile, call.z_hat);
      });
    }
  }
