"""Philox known answers, and noise that depends only on seed, question and fact."""

from __future__ import annotations

import math

import pytest
import torch

from dragkit_kernels import logistic_noise
from dragkit_kernels.noise import logistic, philox4x32


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(v, dtype=torch.int64) for v in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    """The published vectors of philox4x32-10: zeros, ones, digits of pi."""
    assert tuple(int(w) for w in philox4x32(words(*counter), words(*key))) == expected


def plain_philox_word(counter: list[int], key: list[int]) -> int:
    """Word 0 of Philox4x32-10 in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        low = 0xFFFFFFFF
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c[0]


@pytest.mark.parametrize("seed", [0, 42, (1 << 40) + 17, -3])
def test_counter_and_key_words(seed: int) -> None:
    """The noise depends on fact, draw, and both words of question key and seed."""
    keys = [0, 7, (5 << 32) + 9, -1, 0]
    fact_ptr = torch.tensor([0, 2, 2, 5, 6, 9], dtype=torch.int32)
    draws = logistic_noise(torch.tensor(seed), torch.tensor(keys), fact_ptr, num_draws=2)
    assert draws.dtype == torch.float32 and draws.shape == (2, 9)
    assert torch.equal(logistic_noise(torch.tensor(seed), torch.tensor(keys), fact_ptr), draws[0])
    low = 0xFFFFFFFF
    for draw, noise in enumerate(draws):
        row = 0
        for key, count in zip(keys, (2, 0, 3, 1, 3), strict=True):
            for fact in range(count):
                counter = [fact, key & low, (key >> 32) & low, draw]
                word = plain_philox_word(counter, [seed & low, (seed >> 32) & low])
                u = ((word >> 9) + 0.5) * 2.0**-23
                assert float(noise[row]) == pytest.approx(math.log(u / (1 - u)), rel=2e-6, abs=2e-6)
                row += 1


def test_extreme_words_give_finite_symmetric_noise() -> None:
    low, middle, high = logistic(torch.tensor([0, 1 << 31, 0xFFFFFFFF])).tolist()
    assert low == pytest.approx(math.log(2.0**-24 / (1 - 2.0**-24)), rel=1e-6)
    assert high == -low and abs(middle) < 1e-6


def test_noise_does_not_depend_on_the_batch() -> None:
    seed = torch.tensor(11)
    keys, counts = torch.tensor([3, 1 << 35, 9]), torch.tensor([5, 0, 8])
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    together = logistic_noise(seed, keys, ptr)
    for i in range(3):
        alone = logistic_noise(seed, keys[i : i + 1], torch.tensor([0, int(counts[i])]).int())
        assert torch.equal(alone, together[int(ptr[i]) : int(ptr[i + 1])])
    backwards = logistic_noise(seed, keys.flip(0), torch.tensor([0, 8, 8, 13]).int())
    assert torch.equal(backwards, torch.cat([together[5:], together[:5]]))


def test_noise_is_logistic() -> None:
    """Bounds the Kolmogorov-Smirnov distance over many questions and several seeds."""
    count = 40_000
    ptr = torch.arange(0, count + 1, 40).int()
    keys = torch.arange(len(ptr) - 1) * 12345 + 1
    for seed in (0, 1, 1 << 33):
        noise = logistic_noise(torch.tensor(seed), keys, ptr).double().sort().values
        assert torch.isfinite(noise).all()
        cdf = torch.sigmoid(noise)
        above = torch.arange(1, count + 1, dtype=torch.float64) / count
        distance = float(torch.maximum((cdf - above).abs(), (cdf - above + 1 / count).abs()).max())
        # Chance exceeds 1.95 / sqrt(n) once in a thousand draws. The seeds are fixed.
        assert distance < 1.95 / math.sqrt(count)


def test_different_seeds_and_questions_are_uncorrelated() -> None:
    ptr = torch.tensor([0, 5000, 10_000], dtype=torch.int32)
    draws = [
        piece.double()
        for seed in (1, 2)
        for piece in logistic_noise(torch.tensor(seed), torch.tensor([1, 2]), ptr).split(5000)
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 4 / math.sqrt(5000)


def test_no_facts_and_no_questions() -> None:
    seed = torch.tensor(1)
    none = torch.zeros(0, dtype=torch.int64)
    assert logistic_noise(seed, none, torch.zeros(1, dtype=torch.int32)).shape == (0,)
    assert logistic_noise(seed, torch.tensor([4]), torch.zeros(2, dtype=torch.int32)).shape == (0,)


def test_padding_rows_have_no_noise() -> None:
    ptr = torch.tensor([0, 2], dtype=torch.int32)
    noise = logistic_noise(torch.tensor(1), torch.tensor([4]), ptr, num_facts=5)
    assert noise[2:].tolist() == [0.0] * 3
    assert torch.equal(noise[:2], logistic_noise(torch.tensor(1), torch.tensor([4]), ptr))


def test_wrong_arguments() -> None:
    ptr = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"question_key must have shape \[1\], got \[2\]"):
        logistic_noise(torch.tensor(1), torch.tensor([4, 5]), ptr)
    with pytest.raises(ValueError, match=r"seed must have shape \[\], got \[1\]"):
        logistic_noise(torch.tensor([1]), torch.tensor([4]), ptr)
    with pytest.raises(ValueError, match="must be int64"):
        logistic_noise(torch.tensor(1), torch.tensor([4]).int(), ptr)
