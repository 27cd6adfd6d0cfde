// Decoding of a program, and the sizes that follow from it.
#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <new>
#include <stdexcept>

namespace gk {

namespace {

class Reader {
 public:
  explicit Reader(const std::vector<int64_t>& code) : code_(code) {}
  int next() {
    if (at_ >= code_.size()) throw std::invalid_argument("plan: the code ends too early");
    return int(code_[at_++]);
  }
  bool done() const { return at_ == code_.size(); }

 private:
  const std::vector<int64_t>& code_;
  size_t at_ = 0;
};

// A slice of z is a view: nothing is copied, and what reads it adds to its part of z's gradient.
bool views_state(const Plan& plan, const Op& op) {
  return op.kind == Kind::Slice && op.in[0] == 0 && op.out != plan.output;
}

}  // namespace

Plan Plan::decode(const std::vector<int64_t>& code, const std::vector<double>& numbers) {
  Reader read(code);
  Plan plan;
  plan.features = read.next();
  plan.n_rows = read.next();
  plan.n_tables = read.next();
  plan.width.push_back(plan.features);
  for (int i = 0; i < plan.outer_values(); ++i) plan.width.push_back(read.next());
  const int n_params = read.next();
  for (int i = 0; i < n_params; ++i) {
    const int rows = read.next(), cols = read.next();
    plan.params.push_back({rows, cols == 0 ? 1 : cols, cols != 0});
  }
  const int n_ops = read.next();
  plan.stats_width = 0;
  size_t number = 0;
  for (int i = 0; i < n_ops; ++i) {
    Op op{};
    const int kind = read.next();
    if (kind < 0 || kind > int(Kind::Concat)) throw std::invalid_argument("plan: unknown operation");
    op.kind = Kind(kind);
    op.width = read.next();
    const int n_in = read.next();
    for (int j = 0; j < n_in; ++j) {
      const int in = read.next();
      if (in < 0 || in >= int(plan.width.size())) throw std::invalid_argument("plan: operand before it is made");
      op.in.push_back(in);
    }
    for (int& param : op.param) {
      param = read.next();
      if (param >= n_params) throw std::invalid_argument("plan: no such parameter");
    }
    for (double& attr : op.attr) attr = number < numbers.size() ? numbers[number++] : 0.0;
    op.out = int(plan.width.size());
    plan.width.push_back(op.width);
    if (op.kind == Kind::BatchNorm) {
      op.stats = plan.stats_width;
      plan.stats_width += 2 * op.width;
      plan.batch_norms.push_back(i);
    }
    plan.ops.push_back(std::move(op));
  }
  plan.output = read.next();
  if (!read.done() || plan.output < 0 || plan.output >= int(plan.width.size()))
    throw std::invalid_argument("plan: malformed code");
  plan.widest = *std::max_element(plan.width.begin(), plan.width.end());
  return plan;
}

Flow analyse(const Plan& plan, const Wanted& wanted, bool need_z) {
  Flow flow;
  flow.need.assign(plan.width.size(), 0);
  flow.live.assign(plan.ops.size(), 0);
  flow.add.resize(plan.ops.size());
  flow.need[0] = need_z;
  for (int i = 0; i < plan.n_rows; ++i) flow.need[1 + i] = wanted.rows[i];
  for (int i = 0; i < plan.n_tables; ++i) flow.need[1 + plan.n_rows + i] = wanted.tables[i];
  for (const Op& op : plan.ops) {
    bool need = false;
    for (int in : op.in) need |= flow.need[in] != 0;
    for (int p : op.param) need |= p >= 0 && wanted.params[p];
    flow.need[op.out] = need;
  }
  // z, rows and tables hold a gradient before the walk begins, and so does the output.
  std::vector<char> written(plan.width.size(), 0);
  for (int v = 0; v <= plan.outer_values(); ++v) written[v] = 1;
  written[plan.output] = 1;
  for (const Op& op : plan.ops)
    if (views_state(plan, op)) written[op.out] = 1;
  for (int i = int(plan.ops.size()) - 1; i >= 0; --i) {
    const Op& op = plan.ops[i];
    flow.add[i].assign(op.in.size(), 0);
    if (!written[op.out] || !flow.need[op.out]) continue;
    flow.live[i] = 1;
    for (size_t j = 0; j < op.in.size(); ++j) {
      if (!flow.need[op.in[j]]) continue;
      flow.add[i][j] = written[op.in[j]];
      written[op.in[j]] = 1;
    }
  }
  return flow;
}

namespace {

// Rows of a scratch area, handed out first fit and taken back.
class Rows {
 public:
  int take(int n) {
    for (size_t i = 0; i < free_.size(); ++i) {
      if (free_[i].second < n) continue;
      const int at = free_[i].first;
      free_[i].first += n;
      free_[i].second -= n;
      if (free_[i].second == 0) free_.erase(free_.begin() + long(i));
      return at;
    }
    // Grow, from a free tail if there is one.
    int at = size_;
    if (!free_.empty() && free_.back().first + free_.back().second == size_) {
      at = free_.back().first;
      free_.pop_back();
    }
    size_ = at + n;
    return at;
  }
  void give(int at, int n) {
    auto next = std::lower_bound(free_.begin(), free_.end(), std::make_pair(at, 0));
    next = free_.insert(next, {at, n});
    if (next + 1 != free_.end() && next->first + next->second == (next + 1)->first) {
      next->second += (next + 1)->second;
      free_.erase(next + 1);
    }
    if (next != free_.begin() && (next - 1)->first + (next - 1)->second == next->first) {
      (next - 1)->second += next->second;
      free_.erase(next);
    }
  }
  int size() const { return size_; }

 private:
  std::vector<std::pair<int, int>> free_;  // (first row, rows), sorted
  int size_ = 0;
};

bool elementwise(Kind kind) {
  switch (kind) {
    case Kind::Linear:
    case Kind::Mul:
    case Kind::Slice:
    case Kind::Concat:
      return false;
    default:
      return true;
  }
}

void place_outer(const Plan& plan, Layout& layout) {
  layout.place.assign(plan.width.size(), kScratch);
  layout.at.assign(plan.width.size(), 0);
  layout.norm.assign(plan.ops.size(), -1);
  layout.place[0] = kKept;
  layout.rows[kKept] = plan.features;
  layout.rows[kOuter] = 0;
  for (int v = 1; v <= plan.outer_values(); ++v) {
    layout.place[v] = kOuter;
    layout.at[v] = layout.rows[kOuter];
    layout.rows[kOuter] += plan.width[v];
  }
  for (const Op& op : plan.ops) {
    if (!views_state(plan, op)) continue;
    layout.place[op.out] = kKept;
    layout.at[op.out] = int(op.attr[0]);
  }
}

int offset_in(const Plan& plan, const Op& concat, int value) {
  int offset = 0;
  for (size_t j = 0; concat.in[j] != value; ++j) offset += plan.width[concat.in[j]];
  return offset;
}

// Of every value, the concat in whose rows it is computed, -1 for none: it must be the last to read the value.
std::vector<int> joined_in_place(const Plan& plan, const Layout& layout, const std::vector<int>& last_use) {
  std::vector<int> joined(plan.width.size(), -1);
  for (size_t i = 0; i < plan.ops.size(); ++i) {
    const Op& op = plan.ops[i];
    if (op.kind != Kind::Concat || layout.place[op.out] != kScratch) continue;
    for (int v : op.in)
      if (layout.place[v] == kScratch && last_use[v] == int(i) && std::count(op.in.begin(), op.in.end(), v) == 1)
        joined[v] = int(i);
  }
  return joined;
}

// Values that the backward of an operation reads.
std::vector<int> read_by_backward(const Op& op, Keep keep) {
  switch (op.kind) {
    case Kind::Linear:
    case Kind::BatchNormEval:
      return keep == kKeepForParams ? op.in : std::vector<int>{};
    case Kind::BatchNorm:
    case Kind::LayerNorm:
    case Kind::RmsNorm:
    case Kind::LeakyRelu:
    case Kind::Silu:
    case Kind::Gelu:
    case Kind::GeluTanh:
    case Kind::Elu:
    case Kind::Softplus:
    case Kind::Mul:
      return op.in;
    case Kind::Relu:
    case Kind::Tanh:
    case Kind::Sigmoid:
      return {op.out};
    default:
      return {};
  }
}

}  // namespace

Layout value_layout(const Plan& plan, Keep keep) {
  Layout layout;
  place_outer(plan, layout);
  std::vector<int> last_use(plan.width.size(), -1);
  for (size_t i = 0; i < plan.ops.size(); ++i)
    for (int in : plan.ops[i].in) last_use[in] = int(i);
  last_use[plan.output] = int(plan.ops.size());
  if (keep != kKeepNothing)
    for (const Op& op : plan.ops)
      for (int v : read_by_backward(op, keep))
        if (v > plan.outer_values()) layout.place[v] = kKept;
  const std::vector<int> joined = joined_in_place(plan, layout, last_use);
  std::vector<char> taken(plan.width.size(), 0);
  Rows scratch;
  // Rows for a value, which are those of its concat where it has one: the first operand takes them for all.
  const std::function<void(int)> take = [&](int v) {
    if (taken[v]) return;
    taken[v] = 1;
    if (joined[v] < 0) {
      layout.at[v] = scratch.take(plan.width[v]);
      return;
    }
    const Op& concat = plan.ops[joined[v]];
    take(concat.out);
    layout.at[v] = layout.at[concat.out] + offset_in(plan, concat, v);
  };
  for (size_t i = 0; i < plan.ops.size(); ++i) {
    const Op& op = plan.ops[i];
    if (views_state(plan, op)) continue;
    if (op.kind == Kind::LayerNorm || op.kind == Kind::RmsNorm) {
      layout.norm[i] = layout.rows[kKept];
      layout.rows[kKept] += 2;
    }
    const auto dies = [&](int v) { return layout.place[v] == kScratch && last_use[v] == int(i); };
    bool in_place = false;
    if (layout.place[op.out] == kKept) {
      layout.at[op.out] = layout.rows[kKept];
      layout.rows[kKept] += op.width;
    } else if (elementwise(op.kind) && joined[op.out] < 0 && dies(op.in[0]) && (op.in.size() == 1 || op.in[1] != op.in[0])) {
      layout.at[op.out] = layout.at[op.in[0]];
      in_place = true;
    } else {
      take(op.out);
    }
    for (size_t j = 0; j < op.in.size(); ++j) {
      const int v = op.in[j];
      const bool again = std::find(op.in.begin(), op.in.begin() + long(j), v) != op.in.begin() + long(j);
      if (dies(v) && !again && joined[v] < 0 && !(in_place && j == 0)) scratch.give(layout.at[v], plan.width[v]);
    }
    if (last_use[op.out] < 0 && layout.place[op.out] == kScratch) scratch.give(layout.at[op.out], op.width);
  }
  layout.rows[kScratch] = scratch.size();
  return layout;
}

Layout gradient_layout(const Plan& plan, const Flow& flow) {
  Layout layout;
  place_outer(plan, layout);
  Rows scratch;
  std::vector<char> held(plan.width.size(), 0), fixed(plan.width.size(), 0);
  for (int v = 0; v <= plan.outer_values(); ++v) fixed[v] = 1;
  for (const Op& op : plan.ops) fixed[op.out] = views_state(plan, op);
  const auto hold = [&](int v) {
    if (held[v] || fixed[v]) return;
    layout.at[v] = scratch.take(plan.width[v]);
    held[v] = 1;
  };
  hold(plan.output);
  for (int i = int(plan.ops.size()) - 1; i >= 0; --i) {
    const Op& op = plan.ops[i];
    if (!flow.live[i]) continue;
    bool handed_on = false;
    int first = layout.at[op.out];
    for (size_t j = 0; j < op.in.size(); ++j) {
      const int v = op.in[j];
      if (op.kind == Kind::Concat && held[op.out]) {
        // An operand's gradient is its part of the result's, where that is the first of it.
        const bool own = flow.need[v] && !held[v] && !fixed[v];
        if (own) layout.at[v] = first;
        if (own) held[v] = 1;
        if (!own) scratch.give(first, plan.width[v]);
        first += plan.width[v];
        handed_on = true;
        continue;
      }
      if (!flow.need[v] || held[v] || fixed[v]) continue;
      // The first gradient of an elementwise operation's operand takes the place of the result's.
      const bool twice = op.in.size() > 1 && op.in[1] == op.in[0];
      if (j == 0 && elementwise(op.kind) && !twice && held[op.out]) {
        layout.at[v] = layout.at[op.out];
        held[v] = 1;
        handed_on = true;
      } else {
        hold(v);
      }
    }
    if (!handed_on && held[op.out]) scratch.give(layout.at[op.out], op.width);
    held[op.out] = 0;
  }
  layout.rows[kScratch] = scratch.size();
  return layout;
}

namespace {

constexpr size_t kKeptBytes = size_t(64) << 20;
std::mutex workspace_mutex;
void* kept_memory = nullptr;
size_t kept_bytes = 0;

size_t* header(void* memory) { return reinterpret_cast<size_t*>(static_cast<char*>(memory) - 64); }

}  // namespace

void* acquire_workspace(size_t bytes) {
  {
    std::lock_guard<std::mutex> lock(workspace_mutex);
    if (kept_memory && kept_bytes >= bytes) {
      void* memory = kept_memory;
      kept_memory = nullptr;
      return memory;
    }
  }
  const size_t total = (bytes + 64 + 4095) / 4096 * 4096;
  void* base = nullptr;
  if (posix_memalign(&base, 4096, total) != 0) throw std::bad_alloc();
  void* memory = static_cast<char*>(base) + 64;
  *header(memory) = total - 64;
  return memory;
}

void release_workspace(void* memory) {
  const size_t bytes = *header(memory);
  void* drop = memory;
  {
    std::lock_guard<std::mutex> lock(workspace_mutex);
    if (bytes <= kKeptBytes && (!kept_memory || kept_bytes < bytes)) {
      drop = kept_memory;
      kept_memory = memory;
      kept_bytes = bytes;
    }
  }
  if (drop) std::free(static_cast<char*>(drop) - 64);
}

Tiling tiling(int vector_bytes, int element_bytes, long rows, int widest) {
  const int lanes = vector_bytes / element_bytes;
  // Wide tiles reuse each weight more; narrow ones keep two cores busy and the widest layer's input in L1.
  int vectors = rows <= lanes ? 1 : rows <= 16L * lanes || long(widest) * 4 * vector_bytes > 32768 ? 2 : 4;
  if (long(widest) * vectors * vector_bytes > 65536 && vectors > 1) vectors = 1;
  // double is there for checking gradients: one size of tile, a third of the code.
  if (element_bytes == 8) vectors = 2;
  Tiling t;
  t.vectors = vectors;
  t.rows = vectors * lanes;
  t.tiles = (rows + t.rows - 1) / t.rows;
  t.groups = std::min(t.tiles, std::max(8L, std::min(32L, t.tiles / 4)));
  return t;
}

int largest_tile(int vector_bytes, int element_bytes) { return 4 * vector_bytes / element_bytes; }

}  // namespace gk
