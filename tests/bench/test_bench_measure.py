"""Timings by a simulated clock and GPU counter, and the gate of decoding."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torch_geometric")

from bench import measure  # noqa: E402
from bench.bench_decode import check_tokens, decode_without_cache  # noqa: E402
from bench.measure import Contender, Tally, check_agreement, compare  # noqa: E402
from bench.results import Comparison, Timing  # noqa: E402
from dragkit.config import GeneratorConfig  # noqa: E402
from dragkit.generator.generator import Generator  # noqa: E402
from dragkit.generator.load import load_generator  # noqa: E402
from dragkit.generator.prompt import NeuralPrompt  # noqa: E402
from dragkit.observe.flops import ActiveWeights  # noqa: E402
from dragkit.observe.gpu import GpuMonitor, card_spec  # noqa: E402

WEIGHTS = ActiveWeights(blocks=1000, head=300, lora=10)
FLOP_PER_S = 400 * 4060 + 40 * 1200


class Time:
    """A clock of seconds, and a counter of joules, that only contenders advance."""

    now = joules = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return 2 * self.now


class Benchmark:
    """The part of pytest-benchmark that `compare` uses."""

    group: str | None = None

    def __init__(self) -> None:
        self.extra_info: dict[str, object] = {}

    def pedantic(
        self, target: Callable[[], None], setup: Callable[[], None], rounds: int, iterations: int
    ) -> None:
        for _ in range(rounds):
            setup()
            target()


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(measure, "time", time)
    return time


def contenders(time: Time) -> list[Contender]:
    """A call of ours takes half a second and counts tokens. A call of the peer takes two."""
    tally = Tally(weights=WEIGHTS)

    def ours() -> None:
        time.now += 0.5
        time.joules += 150
        tally.tokens += 200
        tally.supervised += 20

    def plain() -> None:
        time.now += 2.0

    return [
        Contender("ours", ours, peer=False, calls=2, tally=tally),
        Contender("absent", plain, obstacle="not installed"),
        Contender("plain", plain),
    ]


def timings(time: Time, **options: object) -> dict[str, Timing]:
    comparison = Comparison("x", {"a": 1}, [], questions=16)
    benchmark = Benchmark()
    compare(benchmark, comparison, contenders(time), **options)
    assert benchmark.extra_info["name"] == benchmark.group == "x"
    assert [row.name for row in comparison.timings] == ["ours", "absent", "plain"]
    return {row.name: row for row in comparison.timings} | {"all": comparison}


def test_times_and_rates_are_of_single_calls(time: Time) -> None:
    rows = timings(time, repeats=3)
    ours, plain = rows["ours"], rows["plain"]
    assert ours.ms == (500.0, 500.0, 500.0) and ours.cpu_ms == 1000.0 and not ours.peer
    assert plain.ms[0] == 2000.0 and plain.peer and plain.rates is None
    assert rows["absent"].ms is None and rows["absent"].note == "not installed"
    assert ours.rates.tokens_per_s == pytest.approx(400.0)
    assert ours.rates.supervised_tokens_per_s == pytest.approx(40.0)
    # (4 * 1000 + 6 * 10) tokens and 4 * 300 supervised ones.
    assert ours.rates.flop_per_s == pytest.approx(FLOP_PER_S)
    assert ours.rates.mfu is None and ours.rates.joules_per_question is None
    text = rows["all"].markdown()
    assert "| plain | 2000 (2000-2000) | 4.00 |" in text and "| 400 | 40 | 0.001672 |" in text
    assert "Strongest peer: plain, 4.00 times the time of ours." in text
    assert "- absent: not installed" in text


@pytest.mark.parametrize(("seconds", "repeats"), [(None, 9), (1.0, 3), (15.0, 5), (1e3, 9)])
def test_long_rounds_are_repeated_less(time: Time, seconds: float | None, repeats: int) -> None:
    """A round of both contenders takes three seconds."""
    comparison = timings(time, repeats=9, seconds=seconds)["all"]
    assert comparison.about == {"a": 1, "repeats": repeats}
    # Each contender warms up with two calls.
    assert time.now == pytest.approx(2 * 2.5 + 3 * repeats)


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "some GPU"])
@pytest.mark.parametrize("fails", [False, True])
def test_utilisation_and_energy_of_a_gpu(
    time: Time, monkeypatch: pytest.MonkeyPatch, gpu: str, fails: bool
) -> None:
    def do_bench(run: Callable[[], None], rep: int, quantiles: list[float]) -> list[float]:
        """Like Triton's, which also makes calls that it does not time."""
        assert quantiles == [0.5, 0.2, 0.8]
        begin = time.now
        for _ in range(8):
            run()
        ms = (time.now - begin) / 8 * 1e3
        return [ms, ms / 2, ms * 2]

    readings = iter([1.0, None])
    energy = (lambda: next(readings, 9.0)) if fails else (lambda: time.joules)
    monitor = SimpleNamespace(
        read=lambda: None if (j := energy()) is None else SimpleNamespace(energy_j=j)
    )
    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(GpuMonitor, "open", lambda device: monitor)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    ours = timings(time, repeats=3, device=torch.device("cuda"))["ours"]
    assert ours.ms == (500.0, 250.0, 1000.0) and ours.cpu_ms is None
    assert ours.rates.tokens_per_s == pytest.approx(400.0)
    if fails:
        assert ours.rates.joules_per_question is None
    else:  # a call of 16 questions takes 150 J
        assert ours.rates.joules_per_question == pytest.approx(150 / 16)
    spec = card_spec(gpu)
    mfu = None if spec is None else pytest.approx(FLOP_PER_S / (spec.bf16_tflops * 1e12))
    assert ours.rates.mfu == mfu and ours.rates.flop_per_s > 0


def test_a_wrong_result_is_not_timed() -> None:
    right = torch.tensor([1.0, -4.0])
    check_agreement("x", right, right + 3e-5, 1e-5)
    for wrong in (right + 5e-5, -right, right * float("nan")):
        with pytest.raises(ValueError, match="x: differs from ours"):
            check_agreement("x", right, wrong, 1e-5)


def test_the_norm_allows_what_the_largest_difference_does_not() -> None:
    right, wrong = torch.ones(100), torch.ones(100)
    wrong[3] = 1.05
    check_agreement("x", right, wrong, 6e-3, order=2)
    for order in (2, torch.inf):
        with pytest.raises(ValueError, match="x: differs from ours"):
            check_agreement("x", right, wrong, 4e-3, order=order)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return load_generator(GeneratorConfig(), torch.device("cpu"), name="tiny")


def prompts(lengths: list[int], vectors: int) -> NeuralPrompt:
    """Prompts of random text. The last tokens of the first prompt are slots."""
    draw = torch.Generator().manual_seed(0)
    total, length = sum(lengths), torch.tensor(lengths)
    slot = torch.full((total,), -1)
    slot[lengths[0] - vectors : lengths[0]] = torch.arange(vectors)
    question = torch.repeat_interleave(torch.arange(len(lengths)), length)
    start = length.cumsum(0) - length
    none = torch.zeros(0, dtype=torch.int64)
    return NeuralPrompt(
        input_ids=torch.randint(3, 1000, (total,), generator=draw),
        slot=slot,
        position=torch.arange(total) - start[question],
        question=question,
        ptr=torch.tensor([0, *length.cumsum(0)]).int(),
        target_row=none,
        target_id=none,
        longest=max(lengths),
    )


def test_decoding_with_and_without_cache_agrees(generator: Generator) -> None:
    prompt = prompts([9, 40, 3], vectors=2)
    vectors = torch.randn(2, generator.dim, generator=torch.Generator().manual_seed(1))
    cached = generator.greedy_tokens(prompt, vectors, 5)
    check_tokens(cached, decode_without_cache(generator, prompt, vectors, 5))
    assert [len(tokens) for tokens in cached] == [5, 5, 5]
    other = decode_without_cache(generator, prompt, -vectors, 5)
    with pytest.raises(ValueError, match=r"differ at prompts \[0\]"):
        check_tokens(cached, other)


def test_decoding_stops_at_the_end_token(generator: Generator, monkeypatch) -> None:
    prompt = prompts([9, 40, 3], vectors=0)
    tokens = decode_without_cache(generator, prompt, None, 6)
    every = [token for row in tokens for token in row]
    # A token that occurs once, and not as a last token, becomes the end token.
    row, column = next((i, j) for i in range(3) for j in range(4) if every.count(tokens[i][j]) == 1)
    monkeypatch.setattr(generator, "eos_token_id", tokens[row][column])
    cached = generator.greedy_tokens(prompt, None, 6)
    check_tokens(cached, decode_without_cache(generator, prompt, None, 6))
    tokens[row] = tokens[row][:column]
    assert cached == tokens


def test_the_gate_of_decoding() -> None:
    tokens = [[5, 6], [5, 6, 7, 8], []]
    check_tokens(tokens, tokens)
    with pytest.raises(ValueError, match=r"differ at prompts \[1\]"):
        check_tokens(tokens, [[5, 6], [5, 6, 7], []])
