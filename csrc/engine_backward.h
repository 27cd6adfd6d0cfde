// Part of Engine: backward of a range of operations on one tile, BatchNorm across tiles, and the walk back.

  T* vector_sum(long group, int p) const {
    return p < 0 || at_param[p] < 0 ? nullptr : groups + group * group_size + at_param[p];
  }

  // sums[c][lane] += g over the tile's vectors
  static void add_lanes(const T* g, int width, T* sums) {
    for (int c = 0; c < width; ++c) {
      V<T> sum = load(sums + c * L);
      for (int v = 0; v < NV; ++v) sum += load(g + c * R + v * L);
      store(sums + c * L, sum);
    }
  }

  static void copy_or_add(const T* g, T* dx, long n, bool add) {
    if (g == dx) return;  // the operand's gradient took the result's place
    for (long i = 0; i < n; i += L) store(dx + i, add ? V<T>(load(dx + i) + load(g + i)) : load(g + i));
  }

  void run_ops_back(Local& l, long tile, long group, long k, int begin, int end) const {
    const View value = values(l, tile, k), gradient = gradients(l, tile);
    const Flow& flow = *call.flow;
    for (int i = end - 1; i >= begin; --i) {
      if (!flow.live[i]) continue;
      const Op& op = plan.ops[i];
      const T *x = value[op.in[0]], *g = gradient[op.out];
      T* dx = flow.need[op.in[0]] ? gradient[op.in[0]] : nullptr;
      const bool add = flow.add[i][0] != 0;
      const long n = long(op.width) * R;
      switch (op.kind) {
        case Kind::Linear:
          if (T* dw = vector_sum(group, op.param[0])) product_backward_weight(l, op, x, g, tile, dw);
          if (T* db = vector_sum(group, op.param[1])) add_lanes(g, op.width, db);
          if (dx) product_backward_input(l, op, g, dx, add);
          break;
        case Kind::BatchNorm:
          break;  // across tiles: batch_norm_back
        case Kind::BatchNormEval:
          batch_norm_eval_back(l, op, x, g, dx, add, group);
          break;
        case Kind::LayerNorm:
        case Kind::RmsNorm:
          RowNorm<T, NV>::backward(x, op.width, op.kind == Kind::LayerNorm, param(op.param[0]),
                                   value.norm(i), g, dx, add, vector_sum(group, op.param[0]),
                                   vector_sum(group, op.param[1]));
          break;
        case Kind::Add: {
          // The first operand's gradient may take the place of g, so it comes last; of x + x both are the same.
          const bool same = op.in[0] == op.in[1];
          if (flow.need[op.in[1]]) copy_or_add(g, gradient[op.in[1]], n, flow.add[i][same ? 0 : 1]);
          if (dx) copy_or_add(g, dx, n, same || add);
          break;
        }
        case Kind::Mul:
          multiply_back(g, value[op.in[1]], dx, n, add);
          if (flow.need[op.in[1]]) multiply_back(g, x, gradient[op.in[1]], n, flow.add[i][1]);
          break;
        case Kind::Affine:
          for (long j = 0; j < n; j += L) {
            const V<T> d = load(g + j) * T(op.attr[0]);
            store(dx + j, add ? V<T>(load(dx + j) + d) : d);
          }
          break;
        case Kind::Slice:
          if (!add) __builtin_memset(dx, 0, sizeof(T) * plan.width[op.in[0]] * R);
          copy_or_add(g, dx + long(op.attr[0]) * R, n, true);
          break;
        case Kind::Concat:
          for (size_t j = 0; j < op.in.size(); ++j) {
            const long size = long(plan.width[op.in[j]]) * R;
            if (flow.need[op.in[j]]) copy_or_add(g, gradient[op.in[j]], size, flow.add[i][j]);
            g += size;
          }
          break;
        default:
          Activation<T>{op.kind, T(op.attr[0])}.backward(x, value[op.out], g, dx, n, add);
      }
    }
  }

  static void multiply_back(const T* g, const T* other, T* dx, long n, bool add) {
    if (!dx) return;
    for (long j = 0; j < n; j += L) {
      const V<T> d = load(g + j) * load(other + j);
      store(dx + j, add ? V<T>(load(dx + j) + d) : d);
    }
  }

  void batch_norm_eval_back(Local& l, const Op& op, const T* x, const T* g, T* dx, bool add, long group) const {
    batch_norm_coefficients(op, param(op.param[2]), param(op.param[3]), l.mean, l.scale);
    T *dweight = vector_sum(group, op.param[0]), *dbias = vector_sum(group, op.param[1]);
    const T* var = param(op.param[3]);
    for (int c = 0; c < op.width; ++c) {
      const V<T> inverse = T(1) / vsqrt<T>(splat<T>(var[c] + T(op.attr[0])));
      for (int v = 0; v < NV; ++v) {
        const long i = long(c) * R + v * L;
        const V<T> gradient = load(g + i);
        if (dweight)
          store(dweight + c * L, V<T>(load(dweight + c * L) + gradient * ((load(x + i) - l.mean[c]) * inverse)));
        if (dbias) store(dbias + c * L, V<T>(load(dbias + c * L) + gradient));
        if (!dx) continue;
        const V<T> d = gradient * l.scale[c];
        store(dx + i, add ? V<T>(load(dx + i) + d) : d);
      }
    }
  }

  // dx = w / std · (g − mean(g) − hat · mean(g hat)), hat = (x − mean) / std; the means over the whole batch.
  void batch_norm_back(Local& l, long k, int at) {
    const Op& op = plan.ops[at];
    const T* stats = stats_row(k) + op.stats;
    batch_norm_coefficients(op, stats, stats + op.width, l.mean, l.scale);
    each_tile(l, [&](long tile, long) {
      Tile::sums(values(l, tile, k)[op.in[0]], gradients(l, tile)[op.out], op.width, l.mean, partial_of(l, tile), padded);
    });
    barrier.wait(l.threads);
    T *dweight = l.thread == 0 ? vector_sum(0, op.param[0]) : nullptr;
    T *dbias = l.thread == 0 ? vector_sum(0, op.param[1]) : nullptr;
    const T eps = T(op.attr[0]), share = T(1.0 / double(rows));
    for (int c = 0; c < op.width; c += L) {
      V<T> sum{}, dot{}, var{};
      for (long tile = 0; tile < t.tiles; ++tile) {
        sum += load(partial_of(l, tile) + c);
        dot += load(partial_of(l, tile) + padded + c);
      }
      const int n = op.width - c < L ? op.width - c : L;
      for (int j = 0; j < n; ++j) var[j] = stats[op.width + c + j];
      const V<T> inverse = T(1) / vsqrt<T>(var + eps), scale = load(l.scale + c);
      for (int j = 0; j < n; ++j) {
        if (dbias) dbias[(c + j) * L] += sum[j];
        if (dweight) dweight[(c + j) * L] += dot[j] * inverse[j];
      }
      store(l.offset + c, V<T>(-scale * sum * share));
      store(l.slope + c, V<T>(-scale * (inverse * inverse) * dot * share));
    }
    l.parity ^= 1;
    if (!call.flow->need[op.in[0]]) return;
    each_tile(l, [&](long tile, long) {
      set_mask(l, tile);
      const View gradient = gradients(l, tile);
      Tile::backward(values(l, tile, k)[op.in[0]], gradient[op.out], op.width, l.mean, l.scale, l.offset, l.slope,
                     l.mask, gradient[op.in[0]], call.flow->add[at][0]);
    });
  }

  void run_coupled_back(Local& l, long k) {
    int end = int(plan.ops.size());
    for (int b = int(plan.batch_norms.size()); b >= 0; --b) {
      const int begin = b > 0 ? plan.batch_norms[b - 1] + 1 : 0;
      each_tile(l, [&](long tile, long group) { run_ops_back(l, tile, group, k, begin, end); });
      if (b == 0) break;
      end = begin - 1;
      if (call.flow->live[end]) batch_norm_back(l, k, end);
    }
  }

  // Before a step's walk back: values again where they were not kept, the gradient of the prediction, zeros where sums
  // begin. On entry z's gradient slot holds the gradient of the next state.
  void enter_step(Local& l, long tile, long k) const {
    if (call.save == kSaveStates) {
      __builtin_memcpy(values(l, tile, k)[0], saved_state(k, tile), sizeof(T) * plan.features * R);
      load_tables(l, tile, k);
      run_ops(l, tile, k, 0, int(plan.ops.size()));
    } else {
      load_tables(l, tile, k);
    }
    const View gradient = gradients(l, tile);
    const T a = T(call.coefficients[3 * k]), b = T(call.coefficients[3 * k + 1]);
    zero_tables(gradient);
    T *z = gradient[0], *prediction = gradient[plan.output];
    for (long i = 0; i < long(plan.features) * R; i += L) {
      const V<T> g = load(z + i);
      if (plan.output == 0) {
        store(z + i, V<T>((a + b) * g));
      } else {
        const V<T> from_output = b * g;
        store(prediction + i, plan.output <= plan.n_rows ? V<T>(load(prediction + i) + from_output) : from_output);
        store(z + i, V<T>(a * g));
      }
    }
  }

  void zero_tables(const View& gradient) const {
    for (int i = 0; i < plan.n_tables; ++i) {
      const int value = 1 + plan.n_rows + i;
      __builtin_memset(gradient[value], 0, sizeof(T) * plan.width[value] * R);
    }
  }
  void zero_rows(const View& gradient) const {
    for (int i = 0; i < plan.n_rows; ++i)
      __builtin_memset(gradient[1 + i], 0, sizeof(T) * plan.width[1 + i] * R);
  }

  // A table's gradient at step k is the sum over batch rows.
  void leave_step(const Local& l, long tile, long group, long k) const {
    const View gradient = gradients(l, tile);
    for (int i = 0; i < plan.n_tables; ++i) {
      if (at_table[i] < 0) continue;
      const int value = 1 + plan.n_rows + i, width = plan.width[value];
      T* sums = groups + group * group_size + at_table[i] + k * width;
      const T* g = gradient[value];
      for (int c0 = 0; c0 < width; c0 += L) {
        V<T> parts[L];
        for (int j = 0; j < L; ++j) {
          parts[j] = V<T>{};
          if (c0 + j < width)
            for (int v = 0; v < NV; ++v) parts[j] += load(g + long(c0 + j) * R + v * L);
        }
        const V<T> sum = reduce_lanes<T>(parts);
        for (int j = 0; j < L && c0 + j < width; ++j) sums[c0 + j] += sum[j];
      }
    }
  }

  // Gradients of the start, from that of z_0, and of the rows.
  void store_gradients(Local& l, long tile) const {
    const View gradient = gradients(l, tile);
    T* g = gradient[0];
    const long n = long(plan.features) * R;
    for (int i = 0; i < plan.n_rows; ++i)
      if (call.wanted->rows[i]) store_rows(gradient[1 + i], plan.width[1 + i], tile, call.grad_rows[i]);
    if (call.prior) {
      for (int i = 0; i < plan.n_tables; ++i) {
        const int value = 1 + plan.n_rows + i;
        if (call.wanted->tables[i]) store_rows(gradient[value], plan.width[value], tile, call.grad_tables[i]);
      }
      return;
    }
    if (call.wanted->alpha) {
      start_noise(tile, l.noise);
      load_shared(call.z, plan.features, tile, l.start);
      for (long i = 0; i < n; i += L)
        store(l.start + i, V<T>((load(l.start + i) - load(l.noise + i)) * load(g + i)));
      if (call.alpha_col == 0)
        for (long i = R; i < n; i += L) store(l.start + i % R, V<T>(load(l.start + i % R) + load(l.start + i)));
      store_rows(l.start, call.alpha_col == 0 ? 1 : plan.features, tile, call.grad_alpha);
    }
    if (!call.wanted->z) return;
    if (call.alpha) {
      load_alpha(tile, l.start);
      for (long i = 0; i < n; i += L) store(l.start + i, V<T>(load(l.start + i) * load(g + i)));
      g = l.start;
    }
    store_rows(g, plan.features, tile, call.grad_z);
  }

  // The groups' sums, added in the order of the groups, into the gradients asked for.
  void reduce_groups(const Local& l) const {
    for (int p = 0; p < int(plan.params.size()); ++p) {
      if (at_param[p] < 0) continue;
      const Param& w = plan.params[p];
      T* out = static_cast<T*>(call.grad_params[p]);
      const long ld = w.matrix ? GK_ROUND_UP(w.cols, L) : L;
      const long begin = l.thread * long(w.rows) / l.threads, end = (l.thread + 1) * long(w.rows) / l.threads;
      for (long j = begin; j < end; ++j) {
        T* sum = groups + at_param[p] + j * ld;
        for (long g = 1; g < t.groups; ++g)
          for (long c = 0; c < ld; c += L)
            store(sum + c, V<T>(load(sum + c) + load(sum + g * group_size + c)));
        if (w.matrix)
          __builtin_memcpy(out + j * w.cols, sum, sizeof(T) * w.cols);
        else
          out[j] = horizontal_sum<T>(load(sum));
      }
    }
    if (l.thread != 0) return;
    for (int i = 0; i < plan.n_tables; ++i) {
      if (at_table[i] < 0) continue;
      const long n = call.steps * plan.width[1 + plan.n_rows + i];
      T* out = static_cast<T*>(call.grad_tables[i]);
      for (long j = 0; j < n; ++j) {
        T sum = T(0);
        for (long g = 0; g < t.groups; ++g) sum += groups[g * group_size + at_table[i] + j];
        out[j] = sum;
      }
    }
  }

  void begin_backward(Local& l) const {
    for (long g = first_group(l, l.thread); g < first_group(l, l.thread + 1); ++g)
      __builtin_memset(groups + g * group_size, 0, sizeof(T) * group_size);
    pack(l);
  }

  void backward_thread(int thread, int threads) {
    Local l = local(thread, threads);
    begin_backward(l);
    barrier.wait(threads);
    const auto enter_tile = [&](long tile) {
      load_outer(l, tile);
      const View gradient = gradients(l, tile);
      zero_rows(gradient);
      load_rows(call.grad, plan.features, tile, gradient[0]);
    };
    if (!coupled) {
      each_tile(l, [&](long tile, long group) {
        enter_tile(tile);
        for (long k = call.steps - 1; k >= 0; --k) {
          enter_step(l, tile, k);
          run_ops_back(l, tile, group, k, 0, int(plan.ops.size()));
          leave_step(l, tile, group, k);
        }
        store_gradients(l, tile);
      });
    } else {
      each_tile(l, [&](long tile, long) { enter_tile(tile); });
      for (long k = call.steps - 1; k >= 0; --k) {
        each_tile(l, [&](long tile, long) { enter_step(l, tile, k); });
        run_coupled_back(l, k);
        each_tile(l, [&](long tile, long group) { leave_step(l, tile, group, k); });
      }
      each_tile(l, [&](long tile, long) { store_gradients(l, tile); });
    }
    barrier.wait(threads);
    reduce_groups(l);
  }

  // --- prior_loss: one noised state per row, the squared error, and its gradients ----------------------------------

  // The tile's share of the loss; with backward also the gradients of the prediction and, for targets made of it, of z.
  void squared_error(Local& l, long tile) {
    const View value = values(l, tile, 0);
    const T* prediction = value[plan.output];
    load_shared(call.z, plan.features, tile, l.start);
    start_noise(tile, l.noise);
    set_mask(l, tile);
    const T *signal = l.operand, *sigma = l.operand + R;
    for (int i = 0; i < R; ++i) {
      const bool in = i < valid(tile);
      l.operand[i] = in ? static_cast<const T*>(call.signal)[tile * R + i] : T(0);
      l.operand[R + i] = in ? static_cast<const T*>(call.sigma)[tile * R + i] : T(0);
    }
    const T step = T(2.0 / (double(rows) * plan.features));
    T* error = l.noise;  // replaced in place
    double total = 0.0;
    for (int c = 0; c < plan.features; ++c) {
      V<T> sum{};
      for (int v = 0; v < NV; ++v) {
        const long i = long(c) * R + v * L;
        const V<T> eps = load(l.noise + i), z = load(l.start + i);
        const V<T> target = call.prediction == kEps  ? eps
                            : call.prediction == kX0 ? z
                                                     : load(signal + v * L) * eps - load(sigma + v * L) * z;
        const V<T> difference = (load(prediction + i) - target) * load(l.mask + v * L);
        sum += difference * difference;
        store(error + i, V<T>(difference * step));
      }
      total += double(horizontal_sum<T>(sum));
    }
    loss[tile] = total;
    if (!backward) return;
    const View gradient = gradients(l, tile);
    zero_rows(gradient);
    zero_tables(gradient);
    const long n = long(plan.features) * R;
    __builtin_memset(gradient[0], 0, sizeof(T) * n);
    copy_or_add(error, gradient[plan.output], n, plan.output <= plan.outer_values());
  }

  // d z_long = signal d z_t − d target
  void store_prior_gradients(Local& l, long tile) const {
    store_gradients(l, tile);
    if (!call.wanted->z) return;
    const View value = values(l, tile, 0), gradient = gradients(l, tile);
    load_shared(call.z, plan.features, tile, l.start);
    start_noise(tile, l.noise);
    set_mask(l, tile);
    const T step = T(2.0 / (double(rows) * plan.features));
    for (int i = 0; i < R; ++i) {
      const bool in = i < valid(tile);
      l.operand[i] = in ? static_cast<const T*>(call.signal)[tile * R + i] : T(0);
      l.operand[R + i] = in ? static_cast<const T*>(call.sigma)[tile * R + i] : T(0);
    }
    for (long i = 0; i < long(plan.features) * R; i += L) {
      const V<T> signal = load(l.operand + i % R), sigma = load(l.operand + R + i % R);
      const V<T> eps = load(l.noise + i), z = load(l.start + i), prediction = load(value[plan.output] + i);
      V<T> d = signal * load(gradient[0] + i);
      if (call.prediction == kX0) d -= step * (prediction - z);
      if (call.prediction == kV) d += step * sigma * (prediction - (signal * eps - sigma * z));
      store(l.start + i, d);
    }
    store_rows(l.start, plan.features, tile, call.grad_z);
  }

  void prior_thread(int thread, int threads) {
    Local l = local(thread, threads);
    begin_backward(l);
    barrier.wait(threads);
    const auto enter = [&](long tile) {
      load_outer(l, tile);
      start(l, tile, values(l, tile, 0)[0]);
    };
    if (!coupled) {
      each_tile(l, [&](long tile, long group) {
        enter(tile);
        run_ops(l, tile, 0, 0, int(plan.ops.size()));
        squared_error(l, tile);
        if (!backward) return;
        run_ops_back(l, tile, group, 0, 0, int(plan.ops.size()));
        store_prior_gradients(l, tile);
      });
    } else {
      each_tile(l, [&](long tile, long) { enter(tile); });
      run_coupled(l, 0);
      each_tile(l, [&](long tile, long) { squared_error(l, tile); });
      if (backward) {
        // batch_norm_back reads the statistics that one thread has written.
        barrier.wait(threads);
        run_coupled_back(l, 0);
        each_tile(l, [&](long tile, long) { store_prior_gradients(l, tile); });
      }
    }
    barrier.wait(threads);
    if (backward) reduce_groups(l);
    if (thread != 0) return;
    double total = 0.0;
    for (long tile = 0; tile < t.tiles; ++tile) total += loss[tile];
    *call.loss = total / (double(rows) * plan.features);
  }
