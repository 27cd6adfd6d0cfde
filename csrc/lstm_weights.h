// Part of Lstm: gradients of weights, turned, [input and h_{t-1}][gates], by groups of rows.

  // h_t of a row, from what forward kept; masked where a mask is given.
  void hidden_state(const Local& l, int n, long t, long rank, const T* mask, T* to) const {
    const T* saved = saved_row(n, t, l, rank);
    each_vector([&](auto whole, long at_gate, long stride, long u, long n_units) {
      const V<T> o = get(whole, saved + at_gate + 3 * stride, n_units);
      const V<T> value = o * vtanh(get(whole, saved + gates + u, n_units));
      put(whole, to + u, n_units, mask ? V<T>(value * load(mask + u)) : value);
    });
  }

  // The input and h_{t-1} of the rows of a tile, beside their gradients of gates. Backward has left h_{t-1} of all steps
  // but the first.
  void gather_inputs(const Local& l, int n, long tile, long from_end) const {
    const Layer& at = layer[n];
    const long begin = first_step(from_end), end = end_step(from_end);
    for (long t = begin; t < end; ++t) {
      // What would be multiplied by zeros, unless the group's other tiles have something to multiply.
      if (!*live(n, from_end, t - begin, tile) && tiles == groups) continue;
      for (long j = 0; j < count(tile, active(l, t)); ++j) {
        const long rank = rank_of(tile, j);
        T* to = inputs_of(l, n, tile % groups) + place_of(l, t - begin, rank) * at.sum_row;
        if (n > 0) {
          if (drops(n - 1)) dropout_mask(n - 1, t, row_of(l, rank), l.mask);
          hidden_state(l, n - 1, t, rank, drops(n - 1) ? l.mask : nullptr, to);
        } else {
          __builtin_memcpy(to, static_cast<const T*>(call.x) + row_of(l, rank) * call.x_row + t * call.x_step,
                           sizeof(T) * at.width);
        }
        if (t > begin) continue;
        if (t > 0) {
          hidden_state(l, n, t - 1, rank, nullptr, to + at.width);
        } else if (const T* h0 = state_row(static_cast<const T*>(call.h0), n, l, rank)) {
          __builtin_memcpy(to + at.width, h0, sizeof(T) * hidden);
        } else {
          __builtin_memset(to + at.width, 0, sizeof(T) * hidden);
        }
      }
    }
  }

  // dW += [x_t, h_{t-1}] dgates_t^T, db += dgates_t over a group's rows in a chunk, of a thread's gates.
  void weight_gradients(const Local& l, int n, long group, long from_end) const {
    const Layer& at = layer[n];
    const Slice mine = slice(l);
    if (mine.vectors == 0 || !wants_weights(n)) return;
    const long count_steps = end_step(from_end) - first_step(from_end);
    const T* g = dgates_of(l, n, group) + mine.first;
    // Both weights, or the one that is wanted.
    const long first = wants(n, 0) ? 0 : at.width, width = (wants(n, 1) ? at.width + hidden : at.width) - first;
    const T* x = inputs_of(l, n, group) + first;
    T* dw = at.dw ? at.dw + (group * (at.width + hidden) + first) * gate_row + mine.first : nullptr;
    T* db = at.db ? at.db + group * gate_row + mine.first : nullptr;
    set_offsets(l, group, from_end);
    const auto any = [&](long s) {
      for (long tile = group; tile < tiles; tile += groups)
        if (*live(n, from_end, s, tile)) return true;
      return false;
    };
    for (long s = 0; s < count_steps; ++s) {
      if (!any(s)) continue;
      const long start = l.offset[s];
      while (s + 1 < count_steps && any(s + 1)) ++s;
      // In blocks that stay in the cache.
      for (long r = start; r < l.offset[s + 1]; r += P::kDepth) {
        const long depth = at_most(l.offset[s + 1] - r, P::kDepth);
        if (dw)
          P::accumulate(x + r * at.sum_row, at.sum_row, width, g + r * gate_row, gate_row, mine.vectors, depth, dw,
                        gate_row, l.room);
        for (long j = 0; db && j < mine.vectors * L; j += L) {
          V<T> sum = {};
          for (long i = r; i < r + depth; ++i) sum += load(g + i * gate_row + j);
          store(db + j, V<T>(load(db + j) + sum));
        }
      }
    }
  }

  // A thread's share of the gates, in cache lines: all of its own groups, or a part of every group.
  struct Slice {
    long first;
    int vectors;
  };
  Slice slice(const Local& l) const {
    if (l.alone) return {0, int(gate_row / L)};
    const long line = at_least(L, 16), lines = parts(gate_row, line);
    const long first = lines * l.thread / l.threads * line;
    const long end = at_most(gate_row, lines * (l.thread + 1) / l.threads * line);
    return {first, int((end - first) / L)};
  }

  // The sums of all groups, in turn, and from here in the order of torch's weights.
  void store_weight_gradients(const Local& l) const {
    int job = 0;
    for (int n = bottom; n < layers; ++n) {
      const Layer& at = layer[n];
      each_run(0, gates, [&](long j, long original, long run) {
        if (job++ % l.threads != l.thread) return;
        const auto add_groups = [&](T* sums, long rows) {
          for (long g = 1; g < groups; ++g)
            for (long k = 0; k < rows; ++k)
              for (long u = 0; u < run; u += L) {
                T* sum = sums + k * gate_row + j;
                store_at(sum, u, run, V<T>(load_at(sum, u, run) + load_at(sum + g * rows * gate_row, u, run)));
              }
        };
        if (at.dw) {
          add_groups(at.dw, at.width + hidden);
          if (wants(n, 0)) transpose(at.dw + j, gate_row, at.width, run, grad_param(n, 0) + original * at.width, at.width);
          if (wants(n, 1))
            transpose(at.dw + at.width * gate_row + j, gate_row, hidden, run, grad_param(n, 1) + original * hidden, hidden);
        }
        if (!at.db) return;
        add_groups(at.db, 1);
        for (int which = 2; which < 4; ++which)
          if (wants(n, which)) __builtin_memcpy(grad_param(n, which) + original, at.db + j, sizeof(T) * run);
      });
    }
  }
