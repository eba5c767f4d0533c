"""The results of a run: test metrics after each stage, and the newest stage's predictions."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from dragkit.checkpoint.atomic import write_text_atomically
from dragkit.distributed.ranks import Ranks
from dragkit.errors import WriteError
from dragkit.eval.evaluate import evaluate
from dragkit.eval.types import Predictor
from dragkit.trainer.question_dataset import QuestionDataset

logger = logging.getLogger(__name__)

HEADLINE = ("strict-hits@1", "strict-f1", "rog-hit", "retrieval-recall", "answer-recall@10")


class ResultsTable:
    """Test metrics by stage, printed at the end of a run and kept in results.json.

    test_predictions.jsonl has the newest stage's prediction and scores of every question, in the
    order of the test file. Without test questions there are no rows.

    Args:
        run_dir: folder of the files.
        test: the test questions.
        device: device of the model.
        ranks: ranks that share the questions.
        keep: keep the rows of results.json, as a resumed run does.
    """

    def __init__(
        self,
        run_dir: Path,
        test: QuestionDataset | None,
        device: torch.device,
        ranks: Ranks,
        *,
        keep: bool,
    ) -> None:
        self.path = run_dir / "results.json"
        self.test, self.device, self.ranks = test, device, ranks
        self.rows: dict[str, dict] = {}
        self.unwritten: OSError | None = None
        if keep and self.path.is_file():
            self.rows = json.loads(self.path.read_text(encoding="utf-8"))

    def evaluate(self, stage: str, phase: Predictor) -> None:
        """Evaluates on the test questions and writes the row `stage`."""
        if self.test is None:
            return
        logger.info("evaluating %s on %s", stage, self.test.path.name)
        result = evaluate(phase, self.test, self.device, ranks=self.ranks)
        self.rows[stage] = result.report.to_dict()
        if not self.ranks.is_main:
            return
        try:
            # The table comes last: a row in it says that the predictions are those of its stage.
            lines = (json.dumps(prediction) + "\n" for prediction in result.predictions)
            write_text_atomically(self.path.with_name("test_predictions.jsonl"), "".join(lines))
            write_text_atomically(self.path, json.dumps(self.rows, indent=1) + "\n")
            self.unwritten = None
        except OSError as error:
            # Training must not end for a table. The next stage writes all rows.
            self.unwritten = error
            logger.warning("%s: cannot be written (%s). The run continues", self.path, error)

    def require_written(self) -> None:
        """Raises a WriteError if the last stage could not be written. It shows the table."""
        if self.unwritten is not None:
            raise WriteError(
                f"{self.path}: cannot be written ({self.unwritten}). The checkpoints are saved. "
                "Free some space, and resume the run to evaluate again.\n" + self.format()
            ) from self.unwritten

    def format(self) -> str:
        """The table as text: a row per stage, headline metrics in percent."""
        if not self.rows:
            return ""
        asked = next(iter(self.rows.values()))["counts"]["asked"]
        title = f"test, {asked} questions"
        names = [n for n in HEADLINE if any(n in row["metrics"] for row in self.rows.values())]
        width = max(map(len, (title, *self.rows)))
        lines = [f"{title:<{width}}  " + "  ".join(names)]
        for stage, row in self.rows.items():
            cells = [
                f"{100 * row['metrics'][n]['mean']:.1f}" if n in row["metrics"] else "-"
                for n in names
            ]
            padded = (cell.rjust(len(n)) for cell, n in zip(cells, names, strict=True))
            lines.append(f"{stage:<{width}}  " + "  ".join(padded))
        return "\n".join(lines)
