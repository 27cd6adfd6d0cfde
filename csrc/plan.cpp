// Decoding of a program, and the sizes that follow from it.
#include "plan.h"

#include <algorithm>
#include <cstdlib>
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

}  // namespace

Plan Plan::decode(const std::vector<int64_t>& code, const std::vector<double>& numbers) {
  Reader read(code);
  Plan plan;
  plan.features = read.next();
  plan.n_rows = read.next();
  plan.n_tables = read.next();
  plan.width.push_back(plan.features);
  plan.offset.push_back(0);
  plan.outer.push_back(-1);
  plan.arena_rows = plan.features;
  plan.outer_rows = 0;
  for (int i = 0; i < plan.n_rows + plan.n_tables; ++i) {
    plan.width.push_back(read.next());
    plan.offset.push_back(-1);
    plan.outer.push_back(plan.outer_rows);
    plan.outer_rows += plan.width.back();
  }
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
    plan.offset.push_back(plan.arena_rows);
    plan.outer.push_back(-1);
    plan.arena_rows += op.width;
    if (op.kind == Kind::LayerNorm || op.kind == Kind::RmsNorm) {
      op.aux = plan.arena_rows;
      plan.arena_rows += 2;
    }
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
  for (int v = 0; v <= plan.n_rows + plan.n_tables; ++v) written[v] = 1;
  written[plan.output] = 1;
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
  Tiling t;
  t.vectors = vectors;
  t.rows = vectors * lanes;
  t.tiles = (rows + t.rows - 1) / t.rows;
  t.groups = std::min(t.tiles, std::max(8L, std::min(32L, t.tiles / 4)));
  return t;
}

long saved_numel(const Plan& plan, int vector_bytes, int element_bytes, long rows, long steps, int save) {
  if (save == kSaveNothing) return 0;
  const Tiling t = tiling(vector_bytes, element_bytes, rows, plan.widest);
  const long per_row = save == kSaveValues ? plan.arena_rows : plan.features;
  return steps * t.tiles * t.rows * per_row;
}

}  // namespace gk
