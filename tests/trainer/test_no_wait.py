"""The host waits for the device once per joint micro-batch.

Whole optimizer steps run on the meta device, whose tensors have sizes but no values. An op that
makes the host wait on a GPU raises there: item, tolist, nonzero, sizes that depend on data. A
dispatch mode catches those that the meta device accepts, such as masks as indices.
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
    "one micro-batch": {},
    "micro-batches": {"generator": {"max_tokens_per_microbatch": 150}},
    "leave one out": {"sampler": {"estimator": "leave_one_out", "num_draws": 3}},
    "soft gates": {"sampler": {"estimator": "soft_gates"}},
    "exact k": {"sampler": {"mode": "exact_k", "estimator": "straight_through"}},
    "text alone": {"generator": {"structural_vectors": False}},
    "balanced": {
        "loss": {"use_grad_norm_balance": True},
        "run": {"log_grad_norms": True, "grad_norm_log_interval": 1},
    },
    "relation gate": {"retriever": {"gate_relation_by_instruction": True, "dropout": 0.2}},
    "per instruction": {"retriever": {"message": "per_instruction", "dropout": 0.2}},
    "recompute": {"generator": {"activation_checkpointing": "all"}},
}


class WouldWait(AssertionError):
    """On a GPU the host would wait here."""


class NoWait(TorchDispatchMode):
    """Raises for ops that wait on a GPU although the meta device accepts them."""

    def __torch_dispatch__(self, op: object, types: object, args: tuple = (), kwargs=None):
        out = op(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        name = op.overloadpacket.__name__
        if name in ("index_put", "index_put_", "index"):
            masks = [x for x in tree_leaves(args[1]) if x is not None and x.dtype == torch.bool]
            if masks:
                raise WouldWait(f"{op}: a mask as an index")
        if name == "multinomial":
            raise WouldWait(f"{op}: a check of its weights")
        to_device = any(x.device.type == "cpu" for x in inputs) and any(x.is_meta for x in outputs)
        blocking = not (kwargs or {}).get("non_blocking", name == "copy_" and args[2:] == (True,))
        if name in ("_to_copy", "copy_") and to_device and blocking:
            raise WouldWait(f"{op}: a blocking copy from the host")
        return out


class PlainAdamW(torch.optim.AdamW):
    """AdamW that updates always. The fused one, which can skip, has no meta implementation."""

    found_inf = property(lambda self: None, lambda self, skip: None)


def host_only(make: Callable) -> Callable:
    """torch.tensor or as_tensor, raising on a device: their copy of host numbers blocks."""

    def checked(*args: object, **kwargs: object) -> Tensor:
        if torch.device(kwargs.get("device") or "cpu") == META:
            raise WouldWait(f"{make.__name__} of host numbers on a device")
        return make(*args, **kwargs)

    return checked


def trainer_of(phase: JointPhase, relations: object, folder: Path, device: torch.device) -> Trainer:
    """The loop around a phase, with a data set that is never loaded."""
    dataset = SimpleNamespace(
        relations=relations,
        batch_sampler=SimpleNamespace(batches=lambda epoch: [[0]] * 8),
        store=SimpleNamespace(fingerprint="none"),
    )
    return Trainer(phase.config, phase, dataset, None, folder, device)


def meta_step(
    phase: JointPhase,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    watched: int = LAST_CHECKED_STEP,
) -> tuple[Trainer, int]:
    """Runs one optimizer step on the meta device and returns the trainer and the number of waits.

    The prompt lengths come from the same step on the CPU. `watched` are the steps that the adapter
    watch has behind it. By default it is past its last one.
    """
    relations = cases.relation_states()
    batches = [cases.make_batch(phase.model.generator) for _ in range(2)]
    cpu_lengths: list[list] = []
    result = AsyncToHost.result
    with monkeypatch.context() as patch:

        def recorded(copy: AsyncToHost) -> list:
            cpu_lengths.append(result(copy))
            return cpu_lengths[-1]

        patch.setattr(AsyncToHost, "result", recorded)
        trainer_of(phase, relations, folder, torch.device("cpu")).train_step(batches)
    phase.model.to(META)
    phase.watch = AdapterWatch(phase.model.generator.model)
    phase.watch.step = watched
    remaining = iter(cpu_lengths)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "build_optimizer", lambda groups, device: PlainAdamW(groups))
        trainer = trainer_of(phase, relations, folder, META)
        patch.setattr(AsyncToHost, "result", lambda copy: next(remaining))
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, host_only(getattr(torch, name)))
        autocast = torch.autocast
        patch.setattr(  # the meta device has no autocast
            torch,
            "autocast",
            lambda kind, *a, **k: nullcontext() if kind == "meta" else autocast(kind, *a, **k),
        )
        with NoWait():
            outputs = trainer.train_step(batches)
    assert all(out.loss.is_meta and out.num_tokens for out in outputs)
    return trainer, len(cpu_lengths) - len(list(remaining))


@pytest.mark.parametrize("settings", list(CASES.values()), ids=list(CASES))
def test_a_step_waits_once_for_each_micro_batch(settings, tmp_path, monkeypatch):
    trainer, waits = meta_step(cases.make(**settings), tmp_path, monkeypatch)
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
    """Number of tokens of the bundled tokeniser."""
    return len(cases.make().model.generator.tokenizer)


NAMES = ("q_proj", "in_proj", "up_proj", "down_proj", "experts.up_proj", "experts.down_proj")


@pytest.mark.parametrize("targets", [NAMES, NAMES[:4]], ids=["routed experts", "shared experts"])
def test_every_block_type_of_the_30b_waits_once(targets, tmp_path, monkeypatch):
    model = toy_model(vocab_size=vocabulary(), std=0.1)
    phase = with_generator(model, targets, generator={"max_tokens_per_microbatch": 150})
    _, waits = meta_step(phase, tmp_path, monkeypatch)
    assert waits == 2


def test_another_language_model_waits_in_transformers_alone(tmp_path, monkeypatch):
    """transformers reads position ids to find packed sequences. The patch removes that read."""
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
    _, waits = meta_step(phase, tmp_path, monkeypatch)
    assert waits == 2


READS = {
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
METHODS = (*("fact_sampler.draw", "layout", "apply_gate", "generator.forward"),)


def read_in(phase: JointPhase, path: str, read: Callable[[Tensor], object]) -> None:
    """Makes a method of the model read values from its device before it runs."""
    parent, _, name = path.rpartition(".")
    owner = phase.model.fact_sampler if parent == "fact_sampler" else None
    owner = owner or phase.model.get_submodule(parent)
    method = getattr(owner, name)

    def reading(*args: object, **kwargs: object) -> object:
        read(phase.model.cue.float())
        return method(*args, **kwargs)

    object.__setattr__(owner, name, reading)


@pytest.mark.parametrize(
    ("method", "read"),
    [("generator.embed", read) for read in READS] + [(method, "item") for method in METHODS],
)
def test_every_read_from_the_device_is_caught(method, read, tmp_path, monkeypatch):
    phase = cases.make(sampler={"num_draws": 2})
    read_in(phase, method, READS[read])
    with pytest.raises((WouldWait, RuntimeError, NotImplementedError)):
        meta_step(phase, tmp_path, monkeypatch)


def test_the_adapter_watch_reads_gradients_in_its_first_steps(tmp_path, monkeypatch):
    with pytest.raises(NotImplementedError, match="no data"):
        meta_step(cases.make(), tmp_path, monkeypatch, watched=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", list(CASES.values()), ids=list(CASES))
def test_nothing_waits_on_a_gpu(settings, tmp_path):
    """Runs the third step under torch's sync debug mode, which permits waiting for an event.

    The first two steps compile kernels, and the adapter watch reads gradients.
    """
    device = torch.device("cuda")
    sizes = {"hidden_size": 128, "head_dim": 32, "ssm_state_size": 64, "mamba_head_dim": 64}
    model = toy_model(vocab_size=vocabulary(), std=0.1, **sizes, chunk_size=128)
    phase = with_generator(model, NAMES, **settings)
    phase.model.to(device)
    phase.watch = AdapterWatch(phase.model.generator.model)
    trainer = trainer_of(phase, cases.relation_states(), tmp_path, device)
    copier = DeviceCopier(device)
    copies = [copier.start(cases.make_batch(phase.model.generator)) for _ in range(2)]
    batches = [copier.finish(copy) for copy in copies]
    for step in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        try:
            outputs = trainer.train_step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(float(out.loss) > 0 for out in outputs)
