"""A probe at load: whether our use of a generator gives what the model itself gives."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from dragkit.errors import DragkitError, MissingInputError
from dragkit.generator.causal_lm import pad
from dragkit.generator.generator import Generator
from dragkit.generator.prompt import NeuralPrompt, PromptTemplate

logger = logging.getLogger(__name__)

# Relative errors of the logits, by the dtype of the weights. Two right forwards differ by about
# 1e-6 in float32. In half precision a router of experts may choose otherwise, too.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 0.25
# Types of weights that hold numbers, unlike packed or scaled ones.
_PLAIN_TYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
_SHORT_TOKENS, _LONG_TOKENS = 7, 13
_NEW_TOKENS = 2
_REMEDY = "Name another model with --generator_model."


def check_conformance(generator: Generator, name: str) -> None:
    """Compares our logits with the model's own on two prompts of unequal length.

    The shorter prompt goes through the model alone, as token ids. It goes through our code in a
    batch with the longer one, with a structural vector in it. A Nemotron-H costs these two
    forwards. Other models also decode two tokens of both prompts. A model whose answers depend on
    the batch is mended: it decodes one prompt at a time.

    Args:
        generator: the loaded generator. Adapters must be new, so that they change nothing.
        name: the generator's name, for messages.

    Raises:
        MissingInputError: a weight is not finite, the model cannot be run, or its logits are
            others. The message has the name, the family, and what differs.
    """
    was_training = generator.training
    generator.eval()
    try:
        with torch.no_grad():
            _Probe(generator, name).run()
    finally:
        generator.train(was_training)


class _Probe:
    """The two prompts of `check_conformance`, and the comparisons on them."""

    def __init__(self, generator: Generator, name: str) -> None:
        self.generator, self.causal_lm = generator, generator.causal_lm
        family = getattr(self.causal_lm.model.config, "model_type", "unknown")
        self.title = f"the generator {name} (family {family})"
        self.tolerance = TOLERANCE.get(generator.dtype, HALF_TOLERANCE)
        text = PromptTemplate()
        (ids,) = generator.tokenize([text.prefix("who?") + text.fact("a", "is", "b") + text.cue])
        self.long = (generator.bos_ids + ids)[:_LONG_TOKENS]
        # In another order, so that neither prompt can stand for the other.
        self.short = (generator.bos_ids + ids[::-1])[:_SHORT_TOKENS]

    def run(self) -> None:
        """Compares, mends, or raises."""
        self._require_finite_weights()
        both, answer, together = [self.long, self.short], self.short[:_NEW_TOKENS], None
        if not self.generator.is_packed:
            with self._refused("decoding stops"):
                together, answer = self._decoded(both)
        with self._refused("its forward stops"):
            own = self._own(answer)
        if not bool(own.isfinite().all()):
            raise MissingInputError(
                f"{self.title} cannot be used: all its weights are finite, but its logits hold NaN "
                f"or infinity in {self.generator.dtype}. {_REMEDY}"
            )
        # The forward over packs is our own code, whose errors are no fault of the model.
        with nullcontext() if self.generator.is_packed else self._refused("its forward stops"):
            ours = self._ours(both, answer)
        if (error := self._error(ours, own)) is not None:
            self._refuse(f"our logits differ from its own {self._where(own, answer)}", error)
        if together is None:
            return
        with self._refused("decoding stops"):
            alone, answer_alone = self._decoded([self.short])
        own_alone = own if answer_alone == answer else self._own(answer_alone)
        if (error := self._error(alone, own_alone)) is not None:
            self._refuse("decoding with its cache gives other logits than its forward", error)
        if (error := self._error(together, own)) is not None:
            self.causal_lm.decodes_alone = True
            logger.warning(
                "%s decodes one prompt at a time, which is slow: in a batch, its logits differ by "
                "%s",
                self.title,
                error,
            )

    def _require_finite_weights(self) -> None:
        """Raises where a weight holds NaN or infinity, also one that the probe does not use."""
        plain = (x for x in self.causal_lm.model.named_parameters() if x[1].dtype in _PLAIN_TYPES)
        bad = [
            name.replace(".base_layer.", ".")
            for name, weight in plain
            # The sum needs no memory. It overflows before all values are known to be finite.
            if not bool(weight.sum(dtype=torch.float32).isfinite())
            and not bool(weight.isfinite().all())
        ]
        if bad:
            more = f" (and {len(bad) - 1} more)" if bad[1:] else ""
            raise MissingInputError(
                f"{self.title} cannot be used: the weight {bad[0]}{more} holds NaN or infinity. "
                f"Download the model again. {_REMEDY}"
            )

    def _own(self, answer: list[int]) -> Tensor:
        """The model's own logits at the answer after the shorter prompt, float32 [A, V]."""
        ids = torch.tensor([self.short + answer], device=self.generator.device)
        logits = self.causal_lm.model(input_ids=ids, use_cache=False).logits[0]
        return logits[len(self.short) - 1 : -1].float()

    def _ours(self, prompts: list[list[int]], answer: list[int], *, slots: bool = True) -> Tensor:
        """Our logits at the answer after the last of the prompts, float32 [A, V]."""
        prompt = packed([(ids, answer) for ids in prompts], self.generator.device)
        vectors = self.generator.embed(prompt, None)[prompt.slot >= 0] if slots else None
        logits = torch.cat(list(self.generator.target_logits(prompt, vectors)))
        return logits[-len(answer) :].float()

    def _decoded(self, prompts: list[list[int]]) -> tuple[Tensor, list[int]]:
        """Logits of the last prompt's new tokens, float32 [A, V], and these tokens."""
        prompt = packed([(ids, []) for ids in prompts], self.generator.device)
        ids, embeds, mask = pad(self.generator.embed(prompt, None), prompt, left=True)
        output = self.causal_lm.generate(ids, embeds, mask, _NEW_TOKENS, output_logits=True)
        logits = torch.stack(output.logits, 1)[-1].float()
        return logits, output.sequences[-1, ids.shape[1] :].tolist()

    def _error(self, logits: Tensor, own: Tensor) -> str | None:
        """What differs, or None where the logits agree."""
        if logits.shape != own.shape:
            return f"shape {list(logits.shape)} instead of {list(own.shape)}"
        difference = relative_error(logits, own)
        # A NaN agrees with nothing.
        return None if difference <= self.tolerance else f"{difference:.2%}"

    def _where(self, own: Tensor, answer: list[int]) -> str:
        """Which part of our way to the logits changes them."""
        if self._error(self._ours([self.short], answer), own) is None:
            return "in a batch with a longer prompt (its tokens read what stands behind them)"
        if self._error(self._ours([self.short], answer, slots=False), own) is None:
            return "where a vector replaces the embedding of a token"
        return "for token ids, too"

    def _refuse(self, what: str, error: str) -> None:
        raise MissingInputError(f"{self.title} cannot be used: {what}: {error}. {_REMEDY}")

    @contextmanager
    def _refused(self, what: str) -> Iterator[None]:
        """Turns an error of the model's code into a refusal of the model."""
        try:
            yield
        except (DragkitError, MemoryError, torch.OutOfMemoryError):
            raise
        # The code of some two hundred families may raise anything.
        except Exception as error:
            raise MissingInputError(
                f"{self.title} cannot be used: {what}: {type(error).__name__}: "
                f"{str(error).rstrip('.')}. {_REMEDY}"
            ) from error


def relative_error(logits: Tensor, own: Tensor) -> float:
    """Norm of the difference of two sets of logits, float32 [A, V], over the norm of the second.

    What all logits of a token have in common changes no probability, so it does not count.
    """
    logits, own = (x - x.mean(-1, keepdim=True) for x in (logits, own))
    return float((logits - own).norm() / own.norm().clamp(min=1e-12))


def packed(prompts: Sequence[tuple[list[int], list[int]]], device: torch.device) -> NeuralPrompt:
    """Packs prompts, each of token ids and of target ids, with a slot in the middle of each."""
    ids, slot, position, question, ptr, rows, targets = [], [], [], [], [0], [], []
    for number, (prompt, target) in enumerate(prompts):
        whole = prompt + target
        rows += range(len(ids) + len(prompt) - 1, len(ids) + len(whole) - 1)
        slot += [number if i == len(prompt) // 2 else -1 for i in range(len(whole))]
        position += range(len(whole))
        question += [number] * len(whole)
        ids += whole
        targets += target
        ptr.append(len(ids))

    def tensor(values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return NeuralPrompt(
        input_ids=tensor(ids, torch.int32),
        slot=tensor(slot, torch.int32),
        position=tensor(position, torch.int32),
        question=tensor(question, torch.int64),
        ptr=tensor(ptr, torch.int32),
        target_row=tensor(rows, torch.int64),
        target_id=tensor(targets, torch.int64),
        longest=max(position) + 1,
    )
