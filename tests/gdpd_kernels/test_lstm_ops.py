"""The LSTM's operators as PyTorch sees them, the choice of a backend, autocast, compiled graphs, bad input by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gdpd_kernels as gk
from accuracy import assert_exact, assert_identical
from gdpd_kernels.backends import BackendError, BackendFallback, native_lstm
from gdpd_kernels.lstm import reasons
from lstm_problem import MISSING, LstmProblem, lstm_problem

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))),
]
on_both = pytest.mark.parametrize("backend", BACKENDS)
native_only = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))

SMALL = {
    "state": lambda: lstm_problem(3, 4, 2, 3, 2, state=True),
    "ragged": lambda: lstm_problem(3, 4, 2, 3, 2, ragged=True, state=True, batch_first=False),
    "no biases, dropout": lambda: lstm_problem(2, 3, 2, 3, 3, bias=False, dropout=0.4),
    "last": lambda: lstm_problem(2, 3, 1, 2, 2, ragged=True, last=True),
}


def arguments(problem: LstmProblem, backend: str) -> tuple[Any, ...]:
    leaves = problem.leaves()
    params = [leaves[f"p{i}"] for i in range(len(problem.params))]
    seed = torch.tensor(7) if problem.dropout else None
    given = (leaves["x"], leaves.get("h0"), leaves.get("c0"), problem.lengths, seed, params)
    return *given, problem.batch_first, problem.last, problem.dropout, backend, "float64", True


@pytest.mark.parametrize(
    ("name", "backend"),
    [("ragged", "reference"), *(pytest.param(name, "native", marks=native_only) for name in ("ragged", "last"))],
)
def test_opcheck(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Results are compared, also those that are only kept for backward, in which there is room that nobody uses.
    monkeypatch.setattr(native_lstm, "reused", lambda numel, dtype: torch.zeros(numel, dtype=dtype))
    problem = SMALL[name]()
    given = arguments(problem, backend)
    torch.library.opcheck(torch.ops.gdpd_kernels.lstm, given)
    with torch.no_grad():
        *_, saved = torch.ops.gdpd_kernels.lstm(*given)
    x, h0, c0, lengths, seed, params, batch_first, last, dropout, *_ = given
    inputs = [None if t is None else t.detach() for t in (x, h0, c0)]
    positions = [i for i, t in enumerate([*inputs, *params]) if t is not None]
    grads = [None if last else problem.grad_output, problem.grad_h, None]
    detached = [p.detach() for p in params]
    torch.library.opcheck(
        torch.ops.gdpd_kernels.lstm_backward,
        (*grads, *inputs, lengths, seed, detached, saved, batch_first, dropout, backend, "float64", positions),
    )


def as_function(problem: LstmProblem, backend: str) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    leaves = problem.leaves()
    names = list(leaves)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, tensors, strict=True))
        output, (h_n, c_n) = gk.lstm(
            named["x"],
            [named[f"p{i}"] for i in range(len(problem.params))],
            (named["h0"], named["c0"]) if "h0" in named else None,
            lengths=problem.lengths,
            batch_first=problem.batch_first,
            dropout=problem.dropout,
            seed=7 if problem.dropout else None,
            output="last" if problem.last else "all",
            backend=backend,
        )
        return output, h_n, c_n

    return function, list(leaves.values())


@on_both
@pytest.mark.parametrize("name", SMALL)
def test_gradcheck_and_double_backward(name: str, backend: str) -> None:
    function, tensors = as_function(SMALL[name](), backend)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    if name in ("ragged", "no biases, dropout"):
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_the_reference_is_torchs() -> None:
    for problem in (SMALL["state"](), SMALL["ragged"](), SMALL["last"](), lstm_problem(4, 5, 3, 6, bias=False)):
        assert_exact(problem.run("reference"), problem.run_torch())
        assert_exact(problem.run("torch"), problem.run_torch())


@native_only
def test_inputs_of_any_layout_and_none_is_written() -> None:
    problem = lstm_problem(4, 5, 3, 6, 2, state=True, ragged=True)
    expected = problem.run()
    strided = replace(
        problem,
        x=problem.x.transpose(1, 2).contiguous().transpose(1, 2),
        params=[p.t().contiguous().t() if p.dim() == 2 else p.repeat_interleave(2)[::2] for p in problem.params],
        state=tuple(s.transpose(0, 2).contiguous().transpose(0, 2) for s in problem.state or ()),
    )
    before = [t.clone() for t in (strided.x, *strided.params)]
    assert_identical(strided.run(), expected)
    assert_identical(replace(problem, x=problem.x.transpose(0, 1), batch_first=False,
                             grad_output=problem.grad_output.transpose(0, 1)).run()
                     | {"output": expected["output"], "grad x": expected["grad x"]}, expected)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, (strided.x, *strided.params), strict=True))


@native_only
def test_a_graph_can_be_walked_twice() -> None:
    problem = lstm_problem(3, 4, 2, 5, 2).to(torch.float32)
    leaves = problem.leaves()
    params = [leaves[f"p{i}"] for i in range(8)]
    output, _ = gk.lstm(leaves["x"], params, batch_first=True)
    first = torch.autograd.grad(output.sum(), params, retain_graph=True)
    second = torch.autograd.grad(output.sum(), params)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@native_only
def test_autocast_rounds_the_operands_of_products_and_nothing_else() -> None:
    problem = lstm_problem(5, 6, 3, 20, 2, state=True).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = problem.run("native")
    assert_identical(found, problem.run("native", torch.bfloat16))
    assert found["output"].dtype == torch.float32
    assert not torch.equal(found["output"], problem.run("native")["output"])
    with torch.autocast("cpu", torch.bfloat16):  # float64 is left alone, as everywhere under autocast
        assert_identical(lstm_problem(2, 3, 3, 4).run("native"), lstm_problem(2, 3, 3, 4).run("native", torch.float64))


@native_only
def test_a_compiled_graph_holds_it_whole() -> None:
    problem = lstm_problem(4, 5, 2, 6, 2, ragged=True).to(torch.float32)

    def step(x: Tensor, params: list[Tensor], lengths: Tensor | None) -> Tensor:
        output, (h_n, _) = gk.lstm(x, params, lengths=lengths, batch_first=True)
        return output.square().sum() + h_n.sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for batch in (4, 3):
        leaves = problem.leaves()
        params = [leaves[f"p{i}"] for i in range(8)]
        x, lengths = leaves["x"][:batch], problem.lengths
        assert lengths is not None
        found = torch.autograd.grad(compiled(x, params, lengths[:batch]), params)
        expected = torch.autograd.grad(step(x, params, lengths[:batch]), params)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_vmap_and_grad_transforms_go_through_the_reference() -> None:
    problem = lstm_problem(3, 4, 2, 5, 1)
    xs = torch.stack([problem.x, 2 * problem.x])

    def run(x: Tensor) -> Tensor:
        return gk.lstm(x, problem.params, batch_first=True)[0]

    torch.testing.assert_close(torch.vmap(run)(xs), torch.stack([run(x) for x in xs]))
    leaf = problem.x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(run(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: run(x).square().sum())(problem.x), expected)


def test_the_seed_comes_from_torchs_generator() -> None:
    problem = lstm_problem(4, 5, 3, 6, 2)

    def run() -> Tensor:
        return gk.lstm(problem.x, problem.params, batch_first=True, dropout=0.5)[0]

    torch.manual_seed(3)
    first, other = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first)
    assert not torch.equal(other, first)


def test_what_native_cannot_do_goes_elsewhere_and_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 4)
    params = [p.detach() for p in torch.nn.LSTM(4, 5).parameters()]
    assert "tensors are on meta; it runs on cpu" in reasons("native", x.to("meta"), torch.float32)
    assert reasons("torch", x, torch.bfloat16) == [
        "compute_dtype is torch.bfloat16; it computes in the dtype of x, torch.float32"
    ]
    half = [p.bfloat16() for p in params]
    with pytest.raises(BackendError, match=r"'native' cannot run this LSTM:\n.*x is torch.bfloat16; it takes"):
        gk.lstm(x.bfloat16(), half, backend="native")
    with pytest.raises(BackendError, match="torch draws the dropout's masks itself"):
        gk.lstm(x, [*params, *second_layer()], dropout=0.1, seed=1, backend="torch")
    monkeypatch.setattr(native_lstm, "_load", lambda: "no compiled module here")
    with pytest.warns(BackendFallback, match="LSTM on backend 'torch'; 'native' cannot: no compiled module here"):
        found, _ = gk.lstm(x, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(found, gk.lstm(x, params)[0])
        torch.testing.assert_close(found, gk.lstm(x, params, backend="reference")[0])
        gk.lstm(x, params, compute_dtype=torch.bfloat16, backend="reference")


def second_layer() -> list[Tensor]:
    return [p.detach() for p in torch.nn.LSTM(5, 5).parameters()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x has shape \[2, 3\], torch.float32; expected floating \[batch, steps, inputs\]"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int64)}, "torch.int64; expected floating"),
        ({"x": torch.zeros(2, 0, 4)}, "batch and steps must be at least 1"),
        ({"x": torch.zeros(2, 3, 9)}, r"params\[0\] has shape \[20, 4\]; expected \[20, 9\] \(x has 9 inputs\)"),
        ({"x": torch.zeros(2, 3, 4).double()}, r"params\[0\] is torch.float32 on cpu, x torch.float64"),
        ({"params": []}, "params: 0 tensors"),
        ({"params": [torch.zeros(20, 4)] * 3}, "params: 3 tensors of shapes"),
        ({"hx": (torch.zeros(1, 2, 6),) * 2}, r"h_0 has shape \[1, 2, 6\].* expected \[1, 2, 5\]"),
        ({"hx": (torch.zeros(1, 2, 5), torch.zeros(1, 3, 5))}, r"c_0 has shape \[1, 3, 5\]"),
        ({"lengths": torch.tensor([1, 4])}, "lengths has values from 1 to 4; expected 1 to 3: the steps of x"),
        ({"lengths": torch.tensor([0, 2])}, "lengths has values from 0 to 2"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths has shape .*torch.float32; expected integers"),
        ({"lengths": torch.tensor([1, 2, 3])}, r"lengths has shape \[3\], torch.int64; expected integers \[2\]"),
        ({"dropout": 1.5}, r"dropout=1.5 must lie in \[0, 1\]"),
        ({"output": "first"}, "output='first' is not one of 'all', 'last'"),
        ({"backend": "cuda"}, "backend: 'cuda' is not known"),
        ({"compute_dtype": torch.float64}, "compute_dtype is torch.float64; it must be a floating dtype no wider"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    params = [p.detach() for p in torch.nn.LSTM(4, 5).parameters()]
    given: dict[str, Any] = {"x": torch.zeros(2, 3, 4), "params": params, "batch_first": True} | changes
    with pytest.raises(ValueError, match=message):
        gk.lstm(given.pop("x"), given.pop("params"), given.pop("hx", None), **given)


def test_what_is_no_tensor_is_named() -> None:
    params = [p.detach() for p in torch.nn.LSTM(4, 5).parameters()]
    x = torch.zeros(2, 3, 4)
    for message, call in {
        "x: expected a tensor": lambda: gk.lstm([[0.0]], params),  # type: ignore[arg-type]
        r"params\[1\]: expected a tensor": lambda: gk.lstm(x, [params[0], 3]),  # type: ignore[list-item]
        r"hx: expected None or \(h_0, c_0\)": lambda: gk.lstm(x, params, x),  # type: ignore[arg-type]
        "c_0: expected a tensor": lambda: gk.lstm(x, params, (torch.zeros(1, 3, 5), 1)),  # type: ignore[arg-type]
        "lengths: expected a tensor": lambda: gk.lstm(x, params, lengths=[1, 2, 3]),  # type: ignore[arg-type]
    }.items():
        with pytest.raises(TypeError, match=message):
            call()


@native_only
def test_the_operator_itself_refuses_what_would_read_elsewhere() -> None:
    problem = lstm_problem(3, 4, 2, 3, 1).to(torch.float32)
    run: Any = torch.ops.gdpd_kernels.lstm
    rest = (True, False, 0.0, "native", "float32", True)
    for x, params, lengths in (
        (problem.x, problem.params, torch.tensor([1, 5, 2])),
        (problem.x, problem.params, torch.tensor([1, 2])),
        (problem.x, [problem.params[0][:, :1], *problem.params[1:]], None),
        (problem.x.double(), problem.params, None),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"lengths|params|seed"):
            run(x, None, None, lengths, None, params, *rest)
    x = problem.x.clone().requires_grad_()
    output = run(x, None, None, None, None, problem.params, *rest[:-1], False)[0]
    with pytest.raises(RuntimeError, match="called with save=False"):
        output.sum().backward()
