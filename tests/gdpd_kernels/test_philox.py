"""Counter-based noise: Random123's known answers, the layout of counters, the moments, and tracing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdpd_kernels.philox import _philox, philox_normal, philox_words, seed_key

ALL_ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, int, int, int]
) -> None:
    c0, c1, c2, c3 = counter
    words = _philox(torch.tensor(c0), torch.tensor(c1), c2, c3, key)
    assert tuple(int(word) for word in words) == answer


def reference_words(seed: int, group: int, row: int, step: int, sample: int) -> list[int]:
    """Philox4x32-10 on Python integers, straight from the paper."""
    x, k = [group, row, step, sample], [seed & ALL_ONES, (seed >> 32) & ALL_ONES]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(p1 >> 32) ^ x[1] ^ k[0], p1 & ALL_ONES, (p0 >> 32) ^ x[3] ^ k[1], p0 & ALL_ONES]
        k = [(k[0] + 0x9E3779B9) & ALL_ONES, (k[1] + 0xBB67AE85) & ALL_ONES]
    return x


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    row=st.integers(0, 6),
    group=st.integers(0, 5),
    step=st.sampled_from([0, 1, 7, ALL_ONES]),
    sample=st.integers(0, ALL_ONES),
    as_tensor=st.booleans(),
)
def test_words_sit_at_their_counters(seed: int, row: int, group: int, step: int, sample: int, as_tensor: bool) -> None:
    words = philox_words(torch.tensor(seed) if as_tensor else seed, 7, 23, step, sample)
    assert words.shape == (7, 6, 4)
    assert words.dtype == torch.int64
    assert words[row, group].tolist() == reference_words(seed, group, row, step, sample)


def test_normals_are_box_muller_of_the_words() -> None:
    words = philox_words(11, 3, 8, step=2, sample=1)
    noise = philox_normal(11, 3, 8, step=2, sample=1, dtype=torch.float64)
    for row in range(3):
        for col in range(8):
            w = words[row, col // 4].tolist()
            pair = (col % 4) // 2
            u0, u1 = ((2 * (w[2 * pair + i] >> 9) + 1) * 2.0**-24 for i in range(2))
            wave = math.sin if col % 2 else math.cos
            expected = math.sqrt(-2 * math.log(u0)) * wave(2 * math.pi * u1)
            assert noise[row, col].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_noise_of_an_element_does_not_depend_on_the_size_of_the_matrix() -> None:
    large = philox_normal(5, 40, 101)
    assert torch.equal(philox_normal(5, 3, 7), large[:3, :7])


def test_float32_and_half_agree_with_float64() -> None:
    exact = philox_normal(3, 64, 100, dtype=torch.float64)
    single = philox_normal(3, 64, 100)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=4e-6)
    assert torch.equal(philox_normal(3, 64, 100, dtype=torch.bfloat16), single.bfloat16())


def test_moments_are_those_of_a_standard_normal() -> None:
    noise = philox_normal(2024, 1000, 1000, dtype=torch.float64)
    count = noise.numel()
    assert abs(noise.mean().item()) < 5 / math.sqrt(count)
    assert abs(noise.var().item() - 1) < 5 * math.sqrt(2 / count)
    assert abs((noise**3).mean().item()) < 5 * math.sqrt(15 / count)
    assert abs((noise**4).mean().item() - 3) < 5 * math.sqrt(96 / count)
    # Neighbouring columns share a Box–Muller pair, rows and groups only a key.
    for shifted in ((noise[:, 1:] * noise[:, :-1]), (noise[1:] * noise[:-1]), (noise[:, 4:] * noise[:, :-4])):
        assert abs(shifted.mean().item()) < 5 / math.sqrt(shifted.numel())
    below = (noise < 1.0).double().mean().item()
    assert below == pytest.approx(0.8413447, abs=5 * math.sqrt(0.1335 / count))


def test_seed_step_and_sample_give_unrelated_noise() -> None:
    base = philox_normal(1, 100, 100)
    others = [
        philox_normal(2, 100, 100),
        philox_normal(1 << 32, 100, 100),
        philox_normal(1, 100, 100, step=1),
        philox_normal(1, 100, 100, sample=1),
    ]
    for other in others:
        assert abs((base * other).mean().item()) < 0.05


def test_noise_is_finite_at_the_extreme_words() -> None:
    uniforms = (2 * (torch.tensor([0, ALL_ONES]) >> 9) + 1).float() * 2.0**-24
    assert uniforms[0] > 0
    assert uniforms[1] < 1
    assert torch.isfinite(torch.sqrt(-2 * torch.log(uniforms))).all()


def test_empty_matrices_have_their_shape() -> None:
    assert philox_normal(0, 0, 5).shape == (0, 5)
    assert philox_normal(0, 5, 0).shape == (5, 0)


def test_traced_with_a_seed_tensor_gives_the_same_noise() -> None:
    compiled = torch.compile(lambda seed: philox_normal(seed, 5, 9, step=3), fullgraph=True, backend="aot_eager")
    seed = torch.tensor(-987654321012345)
    assert torch.equal(compiled(seed), philox_normal(-987654321012345, 5, 9, step=3))


def test_seed_key_splits_the_seed() -> None:
    assert seed_key(0x1122334455667788) == (0x55667788, 0x11223344)
    assert seed_key(-1) == (ALL_ONES, ALL_ONES)
    assert [int(word) for word in seed_key(torch.tensor([-1]))] == [ALL_ONES, ALL_ONES]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: philox_words(0, -1, 4), "rows is -1"),
        (lambda: philox_words(0, 1, -4), "cols -4"),
        (lambda: philox_words(0, 1, 4, step=-1), "step is -1"),
        (lambda: philox_words(0, 1, 4, sample=1 << 32), "sample is 4294967296"),
        (lambda: philox_words(torch.tensor(0.5), 1, 4), "seed is a torch.float32 tensor"),
        (lambda: philox_words(torch.tensor([1, 2]), 1, 4), "expected one int64 number"),
        (lambda: philox_normal(0, 1, 4, dtype=torch.int32), "dtype is torch.int32"),
    ],
)
def test_bad_arguments_are_refused_by_name(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
