"""The page of a self-test."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence

import torch

from dragkit import __version__
from dragkit.selftest.outcome import Outcome

_PROMISE = """\
A case holds where nothing was lost and every fault was noticed. Not covered: equal bits on another
GPU model or with another Triton, and an attacker who can write into the run's folder, since hashes
detect accidents and are no signatures."""


def page(tier: str, outcomes: Sequence[Outcome], *, skipped: Sequence[str], missing: int) -> str:
    """Formats the results as Markdown.

    Args:
        tier: "quick" or "full".
        outcomes: the checks so far, in their order.
        skipped: one line per check that this machine cannot run, with the reason.
        missing: number of checks that have not ended.
    """
    lost = sum(len(outcome.losses) for outcome in outcomes)
    verdict = f"{lost} losses" if lost else "no losses"
    if missing:
        verdict += f" so far, {missing} checks have not ended"
    cores = os.cpu_count()
    lines = [
        "# Self-test",
        "",
        f"`python -m dragkit.selftest --tier {tier}`: **{verdict}**. {time.strftime('%Y-%m-%d')}, "
        f"dragkit {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, {cores} cores.",
        "",
        "| check | held / tried | lost | seconds |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {x.name} | {x.held} / {x.tried} | {len(x.losses)} | {x.seconds:.0f} |"
            for x in outcomes
        ),
        "",
        _PROMISE,
    ]
    if notes := [f"- {x.name}: {note}" for x in outcomes for note in x.notes]:
        lines += ["", "## Details", "", *notes]
    if skipped:
        lines += ["", "## Skipped", "", *(f"- {line}" for line in skipped)]
    if lost:
        losses = [f"{x.name}: {loss}" for x in outcomes for loss in x.losses]
        # A message may hold line ends and anything that Markdown would format.
        lines += ["", "## Losses", "", "```", *(" ".join(x.split()) for x in losses), "```"]
    return "\n".join(lines) + "\n"
