"""The joint step waits for the device once: a whole optimizer step on a device without numbers.

Tensors of the meta device have sizes but no values, so whatever would stop the host on a GPU until
a value is known raises here: item, tolist, nonzero, masks as indices, sizes that depend on data. A
dispatch mode sees what the meta device lets pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from dragkit.generator.generator import Generator
from dragkit.generator.lora.gradient_watch import LAST_CHECKED_STEP, AdapterWatch
from dragkit.generator.to_host import AsyncToHost
from dragkit.joint import JointModel
from dragkit.trainer import loop
from dragkit.trainer.loop import Trainer
from dragkit.trainer.phase2 import JointPhase
from dragkit.trainer.transfer import DeviceCopier
from tests.nemotron_cases import adapted, toy_model
from tests.trainer import joint_cases as cases

META = torch.device("meta")
CASES = {
    "one pass": {},
    "passes": {"generator": {"max_tokens_per_microbatch": 150}},
    "residual slot": {"sampler": {"undrawn_facts_vector": True, "k_facts": 2}},
    "exact_k": {"sampler": {"mode": "exact_k", "estimator": "straight_through"}},
    "text alone": {"generator": {"structural_vectors": False}},
    "balanced": {
        "loss": {"use_grad_norm_balance": True},
        "run": {"log_grad_norms": True, "grad_norm_log_interval": 1},
    },
    "instructed": {"retriever": {"gate_relation_by_instruction": True, "dropout": 0.2}},
    "per_instruction": {"retriever": {"message": "per_instruction", "dropout": 0.2}},
    "computed again": {"generator": {"activation_checkpointing": "all"}},
}


class WouldWait(AssertionError):
    """Something that a GPU's host would wait for."""


class Watch(TorchDispatchMode):
    """Refuses what waits on a GPU although the meta device computes it."""

    def __torch_dispatch__(self, op: object, types: object, args: tuple = (), kwargs=None):
        out = op(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        name = op.overloadpacket.__name__
        if name in ("index_put", "index_put_", "index"):
            masks = [x for x in tree_leaves(args[1]) if x is not None and x.dtype == torch.bool]
            if masks:
                raise WouldWait(f"{op}: a mask as an index")
        if name == "multinomial":
            raise WouldWait(f"{op} looks at its weights")
        to_device = any(x.device.type == "cpu" for x in given) and any(x.is_meta for x in made)
        blocking = not (kwargs or {}).get("non_blocking", name == "copy_" and args[2:] == (True,))
        if name in ("_to_copy", "copy_") and to_device and blocking:
            raise WouldWait(f"{op}: a copy from the host that is waited for")
        return out


def made_on_the_host(make: Callable) -> Callable:
    """torch.tensor and as_tensor copy host numbers, and the host waits for the copy."""

    def checked(*args: object, **kwargs: object) -> Tensor:
        if torch.device(kwargs.get("device") or "cpu") == META:
            raise WouldWait(f"{make.__name__} of host numbers on a device")
        return make(*args, **kwargs)

    return checked


def trainer_of(phase: JointPhase, relations: object, folder: Path, device: torch.device) -> Trainer:
    """The loop around a phase, with data that it does not look at."""
    source = SimpleNamespace(
        relations=relations,
        batch_sampler=SimpleNamespace(batches=lambda epoch: [[0]] * 8),
        store=SimpleNamespace(fingerprint="none"),
    )
    return Trainer(phase.config, phase, source, None, folder, device)


def step_without_numbers(
    phase: JointPhase,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    watched: int = LAST_CHECKED_STEP,
) -> tuple[Trainer, int]:
    """One optimizer step on the meta device; (what did it, how often it waited).

    The lengths that the wait is for come from the same step on the CPU. The watch over adapters
    reads their gradients in its first two steps and at the last, so it is past them here.
    """
    relations = cases.relation_states()
    batches = [cases.make_batch(phase.model.generator) for _ in range(2)]
    known: list[list] = []
    read = AsyncToHost.result
    with monkeypatch.context() as patch:
        patch.setattr(AsyncToHost, "result", lambda copy: known.append(read(copy)) or known[-1])
        trainer_of(phase, relations, folder, torch.device("cpu")).train_step(batches)
    phase.model.to(META)
    phase.watch = AdapterWatch(phase.model.generator.model)
    phase.watch.step = watched
    waits = iter(known)
    with monkeypatch.context() as patch:
        # The fused form knows no meta tensors.
        patch.setattr(loop, "build_optimizer", lambda groups, device: torch.optim.AdamW(groups))
        trainer = trainer_of(phase, relations, folder, META)
        patch.setattr(AsyncToHost, "result", lambda copy: next(waits))
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, made_on_the_host(getattr(torch, name)))
        plain = torch.autocast
        patch.setattr(  # there is none on this device
            torch,
            "autocast",
            lambda kind, *a, **k: nullcontext() if kind == "meta" else plain(kind, *a, **k),
        )
        with Watch():
            outputs = trainer.train_step(batches)
    assert all(out.loss.is_meta and out.num_tokens for out in outputs)
    return trainer, len(known) - len(list(waits))


@pytest.mark.parametrize("settings", list(CASES.values()), ids=list(CASES))
def test_a_step_waits_once_for_each_micro_batch(settings, tmp_path, monkeypatch):
    trainer, waits = step_without_numbers(cases.make(**settings), tmp_path, monkeypatch)
    assert waits == 2 and trainer.state.step == 1


def with_generator(
    model: torch.nn.Module, targets: tuple[str, ...], **settings: dict
) -> JointPhase:
    """A phase around another language model than the bundled one, in bfloat16 as on a GPU."""
    plain = cases.make(**settings)
    model = adapted(targets, model=model.to(torch.bfloat16).requires_grad_(False))
    generator = Generator(model, plain.model.generator.tokenizer, pad_to_multiple_of=64)
    return JointPhase(plain.config, JointModel(plain.config, plain.model.retriever, generator))


def vocabulary() -> int:
    """Of the bundled tokeniser."""
    return len(cases.make().model.generator.tokenizer)


NAMES = ("q_proj", "in_proj", "up_proj", "down_proj", "experts.up_proj", "experts.down_proj")


@pytest.mark.parametrize("targets", [NAMES, NAMES[:4]], ids=["routed experts", "shared experts"])
def test_every_block_kind_of_the_30b(targets, tmp_path, monkeypatch):
    model = toy_model(vocab_size=vocabulary(), std=0.1)
    phase = with_generator(model, targets, generator={"max_tokens_per_microbatch": 150})
    _, waits = step_without_numbers(phase, tmp_path, monkeypatch)
    assert waits == 2


def test_another_language_model_waits_in_the_library_alone(tmp_path, monkeypatch):
    """transformers looks at the positions it has made itself, for sequences packed in a row."""
    config = LlamaConfig(
        vocab_size=vocabulary(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    phase = with_generator(LlamaForCausalLM(config), ("q_proj", "v_proj"))
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    _, waits = step_without_numbers(phase, tmp_path, monkeypatch)
    assert waits == 2


LOOKS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked write": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "repeats": lambda x: torch.repeat_interleave(x.long().flatten()),
    "unique": lambda x: x.unique(),
    "host number": lambda x: torch.tensor(1.0, device=x.device),
    "host tensor": lambda x: torch.ones(3).to(x.device),
    "host copy": lambda x: x.new_empty(3).copy_(torch.ones(3)),
}
PLACES = ("fact_sampler.draw", "residual", "layout", "gate", "generator.forward")


def look_in(phase: JointPhase, place: str, look: Callable[[Tensor], object]) -> None:
    """Lets a method of the model look at numbers of its device before it begins."""
    way, _, name = place.rpartition(".")
    owner = phase.model.get_submodule(way) if way != "fact_sampler" else phase.model.fact_sampler
    method = getattr(owner, name)

    def looking(*args: object, **kwargs: object) -> object:
        look(phase.model.cue.float())
        return method(*args, **kwargs)

    object.__setattr__(owner, name, looking)


@pytest.mark.parametrize(
    ("place", "look"),
    [("generator.embed", look) for look in LOOKS] + [(place, "item") for place in PLACES],
)
def test_any_look_at_the_device_is_seen(place, look, tmp_path, monkeypatch):
    phase = cases.make(sampler={"undrawn_facts_vector": True, "k_facts": 2})
    look_in(phase, place, LOOKS[look])
    with pytest.raises((WouldWait, RuntimeError, NotImplementedError)):
        step_without_numbers(phase, tmp_path, monkeypatch)


def test_the_watch_over_adapters_looks_in_its_first_steps(tmp_path, monkeypatch):
    with pytest.raises(NotImplementedError, match="no data"):
        step_without_numbers(cases.make(), tmp_path, monkeypatch, watched=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", list(CASES.values()), ids=list(CASES))
def test_nothing_waits_on_a_gpu(settings, tmp_path):
    """The third step under PyTorch's own watch, which lets the wait for an event pass.

    In the first two kernels are compiled, and adapters are looked at.
    """
    device = torch.device("cuda")
    sizes = {"hidden_size": 128, "head_dim": 32, "ssm_state_size": 64, "mamba_head_dim": 64}
    model = toy_model(vocab_size=vocabulary(), std=0.1, **sizes, chunk_size=128)
    phase = with_generator(model, NAMES, **settings)
    phase.model.to(device)
    phase.watch = AdapterWatch(phase.model.generator.model)
    trainer = trainer_of(phase, cases.relation_states(), tmp_path, device)
    copies = DeviceCopier(device)
    made = [copies.begin(cases.make_batch(phase.model.generator)) for _ in range(2)]
    batches = [copies.finish(copy) for copy in made]
    for step in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        try:
            outputs = trainer.train_step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(float(out.loss) > 0 for out in outputs)
