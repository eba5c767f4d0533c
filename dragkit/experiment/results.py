"""The finished runs of an experiment, gathered by data set and arm."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dragkit.errors import ConfigError, DataError
from dragkit.experiment.execute import SCORES, read_record
from dragkit.experiment.plan import Experiment
from dragkit.experiment.scores import (
    Difference,
    Mean,
    RunScores,
    mean_over_seeds,
    paired_difference,
    read_scores,
    stack,
)


@dataclass
class Row:
    """The finished runs of an arm, or of a phase 1, on one data set.

    Attributes:
        label: as printed.
        runs: scores by seed.
        seconds: wall time by seed.
        means: by metric. A metric that is defined nowhere is missing.
        differences: to the baseline, by metric, over the seeds that both have.
    """

    label: str
    runs: dict[int, RunScores] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    means: dict[str, Mean] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)


@dataclass
class SetResults:
    """The results on one data set.

    Attributes:
        name: of the set.
        rows: by name of the runs' folder.
        ids: of the test questions.
        fingerprints: SHA-256 of the question files by key.
        commits: of the code of the runs.
    """

    name: str
    rows: dict[str, Row] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    fingerprints: dict[str, str] = field(default_factory=dict)
    commits: set[str] = field(default_factory=set)


def gather(experiment: Experiment, root: Path) -> list[SetResults]:
    """Reads and compares the finished runs. Unfinished ones are missing.

    Raises:
        ConfigError: no run has a metric of the experiment.
        DataError: the runs of a set were tested on different questions.
    """
    results = {name: SetResults(name) for name in experiment.file.data}
    for run in experiment.runs:
        result = results[run.data]
        # phase1, or phase1-NAME for the arm with settings of its own.
        label = run.arm or run.folder.name.replace("phase1", "phase 1").replace("-", " of ", 1)
        row = result.rows.setdefault(run.folder.name, Row(label))
        record = read_record(run, root)
        if record is not None and record["finished"]:
            scores = read_scores(root / run.folder / SCORES)
            result.ids = result.ids or scores.ids
            if scores.ids != result.ids:
                raise DataError(
                    f"{root / run.folder}: its test questions are not those of the other runs on "
                    f"{run.data}, so they cannot be compared. Remove the runs with other questions."
                )
            row.runs[run.seed] = scores
            row.seconds[run.seed] = record["seconds"]
            result.fingerprints = record["fingerprints"]
            result.commits.add(record["commit"])
    known = {
        name
        for result in results.values()
        for row in result.rows.values()
        for scores in row.runs.values()
        for name in scores.values
    }
    unknown = [name for name in experiment.file.metrics if name not in known]
    if known and unknown:
        raise ConfigError(
            f"metrics: no run has {', '.join(unknown)}. There are {', '.join(sorted(known))}."
        )
    for result in results.values():
        for metric in experiment.file.metrics:
            _compare(result, metric, f"arm-{experiment.file.baseline}")
    return list(results.values())


def _compare(result: SetResults, metric: str, baseline: str) -> None:
    """Fills in the means and differences of a metric."""
    base = result.rows.get(baseline)
    for row in result.rows.values():
        mean = mean_over_seeds(stack(list(row.runs.values()), metric)) if row.runs else None
        if mean is not None:
            row.means[metric] = mean
        seeds = [seed for seed in row.runs if base is not None and seed in base.runs]
        if base is None or base is row or not seeds:
            continue
        ours, theirs = (stack([r.runs[s] for s in seeds], metric) for r in (row, base))
        difference = paired_difference(ours, theirs)
        if difference is not None:
            row.differences[metric] = difference
