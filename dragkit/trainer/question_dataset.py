"""A data set ready for training: packed store, token states, token rows, and its batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from dragkit.config import TrainConfig
from dragkit.data.batching import FactBudgetBatchSampler
from dragkit.data.cache import cache_root
from dragkit.data.collate import PackedCollator
from dragkit.data.packed import QuestionBatch
from dragkit.data.relations import RelationVocab
from dragkit.data.store import PackedStore
from dragkit.data.tokens import TokenRows
from dragkit.errors import DataError
from dragkit.generator.generator import Generator
from dragkit.generator.prompt import PromptTemplate
from dragkit.memory_plan.choice import MAX_DECODE_BATCH, local_card, make_plan
from dragkit.memory_plan.dims import generator_dims
from dragkit.retriever.text_encoder import RelationStates, TextEncoder
from dragkit.trainer.transfer import DeviceCopier, prefetch

_ON_CPU = 128


def evaluation_batch_size(
    config: TrainConfig, generator: Generator | None, device: torch.device, ranks: int = 1
) -> int:
    """Questions evaluated at once, on a GPU what fits by the plan where the generator has one.

    A decoding step costs a CPU about the same for 32 prompts as for 128. Of several ranks that cut
    the weights between them, each has room for more.
    """
    if device.type == "cpu":
        return _ON_CPU
    shape = None
    if generator is not None:
        shape = generator_dims(config.generator, name=config.generator_model)
    if shape is None:
        return MAX_DECODE_BATCH
    return make_plan(config, shape, local_card(device), ranks).decode_batch


class QuestionDataset:
    """One heuristics file, packed and encoded once, as batches.

    Args:
        path: the JSONL file; config: of the run; encoder: the frozen sentence encoder.
        generator: whose tokeniser makes the prompt rows; None in phase 1.
        batch_size: most questions in a batch.

    Attributes:
        to_device: whether `load` copies batches to the GPU they are for.
    """

    def __init__(
        self,
        path: str | Path,
        config: TrainConfig,
        encoder: TextEncoder,
        generator: Generator | None,
        batch_size: int,
    ) -> None:
        cache = cache_root(config.data.cache_dir)
        self.path = Path(path)
        self.store = PackedStore.build_or_open(
            path,
            cache_dir=cache,
            label_rule=config.data.label_rule,
            max_bad_fraction=config.data.max_bad_fraction,
            merge=config.data.merge_equal_nodes,
        )
        vocab = RelationVocab(self.store.relation_names)
        self.relations: RelationStates = encoder.relation_states(
            len(vocab), lambda row, inverse: vocab.inverse_text(row) if inverse else vocab.text(row)
        )
        states = encoder.token_states(self.store.question_texts)
        self.tokens: TokenRows | None = None
        if generator is not None:
            self.tokens = TokenRows.build_or_open(
                self.store,
                generator.tokenize,
                PromptTemplate(),
                key=generator.tokenizer_fingerprint(),
                cache_dir=cache,
                bos_ids=generator.bos_ids,
                eos_ids=[generator.eos_token_id],
                max_answers=config.generator.max_answers,
            )
            self._check_lengths(config, generator)
        self.collator = PackedCollator(self.store, states, self.relations.mask, self.tokens)
        self.batch_sampler = FactBudgetBatchSampler(
            self.store.fact_counts,
            batch_size=batch_size,
            max_facts=config.data.max_facts_per_batch,
            seed=config.run.seed,
        )
        self.num_workers = config.data.num_workers
        self.to_device = True

    def __len__(self) -> int:
        return len(self.store)

    def _check_lengths(self, config: TrainConfig, generator: Generator) -> None:
        """Every prompt must hold its question and whole answer, whatever becomes of its facts."""
        fixed = self.tokens.prefix_lengths + self.tokens.target_lengths  # type: ignore[union-attr]
        limit = config.generator.max_prompt_tokens
        room = limit - len(generator.tokenize([PromptTemplate().cue])[0]) - 1
        longest = int(fixed.max())
        over = [int(row) for row in (fixed > room).nonzero()[0]]
        if over:
            some = ", ".join(self.store.question(row).id for row in over[:3])
            raise DataError(
                f"{self.path}: {len(over)} questions and their answers alone exceed "
                f"generator.max_prompt_tokens = {limit} (the longest: {longest} tokens): {some}. "
                f"Raise it with --set generator.max_prompt_tokens={longest + 256}, teach fewer "
                "answers with --set generator.max_answers=N, or take these questions out."
            )

    def load(
        self, batches: Sequence[Sequence[int]], device: torch.device | None = None
    ) -> Iterator[QuestionBatch]:
        """Collated batches, by worker processes when so configured.

        Args:
            batches: rows of each.
            device: where they are used. For a GPU a thread makes them ahead and, unless `to_device`
                is off, copies them there; otherwise they are in host memory.
        """
        loader = DataLoader(
            range(len(self.store)),  # type: ignore[arg-type]
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=self.collator,
            num_workers=self.num_workers,
            worker_init_fn=_ignore_signals,
        )
        made = iter(loader)
        try:
            if device is None or device.type != "cuda":
                yield from made
            elif self.to_device:
                copies = DeviceCopier(device)
                with closing(prefetch(made, copies.begin)) as staged:
                    yield from map(copies.finish, staged)
            else:
                with closing(prefetch(made, lambda batch: batch)) as staged:
                    yield from staged
        finally:
            if self.num_workers:
                # After an error its traceback keeps the iterator, which would leave ending the
                # workers to the exit of the process: they ignore its signal, and it waits for them.
                made._shutdown_workers()


def _ignore_signals(worker: int) -> None:
    """Workers outlive a stop signal: the main process saves first and ends them itself."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
