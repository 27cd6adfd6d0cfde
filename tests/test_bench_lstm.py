"""The LSTM's benchmark measures what it says: what is wrong is refused, and accuracies are compared fairly."""

from __future__ import annotations

import numpy as np
import pytest

import gdpd_kernels as gk
from bench import lstm, lstm_accuracy
from bench.lstm import LstmCase
from gdpd.data import load_dataset
from gdpd_kernels.benchmark.cases import unavailable

pytestmark = pytest.mark.skipif(bool(unavailable("native")), reason=unavailable("native"))


def test_a_result_that_is_wrong_is_refused_and_not_timed(monkeypatch):
    case = LstmCase(3, 5, 8, 2)
    assert lstm.wrong(case) == {}
    run = gk.lstm
    monkeypatch.setattr(gk, "lstm", lambda *a, **k: (1.05 * run(*a, **k)[0], None))
    assert "native" in lstm.wrong(case)
    found = lstm.measure(case, 0.01, processor=True)
    assert "error" in found["refused"]["native"]
    assert "native" not in found["timings"]
    line, failed = lstm._line(case, True, 2.5, found)
    assert failed
    assert "×" not in line.replace("2.5×", "")


def test_operations_are_counted_by_hand():
    forward = 2 * 5 * 7 * 4 * 11 * (1 + 11 + 11 + 11)
    assert LstmCase(5, 7, 11, 2, "forward").flops == forward
    # weights of all four products, and inputs of all but x
    assert LstmCase(5, 7, 11, 2).flops == 2 * forward + 2 * 5 * 7 * 4 * 11 * 33


def test_training_is_as_accurate_as_with_torchs(recwarn):
    data = load_dataset("ItalyPowerDemand")
    ours, theirs = (lstm_accuracy.accuracy(data, native, 0, 12) for native in (True, False))
    assert ours > 0.8
    assert abs(ours - theirs) < 0.05


def test_the_sign_flip_test_finds_a_difference_and_none():
    assert lstm_accuracy.sign_flip_p(np.full(10, 0.5)) == 2 / 1024
    assert lstm_accuracy.sign_flip_p(np.array([1.0, -1.0, 2.0, -2.0])) == 1.0
