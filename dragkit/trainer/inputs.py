"""Everything that a command reads is opened before its work, and its errors are raised together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

from dragkit.config import TrainConfig
from dragkit.data.cache import cache_root
from dragkit.data.lines import open_source
from dragkit.data.store import PackedStore
from dragkit.distributed.ranks import Ranks
from dragkit.errors import DataError, MissingInputError
from dragkit.generator.fingerprint import generator_fingerprints
from dragkit.generator.generator import Generator
from dragkit.retriever.text_encoder import TextEncoder, find_encoder
from dragkit.trainer.build import data_paths
from dragkit.trainer.question_dataset import QuestionDataset

Opened = TypeVar("Opened")


def open_all(openers: Iterable[Callable[[], Opened]]) -> list[Opened]:
    """Calls all openers and returns what they return.

    Raises:
        DataError, MissingInputError: of the kind of the first error, with the messages of all.
    """
    opened: list[Opened] = []
    errors: list[DataError | MissingInputError] = []
    for opener in openers:
        try:
            opened.append(opener())
        except (DataError, MissingInputError) as error:
            errors.append(error)
    if errors:
        # One file may have two roles, such as validation and test.
        text = "\n".join(dict.fromkeys(str(error) for error in errors))
        raise type(errors[0])(text) from errors[0]
    return opened


def check_readable(paths: Iterable[str | None]) -> None:
    """Opens and closes question files. None stands for a file that a run does without.

    Raises:
        DataError, MissingInputError: lists every file that cannot be read.
    """
    open_all([partial(_open_and_close, Path(path)) for path in paths if path is not None])


def _open_and_close(path: Path) -> None:
    open_source(path).close()


class RunInputs:
    """The question files, the sentence encoder and the generator of a training run.

    Args:
        config: the run's settings.
        ranks: ranks that train together.
        generator: folder of the generator. None in phase 1 and for random weights.

    Raises:
        DataError, MissingInputError: a file or the encoder is missing. All files are listed.

    Attributes:
        paths: the question files.
        encoder: the sentence encoder.
        fingerprints: of the content of all inputs that were opened, by key of `TrainState.extra`.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, generator: Path | None) -> None:
        self.config, self.ranks = config, ranks
        with ranks.main_process_first():
            self.paths = data_paths(config)
        check_readable((self.paths.train, self.paths.val, self.paths.test))
        self.encoder = TextEncoder(
            find_encoder(config.encoder.model), cache_root(config.data.cache_dir)
        )
        self.fingerprints = {"encoder": self.encoder.fingerprint}
        if generator is not None:
            self.fingerprints |= generator_fingerprints(generator)
        self._stores: dict[str, PackedStore] = {}

    def datasets(
        self, generator: Generator | None, train_size: int, size: int, *, test: bool = True
    ) -> tuple[QuestionDataset, QuestionDataset | None, QuestionDataset | None]:
        """Packs training, validation and, with `test`, test questions, in batches of these sizes.

        Raises:
            DataError: lists the unusable rows of all files.
        """
        paths = {"data": self.paths.train, "val": self.paths.val, "test": self.paths.test}
        given = {name: path for name, path in paths.items() if path and (test or name != "test")}
        openers = [
            partial(
                self.dataset,
                path,
                generator,
                train_size if name == "data" else size,
                training=name == "data",
            )
            for name, path in given.items()
        ]
        with self.ranks.main_process_first():
            opened = dict(zip(given, open_all(openers), strict=True))
        for name, dataset in opened.items():
            self.fingerprints[name] = dataset.store.fingerprint
            self.ranks.require_same({"the content of the questions": dataset.store.fingerprint})
        return opened["data"], opened.get("val"), opened.get("test")

    def dataset(
        self, path: str, generator: Generator | None, batch_size: int, *, training: bool = False
    ) -> QuestionDataset:
        """Packs one file. Phase 2 and the phase 1 that it trains first read the same files."""
        dataset = QuestionDataset(
            self._stores.get(path, path),
            self.config,
            self.encoder,
            generator,
            batch_size,
            training=training,
        )
        self._stores[path] = dataset.store
        return dataset
