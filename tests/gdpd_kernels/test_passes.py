"""Passes: every rewrite computes what the program did, values and gradients, in float64."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from capture_cases import WIDTH, Net, linear
from gdpd_kernels import DenoiserProgram, capture
from gdpd_kernels.backends import reference
from gdpd_kernels.passes import Rewrite, fold_batch_norm_eval, fold_time_tables
from gdpd_kernels.program import Op

ROWS = 5
PASSES: dict[str, Callable[[DenoiserProgram], Rewrite]] = {
    "fold_batch_norm_eval": fold_batch_norm_eval,
    "fold_time_tables": fold_time_tables,
    "norms, then tables": lambda program: fold_batch_norm_eval(program).then(fold_time_tables),
    "tables, then norms": lambda program: fold_time_tables(program).then(fold_batch_norm_eval),
}


def random_tensors(program: DenoiserProgram) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """z, rows, tables (a step per row) and parameters, of which variances are positive."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    params = [normal(*shape) for shape in program.params]
    for index in program.buffer_params:
        params[index] = params[index].detach().abs() + 0.5
    rows, tables = ([normal(ROWS, width) for width in widths] for widths in (program.rows, program.tables))
    return normal(ROWS, program.features), rows, tables, params


def assert_same(program: DenoiserProgram, rewrite: Rewrite) -> None:
    z, rows, tables, params = random_tensors(program)
    leaves = [x for x in (z, *rows, *tables, *params) if x.requires_grad]
    expected = reference.denoise(program, z, rows, tables, params, z.dtype)
    new_params, new_tables = rewrite.transform(params, tables)
    found = reference.denoise(rewrite.program, z, rows, new_tables, new_params, z.dtype)
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10 * max(scale, 1))
    weight = torch.linspace(-1, 1, expected.numel(), dtype=z.dtype).view_as(expected)
    for x, ours, theirs in zip(
        leaves,
        torch.autograd.grad((found * weight).sum(), leaves, allow_unused=True),
        torch.autograd.grad((expected * weight).sum(), leaves, allow_unused=True),
        strict=True,
    ):
        ours, theirs = (torch.zeros_like(x) if g is None else g for g in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * max(theirs.abs().max().item(), 1))


def kinds(program: DenoiserProgram) -> list[str]:
    return [op.kind for op in program.ops]


def parse(text: str) -> DenoiserProgram:
    return DenoiserProgram.parse(text)


# --- BatchNorm --------------------------------------------------------------------------------------------------------


def test_batch_norm_folds_into_the_linear_before_it() -> None:
    program = parse(
        """denoiser z:3 tables:- rows:- params:4x3,4,4,4,4,4,3x4
        %1 = linear(z, p0, p1)
        %2 = batch_norm_eval(%1, p2, p3, p4, p5, eps=1e-05)
        %3 = relu(%2)
        %4 = linear(%3, p6, -)
        return %4"""
    )
    rewrite = fold_batch_norm_eval(program)
    assert kinds(rewrite.program) == ["linear", "relu", "linear"]
    assert rewrite.program.params == ((4, 3), (4,), (3, 4))
    assert_same(program, rewrite)


@pytest.mark.parametrize("bias", ["p1", "-"])
@pytest.mark.parametrize("affine", ["p4, p5", "-, -", "p4, -", "-, p5"])
def test_batch_norm_folds_with_or_without_its_own_and_the_layers_bias(bias: str, affine: str) -> None:
    before = parse(
        f"""denoiser z:4 tables:- rows:- params:4x4,4,4,4,4,4
        %1 = linear(z, p0, {bias})
        %2 = batch_norm_eval(%1, p2, p3, {affine}, eps=0.001)
        return %2"""
    )
    after = parse(
        f"""denoiser z:4 tables:- rows:- params:4x4,4,4,4,4,4
        %1 = batch_norm_eval(z, p2, p3, {affine}, eps=0.001)
        %2 = linear(%1, p0, {bias})
        return %2"""
    )
    for program in (before, after):
        rewrite = fold_batch_norm_eval(program)
        assert kinds(rewrite.program) == ["linear"]
        assert_same(program, rewrite)


def test_batch_norm_folds_across_an_added_table() -> None:
    program = parse(
        """denoiser z:4 tables:4 rows:- params:4x4,4,4,4,4,4
        %1 = linear(z, p0, p1)
        %2 = add(t0, %1)
        %3 = batch_norm_eval(%2, p2, p3, p4, p5, eps=1e-05)
        return %3"""
    )
    rewrite = fold_batch_norm_eval(program)
    assert kinds(rewrite.program) == ["linear", "add"]
    assert_same(program, rewrite)


def test_batch_norm_folds_into_every_linear_after_it() -> None:
    program = parse(
        """denoiser z:4 tables:- rows:- params:4x4,4,4,4,4,4,4x4
        %1 = relu(z)
        %2 = batch_norm_eval(%1, p2, p3, p4, p5, eps=1e-05)
        %3 = linear(%2, p0, p1)
        %4 = linear(%2, p6, -)
        %5 = mul(%3, %4)
        return %5"""
    )
    rewrite = fold_batch_norm_eval(program)
    assert kinds(rewrite.program) == ["relu", "linear", "linear", "mul"]
    assert_same(program, rewrite)


@pytest.mark.parametrize(
    "body",
    [
        "%1 = linear(z, p0, p1)\n%2 = batch_norm_eval(%1, p2, p3, p4, p5, eps=1e-05)\n%3 = add(%1, %2)\nreturn %3",
        "%1 = relu(z)\n%2 = batch_norm_eval(%1, p2, p3, p4, p5, eps=1e-05)\nreturn %2",
        "%1 = batch_norm_eval(z, p2, p3, p4, p5, eps=1e-05)\n%2 = linear(%1, p0, p1)\n%3 = add(%1, %2)\nreturn %3",
    ],
)
def test_batch_norm_that_others_read_stays(body: str) -> None:
    program = parse(f"denoiser z:4 tables:- rows:- params:4x4,4,4,4,4,4\n{body}")
    rewrite = fold_batch_norm_eval(program)
    assert rewrite.program is program
    assert not rewrite.changed
    assert_same(program, rewrite)


def test_a_tied_weight_is_folded_only_where_the_norm_is() -> None:
    program = parse(
        """denoiser z:4 tables:- rows:- params:4x4,4,4,4,4,4
        %1 = linear(z, p0, p1)
        %2 = batch_norm_eval(%1, p2, p3, p4, p5, eps=1e-05)
        %3 = silu(%2)
        %4 = linear(%3, p0, p1)
        return %4"""
    )
    rewrite = fold_batch_norm_eval(program)
    assert kinds(rewrite.program) == ["linear", "silu", "linear"]
    assert len(rewrite.program.params) == 4
    assert_same(program, rewrite)


# --- time tables ------------------------------------------------------------------------------------------------------


def test_a_table_before_a_linear_becomes_its_bias_per_step() -> None:
    program = parse(
        """denoiser z:4 tables:4 rows:- params:6x4,6,4x6,4
        %1 = add(z, t0)
        %2 = linear(%1, p0, p1)
        %3 = silu(%2)
        %4 = linear(%3, p2, p3)
        return %4"""
    )
    rewrite = fold_time_tables(program)
    assert kinds(rewrite.program) == ["linear", "add", "silu", "linear"]
    assert rewrite.program.tables == (6,)
    assert [str(formula) for formula in rewrite.tables] == ["linear(t0, p0, p1)"]
    assert_same(program, rewrite)


def test_a_table_after_a_linear_takes_its_bias() -> None:
    program = parse(
        """denoiser z:4 tables:4,4 rows:- params:4x4,4
        %1 = linear(z, p0, p1)
        %2 = add(t0, %1)
        %3 = add(%2, t1)
        return %3"""
    )
    rewrite = fold_time_tables(program)
    assert kinds(rewrite.program) == ["linear", "add"]
    assert rewrite.program.params == ((4, 4),)
    assert_same(program, rewrite)


def test_tables_run_down_a_chain_of_linears() -> None:
    program = parse(
        """denoiser z:4 tables:4,5 rows:- params:5x4,5,6x5,6,4x6
        %1 = add(z, t0)
        %2 = linear(%1, p0, p1)
        %3 = add(%2, t1)
        %4 = linear(%3, p2, p3)
        %5 = linear(%4, p4, -)
        return %5"""
    )
    rewrite = fold_time_tables(program)
    assert kinds(rewrite.program) == ["linear", "linear", "linear", "add"]
    assert rewrite.program.tables == (4,)
    assert_same(program, rewrite)


@pytest.mark.parametrize(
    "body",
    [
        "%1 = add(z, t0)\n%2 = linear(%1, p0, p1)\n%3 = add(%1, %2)\nreturn %3",
        "%1 = add(z, t0)\nreturn %1",
        "%1 = linear(z, p0, p1)\n%2 = add(%1, t0)\n%3 = add(%1, %2)\nreturn %3",
        "%1 = add(t0, t0)\n%2 = linear(%1, p0, p1)\nreturn %2",
        "%1 = mul(z, t0)\n%2 = linear(%1, p0, p1)\nreturn %2",
    ],
)
def test_tables_that_others_read_stay(body: str) -> None:
    program = parse(f"denoiser z:4 tables:4 rows:- params:4x4,4\n{body}")
    rewrite = fold_time_tables(program)
    assert rewrite.program is program
    assert_same(program, rewrite)


# --- any program ------------------------------------------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn) -> DenoiserProgram:
    """Straight-line programs over widths 2 and 3, rich in what the passes look for."""
    widths = {"z": 2, "t0": 2, "t1": 3, "t2": 2, "r0": 3}
    params: list[tuple[int, ...]] = []
    ops: list[Op] = []

    def param(*shape: int) -> int:
        same = [i for i, other in enumerate(params) if other == shape and i not in buffers]
        if same and draw(st.booleans()):
            return draw(st.sampled_from(same))
        params.append(shape)
        return len(params) - 1

    buffers: set[int] = set()
    for _ in range(draw(st.integers(1, 8))):
        # Recent values more often, so that chains arise.
        x = draw(st.sampled_from([*list(widths)[-3:], *widths]))
        kind = draw(
            st.sampled_from(["linear", "linear", "batch_norm_eval", "batch_norm_eval", "add", "add", "relu", "mul"])
        )
        width = widths[x]
        if kind == "linear":
            out = draw(st.sampled_from([2, 3]))
            op = Op(kind, (x,), (param(out, width), param(out) if draw(st.booleans()) else None))
            width = out
        elif kind == "batch_norm_eval":
            params.extend([(width,), (width,)])
            statistics = len(params) - 2, len(params) - 1
            buffers.update(statistics)
            affine = (param(width) if draw(st.booleans()) else None for _ in range(2))
            op = Op(kind, (x,), (*statistics, *affine), (1e-3,))
        elif kind in ("add", "mul"):
            others = [name for name, other in widths.items() if other == width]
            op = Op(kind, (x, draw(st.sampled_from(others))))
        else:
            op = Op(kind, (x,))
        ops.append(op)
        widths[f"%{len(ops)}"] = width
    if width != 2:
        ops.append(Op("linear", (f"%{len(ops)}",), (param(2, width), None)))
    return DenoiserProgram(2, (2, 3, 2), (3,), tuple(params), tuple(ops), f"%{len(ops)}")


@settings(max_examples=150, deadline=None)
@given(program=programs(), name=st.sampled_from(sorted(PASSES)))
def test_any_rewritten_program_computes_the_same(program: DenoiserProgram, name: str) -> None:
    rewrite = PASSES[name](program)
    assert_same(program, rewrite)
    assert len(rewrite.params) == len(rewrite.program.params)
    assert len(rewrite.tables) == len(rewrite.program.tables)
    assert parse(rewrite.program.text) == rewrite.program


@settings(max_examples=50, deadline=None)
@given(program=programs(), name=st.sampled_from(["fold_batch_norm_eval", "fold_time_tables"]))
def test_a_pass_finds_nothing_more_in_what_it_has_rewritten(program: DenoiserProgram, name: str) -> None:
    once = PASSES[name](program)
    assert PASSES[name](once.program).program == once.program


def test_norms_in_a_row_all_fold_into_the_layer_after_them() -> None:
    body = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH), linear())
    net = Net(lambda s, z, t: s.body(z + s.e(t)), body=body, e=nn.Embedding(10, WIDTH)).eval()
    program = capture(net, WIDTH).program
    assert kinds(program).count("batch_norm_eval") == 3
    rewrite = fold_batch_norm_eval(program)
    assert "batch_norm_eval" not in kinds(rewrite.program)
    assert_same(program, rewrite)


def test_rewrites_of_a_captured_module_stay_live() -> None:
    body = nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), nn.ReLU(), linear())
    net = Net(lambda s, z, t: s.body(z + s.e(t)), body=body, e=nn.Embedding(10, WIDTH)).double().eval()
    captured = capture(net, WIDTH)
    rewrite = PASSES["norms, then tables"](captured.program)
    assert kinds(rewrite.program) == ["linear", "add", "relu", "linear"]
    assert rewrite.program.names[0] == "body.0.weight with body.1"
    z, t = torch.randn(ROWS, WIDTH, dtype=torch.float64), torch.tensor([1, 2, 3, 4, 5])
    for _ in range(2):
        with torch.no_grad():
            for tensor in (*net.parameters(), net.body[1].running_mean):
                tensor.add_(0.1)
        params, tables = rewrite.transform(captured.parameters_now(), captured.tables(t))
        found = reference.denoise(rewrite.program, z, [], tables, params, z.dtype)
        torch.testing.assert_close(found, net(z, t))
    found.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_rewrites_are_plain_data() -> None:
    program = parse("denoiser z:2 tables:2 rows:- params:2x2,2\n%1 = add(z, t0)\n%2 = linear(%1, p0, p1)\nreturn %2")
    rewrite = fold_time_tables(program)
    assert pickle.loads(pickle.dumps(rewrite)) == rewrite
    assert hash(rewrite) == hash(fold_time_tables(parse(program.text)))
