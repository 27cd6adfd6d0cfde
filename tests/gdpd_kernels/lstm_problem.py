"""LSTM problems of any size, and how each is solved: by a backend of `lstm`, or by torch.nn.LSTM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gdpd_kernels as gk
from gdpd_kernels.backends import load, native_backend, native_lstm
from guarded import Guards
from problem import Result


@dataclass(frozen=True)
class LstmProblem:
    """Inputs of an LSTM, and the gradients of its results; x as [batch, steps, inputs] if `batch_first`."""

    x: Tensor
    params: list[Tensor]
    state: tuple[Tensor, Tensor] | None
    lengths: Tensor | None
    grad_output: Tensor
    grad_h: Tensor
    grad_c: Tensor
    batch_first: bool = True
    last: bool = False
    dropout: float = 0.0
    frozen: frozenset[str] = frozenset()

    @property
    def each(self) -> int:
        return 4 if len(self.params) > 2 and self.params[2].dim() == 1 else 2

    @property
    def layers(self) -> int:
        return len(self.params) // self.each

    def to(self, dtype: torch.dtype) -> LstmProblem:
        state = None if self.state is None else (self.state[0].to(dtype), self.state[1].to(dtype))
        return replace(
            self,
            x=self.x.to(dtype),
            params=[p.to(dtype) for p in self.params],
            state=state,
            grad_output=self.grad_output.to(dtype),
            grad_h=self.grad_h.to(dtype),
            grad_c=self.grad_c.to(dtype),
        )

    def leaves(self) -> dict[str, Tensor]:
        """Copies of what may take a gradient, those not frozen asking for one."""
        named = {"x": self.x}
        if self.state is not None:
            named |= {"h0": self.state[0], "c0": self.state[1]}
        named |= {f"p{i}": p for i, p in enumerate(self.params)}
        return {name: t.detach().clone().requires_grad_(name not in self.frozen) for name, t in named.items()}

    def _result(self, output: Tensor, h_n: Tensor, c_n: Tensor, leaves: dict[str, Tensor]) -> Result:
        asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        total = (output * self.grad_output).sum() + (h_n * self.grad_h).sum() + (c_n * self.grad_c).sum()
        grads = torch.autograd.grad(total, list(asked.values()), allow_unused=True)
        found = {f"grad {name}": g for name, g in zip(asked, grads, strict=True)}
        return {"output": output.detach(), "h_n": h_n.detach(), "c_n": c_n.detach(), **found}  # type: ignore[dict-item]

    def run(self, backend: str = "native", compute: torch.dtype | None = None) -> Result:
        """Results and gradients of `gk.lstm`."""
        leaves = self.leaves()
        output, (h_n, c_n) = gk.lstm(
            leaves["x"],
            [leaves[f"p{i}"] for i in range(len(self.params))],
            None if self.state is None else (leaves["h0"], leaves["c0"]),
            lengths=self.lengths,
            batch_first=self.batch_first,
            dropout=self.dropout,
            seed=7 if self.dropout else None,
            output="last" if self.last else "all",
            backend=backend,
            compute_dtype=compute,
        )
        return self._result(output, h_n, c_n, leaves)

    def module(self) -> nn.LSTM:
        """torch.nn.LSTM with these weights."""
        hidden = self.params[1].shape[1]
        made = nn.LSTM(self.x.shape[2], hidden, self.layers, bias=self.each == 4, batch_first=self.batch_first)
        made.to(self.x.dtype)
        with torch.no_grad():
            for parameter, value in zip(made._flat_weights, self.params, strict=True):
                parameter.copy_(value)  # type: ignore[union-attr]
        return made

    def run_torch(self) -> Result:
        """The same of torch.nn.LSTM, packed and padded again where rows have lengths."""
        module, leaves = self.module(), self.leaves()
        for i, parameter in enumerate(module._flat_weights):
            leaves[f"p{i}"] = parameter.requires_grad_(f"p{i}" not in self.frozen)  # type: ignore[union-attr]
        state = None if self.state is None else (leaves["h0"], leaves["c0"])
        x, steps = leaves["x"], self.x.shape[1 if self.batch_first else 0]
        if self.lengths is None:
            output, (h_n, c_n) = module(x, state)
        else:
            packed = pack_padded_sequence(x, self.lengths, self.batch_first, enforce_sorted=False)
            output, (h_n, c_n) = module(packed, state)
            output, _ = pad_packed_sequence(output, self.batch_first, total_length=steps)
        if self.last:
            rows = torch.arange(h_n.shape[1])
            ends = (torch.full_like(rows, steps) if self.lengths is None else self.lengths) - 1
            output = output[rows, ends] if self.batch_first else output[ends, rows]
        return self._result(output, h_n, c_n, leaves)

    def run_between_guards(self, compute: torch.dtype | None = None) -> Result:
        """Forward and backward of the native kernels themselves: every tensor lies between guards, and every result is
        NaN at first."""
        with Guards() as guards:
            x = guards.place("x", self.x)
            params = [guards.place("params", p) for p in self.params]
            h0, c0 = (None, None) if self.state is None else (guards.place("state", s) for s in self.state)
            grads = [guards.place("grad", g) for g in (self.grad_output, self.grad_h, self.grad_c)]
            inputs = (x, h0, c0, self.lengths, torch.tensor(7), params)
            dtype = compute or self.x.dtype
            kept, native_lstm.reused = native_lstm.reused, lambda numel, dtype: torch.empty(numel, dtype=dtype)
            try:
                output, h_n, c_n, saved = native_lstm.forward(
                    *inputs, self.batch_first, self.last, self.dropout, dtype, True
                )
            finally:
                native_lstm.reused = kept
            wanted = [i for i, t in enumerate([x, h0, c0, *params]) if t is not None]
            if self.last:
                with torch._C.DisableTorchFunction():
                    output = h_n[-1]
                    grads[1] = grads[1].clone()
                    grads[1][-1] += grads[0]
                grads[0] = None  # type: ignore[call-overload]
            found = native_lstm.backward(*grads, *inputs, saved, self.batch_first, self.dropout, dtype, wanted)
        guards.check()
        return dict(zip(self.run("native", compute), [output, h_n, c_n, *found], strict=True))


def lstm_problem(
    batch: int,
    steps: int,
    inputs: int,
    hidden: int,
    layers: int = 1,
    *,
    bias: bool = True,
    state: bool = False,
    ragged: bool = False,
    batch_first: bool = True,
    last: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> LstmProblem:
    """A problem in float64, with numbers that float32 holds too; weights as torch draws them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    def weight(*shape: int) -> Tensor:
        return ((torch.rand(*shape, generator=generator) * 2 - 1) / hidden**0.5).double()

    params = []
    for n in range(layers):
        params += [weight(4 * hidden, inputs if n == 0 else hidden), weight(4 * hidden, hidden)]
        params += [weight(4 * hidden), weight(4 * hidden)] if bias else []
    sizes = (batch, steps) if batch_first else (steps, batch)
    return LstmProblem(
        x=normal(*sizes, inputs),
        params=params,
        state=(0.5 * normal(layers, batch, hidden), 0.5 * normal(layers, batch, hidden)) if state else None,
        lengths=torch.randint(1, steps + 1, (batch,), generator=generator) if ragged else None,
        grad_output=normal(batch, hidden) if last else normal(*sizes, hidden),
        grad_h=normal(layers, batch, hidden),
        grad_c=normal(layers, batch, hidden),
        batch_first=batch_first,
        last=last,
        dropout=dropout,
    )


def lstm_problems() -> Iterator[LstmProblem]:
    """Some of everything: one row and several blocks of rows, one step and several chunks of steps."""
    yield lstm_problem(1, 1, 1, 1, state=True)
    yield lstm_problem(64, 9, 1, 100, 3, last=True)
    yield lstm_problem(37, 11, 3, 33, 2, bias=False, batch_first=False, state=True, ragged=True)
    yield lstm_problem(5, 30, 17, 16, 3, state=True, dropout=0.3)
    yield lstm_problem(2, 3, 5, 130, 2, ragged=True, last=True)
    yield lstm_problem(601, 3, 2, 7, 2, ragged=True, state=True)


@dataclass
class Threads:
    """So many threads, however little there is to do."""

    count: int

    def __enter__(self) -> None:
        self.before = native_backend._MACS_PER_THREAD, torch.get_num_threads()
        native_backend._MACS_PER_THREAD = 1
        torch.set_num_threads(self.count)

    def __exit__(self, *_: object) -> None:
        native_backend._MACS_PER_THREAD = self.before[0]
        torch.set_num_threads(self.before[1])


MISSING = load("native").unusable()
