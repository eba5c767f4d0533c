"""Batches made ahead: their order, errors in their place, an end without a thread left behind."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dragkit.config import resolve_config
from dragkit.data.packed import QuestionBatch
from dragkit.demo import demo_files
from dragkit.trainer import question_dataset as question_dataset
from dragkit.trainer.question_dataset import QuestionDataset
from dragkit.trainer.transfer import DeviceCopier, pack_bytes, prefetch, unpack_bytes

ROWS = [[0, 1, 2], [3], [5, 4], [6, 7, 8, 9], [2]]


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_order_is_kept_and_another_thread_does_the_work() -> None:
    names = set()

    def stage(item: int) -> int:
        names.add(threading.current_thread().name)
        return item * item

    assert list(prefetch(range(20), stage)) == [i * i for i in range(20)]
    assert list(prefetch([], stage)) == [] and list(prefetch([None, None], str)) == ["None", "None"]
    assert names == {"prefetch_0"} and not threads()


def test_it_is_two_ahead_and_no_more() -> None:
    made = threading.Semaphore(0)
    count = []

    def items() -> Iterator[int]:
        for item in range(10):
            count.append(item)
            made.release()
            yield item

    staged = prefetch(items(), lambda item: item)
    assert count == [], "nothing is made before it is asked for"
    for taken in range(3):
        assert next(staged) == taken
        while len(count) < taken + 3:
            assert made.acquire(timeout=10)
        assert not made.acquire(timeout=0.05) or len(count) == taken + 3
        assert len(count) == taken + 3
    staged.close()
    assert not threads()


@pytest.mark.parametrize("broken", ["item", "stage"])
def test_an_error_is_raised_in_its_place(broken: str) -> None:
    def items() -> Iterator[int]:
        for item in range(6):
            if broken == "item" and item == 3:
                raise ValueError("item 3 is broken")
            yield item

    def stage(item: int) -> int:
        if broken == "stage" and item == 3:
            raise ValueError("item 3 is broken")
        return item

    found = []
    with pytest.raises(ValueError, match="item 3 is broken"):
        for item in prefetch(items(), stage):
            found.append(item)  # noqa: PERF402
    assert found == [0, 1, 2] and not threads()


def test_leaving_early_ends_the_thread() -> None:
    staged = []

    def use() -> None:
        for item in prefetch(range(1000), lambda item: staged.append(item) or item):
            if item == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert not threads() and len(staged) <= 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> QuestionDataset:
    from dragkit.data.cache import cache_root
    from dragkit.retriever.text_encoder import TextEncoder, find_encoder

    folder = tmp_path_factory.mktemp("prefetch")
    lines = demo_files().train.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "questions.jsonl").write_text("".join(lines[:10]), encoding="utf-8")
    values = {"run.phase": 1, "data.heuristics_path": str(folder / "questions.jsonl")}
    config = resolve_config("tiny", None, values)[0]
    encoder = TextEncoder(find_encoder(), cache_root(None))
    return QuestionDataset(Path(folder / "questions.jsonl"), config, encoder, None, 4)


def same(one: QuestionBatch, two: QuestionBatch) -> bool:
    pairs = list(zip(one.tensors(), two.tensors(), strict=True))
    return one.rows == two.rows and all(
        x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu()) for x, y in pairs
    )


class HostCopies:
    """`DeviceCopier` without a device."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cuda"
        self.unfinished = 0

    def begin(self, batch: QuestionBatch) -> tuple[QuestionBatch, torch.Tensor]:
        self.unfinished += 1
        return batch, pack_bytes(batch.tensors(), pin=False)

    def finish(self, copy: tuple[QuestionBatch, torch.Tensor]) -> QuestionBatch:
        self.unfinished -= 1
        batch, joined = copy
        return batch.with_tensors(unpack_bytes(joined, batch.tensors()))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("to_device", [True, False])
def test_batches_are_those_of_the_loader(
    dataset: QuestionDataset, monkeypatch: pytest.MonkeyPatch, workers: int, to_device: bool
) -> None:
    monkeypatch.setattr(question_dataset, "DeviceCopier", HostCopies)
    monkeypatch.setattr(dataset, "num_workers", workers)
    monkeypatch.setattr(dataset, "to_device", to_device)
    plain = list(dataset.load(ROWS, torch.device("cpu")))
    early = list(dataset.load(ROWS, torch.device("cuda")))
    assert [batch.rows for batch in plain] == [tuple(rows) for rows in ROWS]
    assert all(same(x, y) for x, y in zip(plain, early, strict=True))
    assert not threads() and not multiprocessing.active_children()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_or_an_early_end_leaves_nothing_behind(
    dataset: QuestionDataset, monkeypatch: pytest.MonkeyPatch, workers: int, device: str
) -> None:
    """Workers ignore signals, so one that is left would keep the process from its exit."""
    monkeypatch.setattr(question_dataset, "DeviceCopier", HostCopies)
    monkeypatch.setattr(dataset, "num_workers", workers)
    rows = [[0], [10], *[[1]] * 8]
    with pytest.raises(IndexError, match="out of range") as caught:
        list(dataset.load(rows, torch.device(device)))
    assert not threads() and not multiprocessing.active_children()
    batches = dataset.load(ROWS, torch.device(device))
    assert next(batches).rows == (0, 1, 2)
    batches.close()
    assert not threads() and not multiprocessing.active_children()
    assert caught.traceback is not None


def test_no_thread_on_a_cpu(dataset: QuestionDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    collator = dataset.collator
    monkeypatch.setattr(
        dataset,
        "collator",
        lambda rows: names.append(threading.current_thread().name) or collator(rows),
    )
    for device in (None, torch.device("cpu")):
        assert len(list(dataset.load(ROWS[:2], device))) == 2
    assert set(names) == {"MainThread"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_arrive_before_they_are_used_and_stay_while_they_are(
    dataset: QuestionDataset,
) -> None:
    """Beside a busy device, with memory that is wanted again at once."""
    device = torch.device("cuda")
    plain = list(dataset.load(ROWS * 20))
    noise = torch.randn(4096, 4096, device=device)
    found = []
    for batch in dataset.load(ROWS * 20, device):
        for _ in range(5):
            noise = (noise @ noise).tanh()
        found.append([tensor.clone() for tensor in batch.tensors()])
    for batch, tensors in zip(plain, found, strict=True):
        assert all(torch.equal(x, y.cpu()) for x, y in zip(batch.tensors(), tensors, strict=True))
    assert isinstance(DeviceCopier(device).begin(plain[0]).arrived, torch.cuda.Event)
