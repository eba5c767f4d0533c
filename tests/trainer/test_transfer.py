"""Prefetched batches: their order, errors in place, and no thread or worker left at the end."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from dragkit.data.packed import QuestionBatch
from dragkit.trainer import question_dataset
from dragkit.trainer.question_dataset import QuestionDataset
from dragkit.trainer.transfer import pack_bytes, prefetch, unpack_bytes

ROWS = [[0, 1, 2], [3], [5, 4], [6, 7], [2]]


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def leftovers() -> list:
    return threads() + multiprocessing.active_children()


def test_unpacked_tensors_equal_the_packed_ones_and_share_their_buffer() -> None:
    tensors = [
        torch.randn(3, 5),
        torch.tensor([True, False, True]),
        torch.zeros(0, 4, dtype=torch.int32),
        torch.arange(7, dtype=torch.int64),
        torch.randn(4, 6).t(),
        torch.tensor(2.5),
    ]
    packed = pack_bytes(tensors, pin=False)
    views = unpack_bytes(packed, tensors)
    for view, tensor in zip(views, tensors, strict=True):
        assert torch.equal(view, tensor) and view.dtype == tensor.dtype
        assert view.untyped_storage().data_ptr() == packed.data_ptr()
        assert (view.data_ptr() - packed.data_ptr()) % 64 == 0 or view.numel() == 0
    views[0].zero_()
    assert not packed[:60].any()


def test_order_is_kept_and_another_thread_does_the_work() -> None:
    names = set()

    def stage(item: int) -> int:
        names.add(threading.current_thread().name)
        return item * item

    assert list(prefetch(range(20), stage)) == [i * i for i in range(20)]
    assert list(prefetch([], stage)) == [] and list(prefetch([None] * 2, str)) == ["None"] * 2
    assert names == {"prefetch_0"} and not threads()


def test_the_thread_is_two_items_ahead_and_no_more() -> None:
    produced, semaphore = [], threading.Semaphore(0)

    def items() -> Iterator[int]:
        for item in range(10):
            produced.append(item)
            semaphore.release()
            yield item

    staged = prefetch(items(), lambda item: item)
    assert produced == [], "nothing runs before the first item is asked for"
    for taken in range(3):
        assert next(staged) == taken
        while len(produced) < taken + 3:
            assert semaphore.acquire(timeout=10)
        assert not semaphore.acquire(timeout=0.05) or len(produced) == taken + 3
        assert len(produced) == taken + 3
    staged.close()
    assert not threads()


@pytest.mark.parametrize("broken", ["item", "stage"])
def test_an_error_is_raised_in_its_place(broken: str) -> None:
    def fail_at_3(item: int, part: str) -> int:
        if item == 3 and broken == part:
            raise ValueError("item 3 is broken")
        return item

    items = (fail_at_3(item, "item") for item in range(6))
    received = []
    with pytest.raises(ValueError, match="item 3 is broken"):
        received.extend(prefetch(items, lambda item: fail_at_3(item, "stage")))
    assert received == [0, 1, 2] and not threads()


def test_an_error_in_the_loop_ends_the_thread() -> None:
    staged = []
    with pytest.raises(KeyboardInterrupt):
        for item in prefetch(range(1000), lambda item: staged.append(item) or item):
            if item == 2:
                raise KeyboardInterrupt
    assert not threads() and len(staged) <= 6


def same(one: QuestionBatch, two: QuestionBatch) -> bool:
    pairs = list(zip(one.tensors(), two.tensors(), strict=True))
    return one.rows == two.rows and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


class HostCopier:
    """`DeviceCopier` without a device."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cuda"

    def start(self, batch: QuestionBatch) -> tuple[QuestionBatch, torch.Tensor]:
        return batch, pack_bytes(batch.tensors(), pin=False)

    def finish(self, copy: tuple[QuestionBatch, torch.Tensor]) -> QuestionBatch:
        batch, packed = copy
        return batch.with_tensors(unpack_bytes(packed, batch.tensors()))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("to_device", [True, False])
def test_prefetched_batches_equal_those_of_the_loader(
    dataset: QuestionDataset, monkeypatch: pytest.MonkeyPatch, workers: int, to_device: bool
) -> None:
    monkeypatch.setattr(question_dataset, "DeviceCopier", HostCopier)
    monkeypatch.setattr(dataset, "num_workers", workers)
    loaded = list(dataset.load(ROWS, torch.device("cpu")))
    prefetched = list(dataset.load(ROWS, torch.device("cuda"), to_device=to_device))
    assert [batch.rows for batch in loaded] == [tuple(rows) for rows in ROWS]
    # Models are compiled on a GPU.
    assert any(batch.padded is not None for batch in prefetched) == to_device
    prefetched = [replace(batch, padded=None) for batch in prefetched]
    assert all(same(x, y) for x, y in zip(loaded, prefetched, strict=True))
    assert not leftovers()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_or_an_early_end_leaves_no_thread_and_no_worker(
    dataset: QuestionDataset, monkeypatch: pytest.MonkeyPatch, workers: int, device: str
) -> None:
    """Workers ignore signals, so the process would wait for a worker that is left."""
    monkeypatch.setattr(question_dataset, "DeviceCopier", HostCopier)
    monkeypatch.setattr(dataset, "num_workers", workers)
    with pytest.raises(IndexError, match="out of range") as caught:
        list(dataset.load([[0], [8], *[[1]] * 8], torch.device(device)))
    assert not leftovers()
    batches = dataset.load(ROWS, torch.device(device))
    assert next(batches).rows == (0, 1, 2)
    batches.close()
    assert not leftovers()
    assert caught.traceback is not None, "the traceback must be alive during the checks"


def test_no_thread_on_a_cpu(dataset: QuestionDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    names, collator = [], dataset.collator
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
def test_copies_arrive_before_their_use_and_stay_until_it(dataset: QuestionDataset) -> None:
    """The device is busy, and the allocator would reuse freed memory at once."""
    device = torch.device("cuda")
    expected = list(dataset.load(ROWS * 20))
    noise = torch.randn(4096, 4096, device=device)
    received = []
    for batch in dataset.load(ROWS * 20, device):
        for _ in range(5):
            noise = (noise @ noise).tanh()
        received.append([tensor.clone() for tensor in batch.tensors()])
    for batch, tensors in zip(expected, received, strict=True):
        assert all(torch.equal(x, y.cpu()) for x, y in zip(batch.tensors(), tensors, strict=True))
