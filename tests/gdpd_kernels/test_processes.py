"""Forked and spawned processes run the native kernels, also when their parent has run them on two threads; the number
of threads changes at run time; deterministic mode; copies and pickles of modules that hold what the library makes."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gdpd_kernels as gk
from gdpd_kernels.backends import load, native_backend
from modules import FEATURES, PaperDenoiser

_MISSING = load("native").unusable()
native_only = pytest.mark.skipif(bool(_MISSING), reason="; ".join(_MISSING))
WIDTH, BATCH, TIME_ALLOWED = 100, 300, 60.0  # rows enough for two threads; seconds


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return PaperDenoiser(WIDTH), torch.randn(BATCH, WIDTH)


def step(net: nn.Module, z: Tensor, backend: str = "native", prior: bool = True) -> list[Tensor]:
    """z_hat, the prior's loss, and gradients of both."""
    z, table = z.clone().requires_grad_(), gk.ddim_table(num_inference_steps=3, window="lower")
    z_hat = gk.reverse_sample(net, z, table=table, alpha=0.5, seed=1, backend=backend)
    (gradient,) = torch.autograd.grad(z_hat, z, torch.ones_like(z_hat), retain_graph=True)
    z_hat.backward(torch.ones_like(z_hat))
    if not prior:
        return [z_hat.detach(), gradient]
    loss = gk.prior_loss(net, z, alphas_cumprod=gk.alphas_cumprod(), seed=2, backend=backend)
    loss.backward()
    return [z_hat.detach(), gradient, z.grad, loss.detach()]  # type: ignore[list-item]


def uses_openmp() -> bool:
    return bool(native_backend._load().uses_openmp())  # type: ignore[union-attr]


def child(results: Connection, count: int, given: tuple[nn.Module, Tensor] | None) -> None:
    if count:
        torch.set_num_threads(count)
    found = step(*(given or made()), prior=given is None)
    results.send(([x.tolist() for x in found], torch.get_num_threads(), uses_openmp()))


# After a parent's work on several threads, torch's own products, square roots and all that is large hang in a forked
# child that has not been told to use one thread. Where it has not, only the sampler runs, on the parent's capture.
@native_only
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("method", "count", "inherits"),
    [("fork", 0, True), ("fork", 3, True), ("fork", 1, False), ("spawn", 2, False)],
    ids=["fork", "fork, other threads", "fork, one thread", "spawn"],
)
def test_a_child_of_a_process_that_ran_two_threads_computes_the_same(method: str, count: int, inherits: bool) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    if method == "fork" and torch.version.cuda is not None:
        pytest.skip("torch that is built for CUDA refuses autograd in a child whose parent has used it")
    torch.set_num_threads(2)
    given = made()
    for p in given[0].parameters():
        p.requires_grad_(False)  # the gradient of 1000 time embeddings is large
    expected, openmp = step(*given), uses_openmp()
    context: Any = multiprocessing.get_context(method)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sending, count, given if inherits else None))
    process.start()
    try:
        sending.close()
        assert receiving.poll(TIME_ALLOWED), f"no result after {TIME_ALLOWED} s: the child hangs"
        found, used, shares = receiving.recv()
        process.join(TIME_ALLOWED)
        assert process.exitcode == 0
    finally:
        if process.is_alive():
            process.kill()
    assert used == (count or 2)
    assert shares == (openmp and method != "fork")  # the team does not survive a fork: threads of the child's own
    assert len(found) == (2 if inherits else 4)
    for x, y in zip(found, expected, strict=False):
        assert torch.equal(torch.tensor(x), y)
    for x, y in zip(step(*given), expected, strict=True):  # and the parent goes on as before
        assert torch.equal(x, y)
    assert uses_openmp() == openmp


@native_only
@pytest.mark.usefixtures("threads")
def test_threads_may_change_between_calls_and_between_forward_and_backward() -> None:
    net, z = made()
    expected = step(net, z)
    for count in (2, 1, 3, 2):
        torch.set_num_threads(count)
        assert all(torch.equal(x, y) for x, y in zip(step(net, z), expected, strict=True))
    grads = []
    z.requires_grad_()
    for forward, backward in ((1, 1), (2, 1), (1, 3)):
        torch.set_num_threads(forward)
        z_hat = gk.reverse_sample(net.eval(), z, table=gk.ddim_table(), alpha=0.5, seed=1, backend="native")
        torch.set_num_threads(backward)
        grads.append(torch.autograd.grad(z_hat.square().sum(), z)[0])
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native_only)])
def test_deterministic_mode_changes_nothing(backend: str) -> None:
    net, z = made()
    expected = [*step(net, z, backend), *(p.grad for p in net.parameters())]
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            net.zero_grad()
            found.append([*step(net, z, backend), *(p.grad for p in net.parameters())])
    finally:
        torch.use_deterministic_algorithms(False)
    for each in found:
        assert all(torch.equal(x, y) for x, y in zip(each, expected, strict=True))  # type: ignore[arg-type]


# --- copies and pickles ---------------------------------------------------------------------------------------------


class Student(nn.Module):
    """Holds a denoiser, its capture and a table, as trainers' modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.denoiser = nn.Linear(5, FEATURES), PaperDenoiser()
        self.table = gk.ddim_table(num_inference_steps=3, window="lower")
        self.captured = gk.capture(self.denoiser)

    def forward(self, x: Tensor) -> Tensor:
        return gk.reverse_sample(self.captured, self.encoder(x), table=self.table, alpha=0.5, seed=2)


def through_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), through_a_file]
)
def test_copies_of_a_module_that_holds_captures_and_tables_live_on_their_own(duplicate: Any) -> None:
    torch.manual_seed(0)
    student, x = Student().eval(), torch.randn(6, 5)
    before = student(x)
    twin = duplicate(student)
    assert torch.equal(twin(x), before)
    assert twin.captured.module is twin.denoiser
    assert twin.table == student.table
    twin.train()(x).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in student.parameters())
    torch.optim.SGD(twin.parameters(), 0.1).step()
    assert torch.equal(student(x), before)
    assert not torch.equal(twin.eval()(x), before)
    student.load_state_dict(twin.state_dict())
    assert torch.equal(student(x), twin(x))
