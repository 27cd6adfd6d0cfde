// Python's view of the LSTM: addresses and sizes in, nothing of torch. The Python side (backends/native_lstm.py) has
// checked dtypes, devices and shapes, and keeps the tensors alive for the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "lstm.h"
#include "memory.h"

namespace py = pybind11;
using Address = uintptr_t;

namespace {

// A tensor [batch, steps, features]: its address and the strides of rows and steps.
using Sequence = std::tuple<Address, long, long>;

template <class P = void>
P* to(Address a) {
  return reinterpret_cast<P*>(a);
}

std::vector<const void*> all_in(const std::vector<Address>& addresses) {
  std::vector<const void*> pointers;
  for (Address address : addresses) pointers.push_back(to(address));
  return pointers;
}
std::vector<void*> all_out(const std::vector<Address>& addresses) {
  std::vector<void*> pointers;
  for (Address address : addresses) pointers.push_back(to(address));
  return pointers;
}

// What forward and backward share.
struct Inputs {
  std::vector<const void*> params;
  std::vector<void*> saved;
  std::vector<long> order, length, active;
  gk::LstmCall call{};
  const gk::LstmKernels* kernels;
  bool f64;

  Inputs(const std::string& isa, bool is_f64, const std::vector<long>& sizes, const Sequence& x, Address lengths,
         Address h0, Address c0, const std::vector<Address>& param_list, double dropout, uint64_t seed, bool bf16,
         int threads, const std::vector<Address>& saved_list)
      : params(all_in(param_list)), saved(all_out(saved_list)), kernels(gk::kernels_named(isa).lstm), f64(is_f64) {
    if (sizes.size() != 5 || *std::min_element(sizes.begin(), sizes.end()) < 1 || threads < 1)
      throw std::invalid_argument("batch, steps, inputs, hidden, layers and threads must be at least 1");
    call.batch = sizes[0];
    call.steps = sizes[1];
    call.inputs = sizes[2];
    call.hidden = sizes[3];
    call.layers = sizes[4];
    if (long(params.size()) != 4 * call.layers || (!saved.empty() && long(saved.size()) != call.layers))
      throw std::invalid_argument("params or saved do not match the number of layers");
    set_order(to<const int64_t>(lengths));
    Address address;
    std::tie(address, call.x_row, call.x_step) = x;
    call.x = to(address);
    call.h0 = to(h0);
    call.c0 = to(c0);
    call.params = params.data();
    call.dropout = dropout;
    call.seed = seed;
    call.bf16 = bf16;
    call.threads = threads;
    call.saved = saved.empty() ? nullptr : saved.data();
  }

  void set_order(const int64_t* lengths) {
    order.resize(call.batch);
    std::iota(order.begin(), order.end(), 0L);
    length.assign(call.batch, call.steps);
    active.assign(call.steps, call.batch);
    if (lengths) {
      for (long i = 0; i < call.batch; ++i)
        if (lengths[i] < 1 || lengths[i] > call.steps)
          throw std::invalid_argument("lengths: " + std::to_string(lengths[i]) + " lies outside 1.." +
                                      std::to_string(call.steps));
      std::stable_sort(order.begin(), order.end(), [&](long a, long b) { return lengths[a] > lengths[b]; });
      active.assign(call.steps, 0);
      for (long rank = 0; rank < call.batch; ++rank) {
        length[rank] = long(lengths[order[rank]]);
        ++active[length[rank] - 1];
      }
      for (long t = call.steps - 1; t > 0; --t) active[t - 1] += active[t];
    }
    call.order = order.data();
    call.length = length.data();
    call.active = active.data();
  }
};

void forward(const std::string& isa, bool f64, const std::vector<long>& sizes, const Sequence& x, Address lengths,
             Address h0, Address c0, const std::vector<Address>& params, double dropout, uint64_t seed, bool bf16,
             int threads, const std::vector<Address>& saved, const Sequence& output, Address h_n, Address c_n) {
  Inputs inputs(isa, f64, sizes, x, lengths, h0, c0, params, dropout, seed, bf16, threads, saved);
  gk::LstmCall& call = inputs.call;
  Address address;
  std::tie(address, call.output_row, call.output_step) = output;
  call.output = to(address);
  call.h_n = to(h_n);
  call.c_n = to(c_n);
  py::gil_scoped_release nogil;
  (f64 ? inputs.kernels->forward_f64 : inputs.kernels->forward_f32)(call);
}

void backward(const std::string& isa, bool f64, const std::vector<long>& sizes, const Sequence& x,
              Address lengths, Address h0, Address c0, const std::vector<Address>& params, double dropout,
              uint64_t seed, bool bf16, int threads, const std::vector<Address>& saved,
              const Sequence& grad_output, Address grad_h, Address grad_c, const Sequence& grad_x,
              Address grad_h0, Address grad_c0, const std::vector<Address>& grad_params) {
  Inputs inputs(isa, f64, sizes, x, lengths, h0, c0, params, dropout, seed, bf16, threads, saved);
  gk::LstmCall& call = inputs.call;
  if (!call.saved || grad_params.size() != params.size())
    throw std::invalid_argument("saved is missing, or grad_params do not match params");
  const std::vector<void*> to_params = all_out(grad_params);
  Address address;
  std::tie(address, call.grad_output_row, call.grad_output_step) = grad_output;
  call.grad_output = to(address);
  call.grad_h = to(grad_h);
  call.grad_c = to(grad_c);
  std::tie(address, call.grad_x_row, call.grad_x_step) = grad_x;
  call.grad_x = to(address);
  call.grad_h0 = to(grad_h0);
  call.grad_c0 = to(grad_c0);
  call.grad_params = to_params.data();
  py::gil_scoped_release nogil;
  (f64 ? inputs.kernels->backward_f64 : inputs.kernels->backward_f32)(call);
}

}  // namespace

void bind_lstm(py::module_& m) {
  m.def("lstm_forward", &forward);
  m.def("lstm_backward", &backward);
  m.def("lstm_saved_row", &gk::lstm_saved_row);
  py::class_<gk::Memory>(m, "Memory", py::buffer_protocol())
      .def(py::init<size_t>())
      .def_buffer([](gk::Memory& memory) {
        return py::buffer_info(static_cast<char*>(memory.data()), py::ssize_t(memory.bytes()));
      });
  m.def("release_waiting", &gk::release_waiting);
}
