"""Timings with a clock and a GPU counter set by hand, the gate of decoding, the small set."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torch_geometric")

from bench import measure  # noqa: E402
from bench.bench_decode import (  # noqa: E402
    Decoded,
    check_tokens,
    decode_anew,
    decode_cached,
)
from bench.bench_kernels import in_small_set  # noqa: E402
from bench.measure import Tally, Way, compare  # noqa: E402
from dragkit.config import GeneratorConfig  # noqa: E402
from dragkit.generator.generator import Generator  # noqa: E402
from dragkit.generator.load import load_generator  # noqa: E402
from dragkit.generator.prompt import NeuralPrompt  # noqa: E402
from dragkit.observe.flops import ActiveWeights  # noqa: E402
from dragkit.observe.gpu import GpuMonitor, device_spec  # noqa: E402

WEIGHTS = ActiveWeights(blocks=1000, head=300, lora=10)


class Time:
    """Seconds that pass only when a step says so, and joules with them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.joules = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return 2 * self.now


class Benchmark:
    """What `compare` asks of pytest-benchmark."""

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


def step_of(time: Time, tally: Tally | None, seconds: float) -> Callable[[], None]:
    def step() -> None:
        time.now += seconds
        time.joules += 300 * seconds
        if tally is not None:
            tally.tokens += 200
            tally.supervised += 20

    return step


def two_ways(time: Time) -> list[Way]:
    tally = Tally(weights=WEIGHTS)
    return [
        Way("ours", step_of(time, tally, 0.5), 16, 2, tally),
        Way("plain", step_of(time, None, 2.0), 16),
    ]


def test_rates_are_of_the_timed_steps_alone(time: Time) -> None:
    """The warm-up's tokens do not count."""
    found = compare(Benchmark(), "x", two_ways(time), {}, repeats=3, device=torch.device("cpu"))
    ours, plain = found.timings
    assert plain.rates is None and ours.wall_ms == (500.0, 500.0, 500.0)
    assert ours.questions_per_s == pytest.approx(32.0)
    assert plain.speedup_wall == pytest.approx(4.0)
    rates = ours.rates
    assert rates.tokens_per_s == pytest.approx(400.0)
    assert rates.supervised_tokens_per_s == pytest.approx(40.0)
    # (4 * 1000 + 6 * 10) tokens and 4 * 300 supervised ones.
    assert rates.flop_per_s == pytest.approx(400 * 4060 + 40 * 1200)
    assert rates.mfu is None and rates.joules_per_question is None
    assert "| ours | 400 | 40 | 0.001672 |" in found.markdown()


@pytest.mark.parametrize(("seconds", "repeats"), [(None, 9), (1.0, 3), (15.0, 5), (1e3, 9)])
def test_what_takes_long_is_repeated_less(time: Time, seconds: float | None, repeats: int) -> None:
    """A round of both ways takes three seconds."""
    found = compare(Benchmark(), "x", two_ways(time), {"a": 1}, repeats=9, seconds=seconds)
    assert found.about == {"a": 1, "repeats": repeats}
    # Two calls of each to warm up.
    assert time.now == pytest.approx(2 * 2.5 + 3 * repeats)


def test_tokens_alone(time: Time) -> None:
    tally = Tally()

    def step() -> None:
        time.now += 0.5
        tally.tokens += 10

    way = Way("decoding", step, 4, 1, tally)
    (row,) = compare(Benchmark(), "x", [way], {}, repeats=2).timings
    assert row.rates.tokens_per_s == pytest.approx(20.0)
    assert row.rates.supervised_tokens_per_s is None and row.rates.flop_per_s is None


def test_utilisation_and_energy_of_a_gpu(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = SimpleNamespace(read=lambda: SimpleNamespace(energy_j=time.joules))
    monkeypatch.setattr(GpuMonitor, "open", lambda device: monitor)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    found = compare(Benchmark(), "x", two_ways(time), {}, repeats=3, device=torch.device("cuda"))
    rates = found.timings[0].rates
    # 300 W, and 16 questions in half a second.
    assert rates.joules_per_question == pytest.approx(300 * 0.5 / 16)
    peak = device_spec("NVIDIA H200").bf16_tflops * 1e12
    assert rates.mfu == pytest.approx((400 * 4060 + 40 * 1200) / peak)
    assert "| MFU | J/question |" in found.markdown()


def test_a_counter_that_fails_gives_no_energy(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([SimpleNamespace(energy_j=1.0), None])
    monitor = SimpleNamespace(read=lambda: next(readings, SimpleNamespace(energy_j=9.0)))
    monkeypatch.setattr(GpuMonitor, "open", lambda device: monitor)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    found = compare(Benchmark(), "x", two_ways(time), {}, repeats=3, device=torch.device("cuda"))
    rates = found.timings[0].rates
    assert rates.joules_per_question is None and rates.mfu is None and rates.flop_per_s > 0


@pytest.fixture(scope="module")
def generator() -> Generator:
    return load_generator(GeneratorConfig(), torch.device("cpu"), name="tiny")


def prompts(lengths: list[int], vectors: int) -> NeuralPrompt:
    """Random text; the last tokens of the first prompt are slots."""
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
        kept=none,
        longest=max(lengths),
    )


def test_both_ways_of_decoding_agree(generator: Generator) -> None:
    prompt = prompts([9, 40, 3], vectors=2)
    vectors = torch.randn(2, generator.dim, generator=torch.Generator().manual_seed(1))
    cached = decode_cached(generator, prompt, vectors, 5)
    check_tokens(cached, decode_anew(generator, prompt, vectors, 5))
    assert [len(tokens) for tokens in cached.tokens] == [5, 5, 5] and len(cached.texts) == 3
    other = decode_anew(generator, prompt, -vectors, 5)
    assert other.tokens[0] != cached.tokens[0]
    with pytest.raises(ValueError, match=r"differ at prompts \[0\]"):
        check_tokens(cached, other)


def test_texts_end_where_the_end_token_is(generator: Generator, monkeypatch) -> None:
    prompt = prompts([9, 40, 3], vectors=0)
    free = decode_anew(generator, prompt, None, 6).tokens
    said = [token for tokens in free for token in tokens]
    # A token that is said once, not last, and by one prompt becomes the end token.
    row, place = next(
        (row, place) for row in range(3) for place in range(4) if said.count(free[row][place]) == 1
    )
    monkeypatch.setattr(generator, "eos_token_id", free[row][place])
    cached = decode_cached(generator, prompt, None, 6)
    check_tokens(cached, decode_anew(generator, prompt, None, 6))
    wanted = [tokens[:place] if i == row else tokens for i, tokens in enumerate(free)]
    assert cached.tokens == wanted


def test_the_gate_of_decoding() -> None:
    decoded = Decoded([[5, 6], [5, 6, 7, 8], []], ["a", "b", ""])
    check_tokens(decoded, decoded)
    with pytest.raises(ValueError, match=r"differ at prompts \[1\]"):
        check_tokens(decoded, decoded._replace(tokens=[[5, 6], [5, 6, 7], []]))
    with pytest.raises(ValueError, match="differ"):
        check_tokens(decoded, decoded._replace(texts=["a", "c", ""]))


@pytest.mark.parametrize(
    ("params", "chosen"),
    [
        ({"pack": "S", "name": "segment_softmax", "backward": False}, True),
        ({"pack": "C, 2 graphs", "name": "layer", "backward": True}, True),
        ({"pack": "C, 2 graphs", "name": "layer", "backward": False}, False),
        ({"pack": "C, 2 graphs", "name": "fact_head", "backward": True}, False),
        ({"pack": "C, 2 graphs"}, False),
        ({"pack": "C, reduced", "name": "layer", "backward": True}, False),
        ({"pack": "WebQSP", "name": "layer", "backward": True}, False),
    ],
)
def test_the_small_set_of_the_kernels(params: dict[str, object], chosen: bool) -> None:
    assert in_small_set(params) == chosen
