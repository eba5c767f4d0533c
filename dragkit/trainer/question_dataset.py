"""One file of questions ready for training: packed store, token states, token rows, batches."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from dragkit.config import TrainConfig
from dragkit.console import STOP_SIGNALS
from dragkit.data.batching import FactBudgetBatchSampler
from dragkit.data.cache import cache_root
from dragkit.data.collate import PackedCollator
from dragkit.data.handicap import noisy_labels, random_questions
from dragkit.data.packed import QuestionBatch
from dragkit.data.padding import with_padding
from dragkit.data.relations import RelationVocab
from dragkit.data.store import PackedStore
from dragkit.data.tokens import TokenRows
from dragkit.errors import DataError
from dragkit.generator.generator import Generator
from dragkit.generator.prompt import PromptTemplate
from dragkit.memory_plan.choice import MAX_DECODE_BATCH, local_card, make_plan
from dragkit.memory_plan.dims import generator_dims
from dragkit.retriever.text_encoder import RelationStates, TextEncoder
from dragkit.trainer.compile import compile_enabled
from dragkit.trainer.remarks import (
    log_unread_texts,
    log_untaught_answers,
    require_answers,
    require_positive_facts,
)
from dragkit.trainer.transfer import DeviceCopier, prefetch

logger = logging.getLogger(__name__)

_CPU_BATCH_SIZE = 128


def evaluation_batch_size(
    config: TrainConfig, generator: Generator | None, device: torch.device, ranks: int = 1
) -> int:
    """Number of questions in an evaluation batch. On a GPU the memory plan decides.

    Without a generator (phase 1) there is no plan. Sharding over `ranks` leaves more memory.
    """
    # A decoding step costs a CPU about the same for 32 prompts as for 128.
    if device.type == "cpu":
        return _CPU_BATCH_SIZE
    shape = None
    if generator is not None:
        shape = generator_dims(config.generator, name=config.generator_model)
    if shape is None:
        return MAX_DECODE_BATCH
    return make_plan(config, shape, local_card(device), ranks).decode_batch


class QuestionDataset:
    """One heuristics file, packed and encoded once.

    Args:
        source: the JSONL file, or its store if it was packed before. Then the log has its lines.
        config, encoder: those of the run.
        generator: its tokeniser makes the prompt rows. It is None in phase 1.
        batch_size: maximum number of questions in a batch.
        training: whether `data.train_fraction`, `data.label_fraction` and `data.label_noise` apply.

    Raises:
        DataError: lines cannot be used, a question and its answers exceed the prompt length, or
            no training question has a positive fact (phase 1) or an answer (phase 2).
    """

    def __init__(
        self,
        source: str | Path | PackedStore,
        config: TrainConfig,
        encoder: TextEncoder,
        generator: Generator | None,
        batch_size: int,
        *,
        training: bool = False,
    ) -> None:
        cache = cache_root(config.data.cache_dir)
        self._told = isinstance(source, PackedStore)
        if not isinstance(source, PackedStore):
            source = PackedStore.build_or_open(
                source,
                cache_dir=cache,
                label_rule=config.data.label_rule,
                max_bad_fraction=config.data.max_bad_fraction,
                merge=config.data.merge_equal_nodes,
            )
        self.store, self.path = source, source.path
        relation_states = encoder.token_states(RelationVocab(self.store.relation_names).texts())
        self.relations: RelationStates = relation_states.relations()
        states = encoder.token_states(self.store.question_texts)
        if not self._told:
            log_unread_texts(self.store, states, relation_states)
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
            self._check_prompt_lengths(self.tokens, config, generator, training=training)
        labels, rows = self._handicaps(config) if training else (None, None)
        if training and generator is None:
            require_positive_facts(self.store, labels, rows)
        elif training:
            require_answers(self.store, rows)
            log_untaught_answers(self.store, rows, config.generator.max_answers)
        self.collator = PackedCollator(
            self.store, states, self.relations.ptr, self.tokens, labels=labels
        )
        self.batch_sampler = FactBudgetBatchSampler(
            self.store.fact_counts,
            batch_size=batch_size,
            max_facts=config.data.max_facts_per_batch,
            seed=config.run.seed,
            rows=rows,
        )
        self.config, self.num_workers = config, config.data.num_workers

    def __len__(self) -> int:
        return len(self.batch_sampler.rows)

    def _handicaps(self, config: TrainConfig) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Labels, uint8 [E], and the questions to use, int64 rows. None is the store's own."""
        labels = rows = None
        if probability := config.data.label_noise:
            labels = noisy_labels(self.store, probability, config.run.seed)
            moved, positive = (
                int(x.sum()) for x in (labels < self.store.labels, self.store.labels)
            )
            self._tell(
                "%s: data.label_noise=%g moved %d of %d positive labels (%.1f %%) to other facts",
                self.path,
                probability,
                moved,
                positive,
                100 * moved / max(positive, 1),
            )
        if config.data.label_fraction < 1:
            labelled = random_questions(self.store, config.data.label_fraction, config.run.seed)
            is_labelled = np.isin(np.arange(len(self.store)), labelled)
            given = self.store.labels if labels is None else labels
            labels = given * np.repeat(is_labelled, self.store.fact_counts)
            self._tell(
                "%s: data.label_fraction=%g keeps %d of %d positive labels, in %d of %d questions",
                self.path,
                config.data.label_fraction,
                int(labels.sum()),
                int(self.store.labels.sum()),
                len(labelled),
                len(self.store),
            )
        if config.data.train_fraction < 1:
            rows = random_questions(self.store, config.data.train_fraction, config.run.seed)
            self._tell(
                "%s: data.train_fraction=%g uses %d of %d questions",
                self.path,
                config.data.train_fraction,
                len(rows),
                len(self.store),
            )
        return labels, rows

    def _tell(self, message: str, *values: object) -> None:
        """Logs a line, unless the earlier data set of this store has."""
        if not self._told:
            logger.info(message, *values)

    def _check_prompt_lengths(
        self, tokens: TokenRows, config: TrainConfig, generator: Generator, *, training: bool
    ) -> None:
        """Raises where a question and its answers exceed the prompt length even without facts.

        Warns of facts that exceed it alone.
        """
        settings, limit = config.generator, config.generator.max_prompt_tokens
        free = limit - len(generator.tokenize([PromptTemplate().cue])[0])
        fixed = tokens.prefix_lengths + tokens.target_lengths
        longest = int(fixed.max())
        over = [int(row) for row in (fixed >= free).nonzero()[0]]
        if over:
            ids = ", ".join(self.store.question_id(row) for row in over[:3])
            raise DataError(
                f"{self.path}: {len(over)} questions and their answers alone exceed "
                f"generator.max_prompt_tokens = {limit} (the longest: {longest} tokens): {ids}. "
                f"Raise it with --set generator.max_prompt_tokens={longest + 256}, teach fewer "
                "answers with --set generator.max_answers=N, or remove these questions."
            )
        answer = tokens.target_lengths if training else settings.max_new_tokens
        room = free - int(settings.structural_vectors) - tokens.prefix_lengths - answer
        num_facts, rows = tokens.facts_over(room) if settings.fact_text else (0, [])
        if num_facts:
            logger.warning(
                "%s: %d facts in %d questions, such as %s, are longer than the prompt and are "
                "always left out. Raise generator.max_prompt_tokens = %d to keep them",
                self.path,
                num_facts,
                len(rows),
                self.store.question_id(int(rows[0])),
                limit,
            )

    def load(
        self,
        batches: Sequence[Sequence[int]],
        device: torch.device | None = None,
        *,
        to_device: bool = True,
    ) -> Iterator[QuestionBatch]:
        """Collates batches, in worker processes if `data.num_workers` is set.

        Args:
            batches: rows of each batch.
            device: where they are used. For a GPU, a thread collates them ahead of their use.
                None is a CPU.
            to_device: whether the thread also copies them to the GPU. Otherwise, and for a CPU,
                they are in host memory. Batches that a compiled retriever reads have `padded`.
        """
        device = device or torch.device("cpu")
        loader = DataLoader(
            range(len(self.store)),  # type: ignore[arg-type]
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=self.collator,
            num_workers=self.num_workers,
            worker_init_fn=_ignore_signals,
        )
        iterator = None
        try:
            with _delayed_signals() if self.num_workers else nullcontext():
                iterator = iter(loader)
            collated: Iterator[QuestionBatch] = iterator
            # A replayed step pads host batches itself.
            if to_device and self.store.num_relations and compile_enabled(self.config, device):
                collated = map(with_padding, iterator)
            if device.type != "cuda":
                yield from collated
            elif to_device:
                copier = DeviceCopier(device)
                with closing(prefetch(collated, copier.start)) as copies:
                    yield from map(copier.finish, copies)
            else:
                with closing(prefetch(collated, lambda batch: batch)) as host_batches:
                    yield from host_batches
        finally:
            # An error's traceback keeps the iterator alive, and the workers with it. They ignore
            # signals, so the process would wait for them at its exit.
            if self.num_workers and iterator is not None:
                with _delayed_signals():
                    iterator._shutdown_workers()


@contextmanager
def _delayed_signals() -> Iterator[None]:
    """Delays stop signals to the end of the block, also in processes that start in it.

    An error in the midst of starting or ending the workers would leave some that nobody ends.
    """
    came: list[int] = []
    # Python sets handlers in the main thread alone. Where one is ignored, it stays so.
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS if is_main}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: came.append(number))
    # A process that is not a copy of this one has no handler yet.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            # None: no Python code has set it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in came:
            signal.raise_signal(number)


def _ignore_signals(worker: int) -> None:
    """Ignores stop signals in a worker: the main process saves first and then ends it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
