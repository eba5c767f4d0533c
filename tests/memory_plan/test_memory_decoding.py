"""The decoding formulas against counted bytes of the tensors alive at the peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dragkit.generator.generator import Generator
from dragkit.generator.lora.adapters import DEFAULT_LORA_TARGETS
from dragkit.generator.nemotron_h import decoder, mamba_ops, prefill_in_microbatches
from dragkit.generator.prompt import NeuralPrompt
from dragkit.memory_plan import memory
from tests.memory_plan.memory_cases import build

SEQUENCES, PROMPT, ANSWER = 4, 150, 3
PATTERN = "EMEM*EMEM"
# Each block type has the largest workspace once.
WIDTHS = {
    "as the 30B": {},
    "more experts, narrow": {"num_experts_per_tok": 8, "moe_intermediate_size": 40},
    "mamba": {"num_experts_per_tok": 1, "mamba_head_dim": 96, "ssm_state_size": 48},
    "attention": {"num_experts_per_tok": 1, "mamba_head_dim": 8, "head_dim": 96},
    "wide": {"hidden_size": 376, "num_key_value_heads": 8},
}


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, without those in `given`.

    Attributes:
        peak: most bytes at a time. Memory that an operator allocates inside is not seen.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self._given = {t.untyped_storage().data_ptr() for t in given}
        self._bytes: dict[int, tuple[int, weakref.ref]] = {}
        self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs=None) -> Any:
        out = op(*args, **(kwargs or {}))
        alive = self._bytes
        for tensor in (x for x in tree_leaves(out) if isinstance(x, Tensor)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in alive and storage.data_ptr() not in self._given:
                gone = weakref.ref(storage, lambda _, key=key: alive.pop(key))
                alive[key] = storage.nbytes(), gone
        self.peak = max(self.peak, sum(size for size, _ in self._bytes.values()))
        return out


class EndlessTokenizer:
    """A tokeniser whose end token is never generated."""

    eos_token_id = -1


def prompts(sequences: int) -> NeuralPrompt:
    total, none = sequences * PROMPT, torch.zeros(0, dtype=torch.int64)
    return NeuralPrompt(
        input_ids=torch.randint(1, 1024, (total,)),
        slot=torch.full((total,), -1),
        position=torch.arange(PROMPT).repeat(sequences),
        question=torch.arange(sequences).repeat_interleave(PROMPT),
        ptr=(PROMPT * torch.arange(sequences + 1)).int(),
        target_row=none,
        target_id=none,
        longest=PROMPT,
    )


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Allocates only its output, as the GPU's varlen attention does.
    attention = lambda query, *_: torch.empty_like(query).fill_(0.1)  # noqa: E731
    monkeypatch.setattr(decoder, "packed_attention", attention)


def peak_bytes(model: torch.nn.Module, passes: int) -> int:
    """Bytes at the peak of decoding all prompts, without weights and the prompts themselves."""
    tokens = SEQUENCES * PROMPT // passes
    generator, prompt = (
        Generator(model, EndlessTokenizer(), max_tokens_per_microbatch=tokens),
        prompts(SEQUENCES),
    )
    fields = (getattr(prompt, name) for name in NeuralPrompt.__dataclass_fields__)
    given = [*model.parameters(), *model.buffers(), *(x for x in fields if isinstance(x, Tensor))]
    with AliveBytes(given) as alive:
        answers = generator.greedy_tokens(prompt, None, ANSWER)
    assert [len(row) for row in answers] == [ANSWER] * SEQUENCES
    return alive.peak


def test_decoding_peaks_at_the_bytes_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    busiest = set()
    for name, sizes in WIDTHS.items():
        model, dims, _ = build(monkeypatch, PATTERN, DEFAULT_LORA_TARGETS, **sizes)
        for passes in (1, SEQUENCES):
            tokens = SEQUENCES * PROMPT // passes
            planned = memory.decode_bytes(dims, SEQUENCES, PROMPT, ANSWER, tokens)
            assert peak_bytes(model, passes) == pytest.approx(sum(planned.values()), rel=0.1), name
        busiest.add(
            max(dims.block_types, key=lambda kind: memory.prefill_bytes_per_token(dims, kind))
        )
    assert busiest == {"linear_attention", "full_attention", "moe"}


def test_states_have_the_bytes_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dims, _ = build(monkeypatch, PATTERN, DEFAULT_LORA_TARGETS)
    generator, prompt = Generator(model, EndlessTokenizer()), prompts(SEQUENCES)
    with torch.no_grad():
        _, states = prefill_in_microbatches(
            generator._decoder[0],
            generator.embed(prompt, None),
            prompt.length,
            mamba_ops("dragkit"),
            ANSWER,
            max_tokens=2 * PROMPT,
        )
    planned = memory.decode_bytes(dims, SEQUENCES, PROMPT, ANSWER, 0)
    counted = {"KeyValues": 0, "MambaState": 0}
    for state in states:
        counted[type(state).__name__] += sum(t.nbytes for t in state[:2])
    assert counted == {
        "KeyValues": planned["keys and values"],
        "MambaState": planned["Mamba-2 states"],
    }
