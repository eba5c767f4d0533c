"""Makes docs/estimators.md: gradient estimators of the draw against the exact gradient.

    python scripts/estimators.py [--sets demo webqsp ...] [--questions 12] [--facts 8]

For a few facts of a question, every subset gets its prompt, so that the gradient of the expected
answer loss at the fact logits is exact. Two commands of `python -m dragkit.train` make the models
of each set, at the start, after the first epoch and at the end of phase 2. Interrupted runs go on,
and finished ones are not repeated. Published sets are read from DRAGKIT_DATA.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from gradient_estimators import (
    Estimates,
    all_estimates,
    exact_gradient,
    exact_marginal_gradient,
    subset_probability,
)
from subset_tables import QuestionPrompts, SubsetTables, make_tables
from torch import Tensor

from dragkit.checkpoint.checkpoint import load_checkpoint
from dragkit.config import read_saved_config
from dragkit.data.cache import cache_root
from dragkit.joint import JointModel
from dragkit.retriever.text_encoder import TextEncoder, find_encoder
from dragkit.trainer.build import build_joint, data_paths, setup_process
from dragkit.trainer.question_dataset import QuestionDataset
from dragkit.trainer.resume import resolve_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SETS = ("demo", "worldcup", "webqsp", "cwq")
STATES = ("start", "middle", "end")
REPETITIONS = 8192
# Random draws that need a prompt each.
PROMPT_DRAWS = 64
TEMPERATURES = (0.5, 1.0)
# Families of the plot, with colours that colour-blind readers tell apart.
COLOURS = {
    "vector gate": "#999999",
    "log-gate": "#56b4e9",
    "mean field": "#000000",
    "soft gates T=0.5": "#d55e00",
    "soft gates T=1": "#e69f00",
    "leave-one-out": "#0072b2",
    "DisARM": "#cc79a7",
    "marginal": "#f0e442",
    "leave-one-out and mean field": "#009e73",
}


def command(name: str, phase: int, folder: str, data: str) -> list[str]:
    """The arguments of `python -m dragkit.train` for one phase on a set."""
    parts = ["--phase", str(phase), "--preset", "tiny", "--seed", "0"]
    parts += ["--checkpoint_dir", f"{folder}/phase{phase}", "--set", "run.num_threads=1"]
    if phase == 2:
        parts += ["--phase1_checkpoint", f"{folder}/phase1", "--generator_model", "tiny"]
    if name != "demo":
        parts += ["--heuristics_path", f"{data}/{name}.train.jsonl.gz"]
        parts += ["--val_heuristics_path", f"{data}/{name}.dev.jsonl.gz"]
    return parts


def train(name: str, folder: Path) -> None:
    """Trains both phases on a set. What is finished is not repeated."""
    data = os.environ.get("DRAGKIT_DATA", "")
    if name != "demo" and not data:
        raise SystemExit(f"{name}: set DRAGKIT_DATA to the folder of its question files.")
    for phase in (1, 2):
        arguments = command(name, phase, str(folder), data)
        subprocess.run([sys.executable, "-m", "dragkit.train", *arguments, "--resume"], check=True)


def load_state(folder: Path, state: str) -> tuple[JointModel, QuestionDataset]:
    """The joint model at a state of phase 2, and the training questions."""
    steps = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("phase2/step-*"))
    step = steps[-1 if state == "end" else 0]
    loaded = load_checkpoint(resolve_checkpoint(folder / "phase2", step))
    config = read_saved_config(loaded.json["config"], str(loaded.folder))
    device = setup_process(config)
    encoder = TextEncoder(find_encoder(config.encoder.model), cache_root(config.data.cache_dir))
    phase = build_joint(config, encoder, device)
    if state == "start":
        phase.load_retriever(load_checkpoint(resolve_checkpoint(folder / "phase1", "best")))
    else:
        phase.load(loaded)
    model = phase.model.eval().requires_grad_(False)
    path = data_paths(config).train
    return model, QuestionDataset(path, config, encoder, model.generator, batch_size=1)


def tables_of_set(folder: Path, state: str, questions: int, facts: int) -> list[SubsetTables]:
    """Tables of random training questions that have a positive fact and enough facts."""
    model, dataset = load_state(folder, state)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    tables: list[SubsetTables] = []
    for row in order.tolist():
        if len(tables) == questions:
            break
        prompts = QuestionPrompts(model, dataset.collator([row]), dataset.relations, facts)
        if len(prompts.facts) == facts and prompts.label.any() and prompts.fits():
            tables.append(
                make_tables(prompts, num_draws=PROMPT_DRAWS, temperatures=TEMPERATURES, seed=row)
            )
    return tables


class Summary(NamedTuple):
    """Errors of an estimator over all questions. Norms are those of the stacked exact gradients.

    Attributes:
        name, family, prompts: see `Estimates`.
        bias: |mean - exact| / |exact|, without the part that the number of repetitions explains.
        variance: trace of the covariance of an estimate over |exact|^2.
        cosine_of_mean: cosine of the mean estimate and the exact gradient.
        cosine: mean cosine of one estimate and the exact gradient.
        median_cosine_of_mean, median_cosine: the two for the median question alone.
    """

    name: str
    family: str
    prompts: int
    bias: float
    variance: float
    cosine_of_mean: float
    cosine: float
    median_cosine_of_mean: float
    median_cosine: float


def _cosine(values: Tensor, exact: Tensor) -> Tensor:
    """Mean cosine of [..., n] and [n]."""
    return torch.cosine_similarity(values, exact.expand_as(values), -1).mean()


def summarise(estimates: Sequence[Estimates]) -> Summary:
    """The errors of one estimator, from its estimates for each question."""
    name, family, prompts, *_ = estimates[0]
    values = torch.cat([e.values for e in estimates], 1)
    exact = torch.cat([e.exact for e in estimates])
    mean, variance = values.mean(0), values.var(0).sum()
    norm = exact.norm()
    # The mean of R estimates has variance / R by itself.
    bias = ((mean - exact).square().sum() - variance / len(values)).clamp(min=0).sqrt()
    by_question = [
        (_cosine(e.values.mean(0), e.exact), _cosine(e.values, e.exact)) for e in estimates
    ]
    return Summary(
        name,
        family,
        prompts,
        float(bias / norm),
        float(variance / norm**2),
        float(_cosine(mean, exact)),
        float(_cosine(values, exact)),
        *(float(torch.stack(part).median()) for part in zip(*by_question, strict=True)),
    )


def summaries(tables: Sequence[SubsetTables]) -> list[Summary]:
    """The errors of every estimator over all questions."""
    by_name: dict[str, list[Estimates]] = defaultdict(list)
    for number, table in enumerate(tables):
        for estimates in all_estimates(table, REPETITIONS, number):
            by_name[estimates.name].append(estimates)
    return [summarise(estimates) for estimates in by_name.values()]


def remarks(tables: Sequence[SubsetTables]) -> str:
    """Sentences about the losses themselves."""
    order = torch.stack([t.key_order_loss for t in tables])  # [Q, 2, D]
    share = (order[:, 0] - order[:, 1]).square().mean() / order[:, 0].var(1).mean()
    label = torch.cat([t.label for t in tables])
    expected, marginal = (
        torch.cat([gradient(t.logits, t.loss, len(t.logits)) for t in tables])
        for gradient in (exact_gradient, exact_marginal_gradient)
    )
    longer = torch.stack([_relative_length(t) for t in tables]).mean()
    return (
        f"The order of the facts by key instead of by logit explains {100 * share:.1f} % of the "
        f"variance of the loss over draws. The exact gradient of the expected loss raises "
        f"{_raised(expected, label)}. That of the marginal likelihood raises "
        f"{_raised(marginal, label)}. A fifth of the questions has "
        f"{_share(expected, len(tables))} of the squared norm of the first, and "
        f"{_share(marginal, len(tables))} of the second. "
        f"A prompt with all facts has {longer:.2f} times the tokens of the average draw."
    )


def _relative_length(tables: SubsetTables) -> Tensor:
    """Tokens of the prompt with all facts over those of the average draw."""
    probability = subset_probability(tables.logits, len(tables.logits))
    return tables.num_tokens[-1] / (probability @ tables.num_tokens.double())


def _raised(gradient: Tensor, label: Tensor) -> str:
    raised = gradient < 0
    positive, others = _percent(raised[label]), _percent(raised[~label])
    return f"{positive} of the positive facts and {others} of the others"


def _share(gradient: Tensor, num_questions: int) -> str:
    """Share of the fifth of the questions with the largest gradients in the squared norm."""
    square = gradient.view(num_questions, -1).square().sum(1).sort(descending=True).values
    return _percent(square[: max(num_questions // 5, 1)].sum() / square.sum())


def _percent(values: Tensor) -> str:
    return f"{100 * values.double().mean():.0f} %"


def table(rows: Sequence[Summary]) -> str:
    """The errors as a table in Markdown."""
    lines = [
        "| estimator | prompts | bias | variance | cosine of mean | of one | "
        "median question: of mean | of one |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.prompts} | {row.bias:.2g} | {row.variance:.2g} | "
            f"{row.cosine_of_mean:.2f} | {row.cosine:.2f} | "
            f"{row.median_cosine_of_mean:.2f} | {row.median_cosine:.2f} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, list[Summary]], path: Path) -> None:
    """Draws the cosine of one estimate over its prompts, a panel for each state."""
    # Not pyplot, which would need a display or a backend.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for panel, (state, rows) in zip(panels, results.items(), strict=True):
        for family, colour in COLOURS.items():
            chosen = [row for row in rows if row.family == family]
            prompts, cosine = [r.prompts for r in chosen], [r.cosine for r in chosen]
            line = "-" if len(set(prompts)) > 1 and len(set(prompts)) == len(prompts) else ""
            panel.plot(prompts, cosine, "o", ls=line, ms=5, color=colour, label=family)
        panel.set(title=state, xscale="log", xlabel="prompts of an estimate", ylim=(-0.25, 1))
        panel.set_xticks([1, 2, 3, 5, 9], ["1", "2", "3", "5", "9"])
        panel.minorticks_off()
        panel.grid(True, lw=0.3)
    panels[0].set_ylabel("cosine of one estimate and the exact gradient")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    # Without a date and with fixed identifiers the file is the same each time.
    with rc_context({"svg.hashsalt": "estimators"}):
        figure.savefig(path, metadata={"Date": None})


HEAD = """# Estimators of the draw's gradient

Joint training needs the gradient of the expected answer loss at the fact logits, over the random
draw of the facts ([method](method.md), section 6). This page compares estimators of it with the
exact gradient, on the bundled generator and real training questions.

**Truth.** A question keeps {facts} facts: positive facts, at most half of them, and the most
probable others. Every subset gets its prompt, and its answer loss. The probability of every subset
is exact, also that of the fact which stands in for an empty draw (an integral over one key). The
gradient follows by autograd. Prompts list the facts by logit. Training lists them by key, so the
order is one more source of noise, see the last line of each section.

**Errors.** All norms and cosines are over the facts of all {questions} questions together. *bias*
is |mean - exact| / |exact|. *variance* is the trace of the covariance of one estimate over
|exact|^2. Means are over {repetitions} estimates, or over {draws} draws where each needs its own
prompt. *prompts* counts prompts of one estimate.

**Estimators.**

- *vector gate*: `sampler.estimator` `binary_concrete` with temperature T, or `straight_through`
  ("mean"). The gate scales the structural vector of a drawn fact. "exact_k" is compared with the
  exact gradient of its own draw.
- *log-gate*: the same with a gate of 1 that scales the whole fact: exp(score) of its tokens as keys
  of attention, and their dt in Mamba-2 blocks.
- *soft gates*: `sampler.estimator: soft_gates`. All facts are in the prompt, with log-gates
  sigmoid(key / T) in the forward.
- *mean field*: all facts are in the prompt, with log-gates equal to their probabilities.
- *leave-one-out*: `sampler.estimator: leave_one_out` with M draws. "score of signs" is z - p for
  every draw, which ignores how the fact of an empty draw is chosen.
- *marginal*: `loss.draw_objective: marginal`, which weights the score of each draw by its posterior
  given the answer. It is compared with the exact gradient of its own objective,
  -log E[exp(-loss)].
- *leave-one-out and mean field*: leave-one-out for the loss without its linear part, whose slope is
  the mean-field gradient. It stays unbiased and costs one prompt.
- *DisARM*, *ARMS*: draws with opposite, or negatively correlated, noise.

**What it shows.**

- The vector gate is hundreds of times too small, because the text of a fact stays in the prompt
  whatever its gate is. At the start it is noise. Later it points along the exact gradient, roughly.
- The log-gate at 1 is saturated, and a hundred times too small.
- Soft gates have the direction of the exact gradient for most questions. One prompt, of about twice
  the tokens, does as well as three to eight draws of leave-one-out. They are biased: too small, by
  a factor that differs between questions, and blind to how an empty draw chooses its fact.
- Leave-one-out is unbiased, and eight draws give an estimate that is mostly signal. DisARM is no
  better from four draws on. ARMS is a little better, but biased where draws are empty.
- The marginal objective is biased by few draws: too small, but for the median question in its
  exact direction. Its exact gradient is spread over the questions, while a few dominate that of the
  expected loss, and it raises fewer of the facts that are not positive (see the last lines of each
  section).
- The mean field as a control helps most questions. Where facts are improbable its slope is steep,
  and the variance of few questions grows beyond that without it.

![cosine of one estimate](estimators.svg)
"""


def document(
    results: dict[str, list[Summary]], notes: dict[str, str], args: argparse.Namespace
) -> str:
    """The page."""
    num_questions = args.questions * len(args.sets)
    lines = [
        HEAD.format(
            facts=args.facts, questions=num_questions, repetitions=REPETITIONS, draws=PROMPT_DRAWS
        )
    ]
    titles = {
        "start": "Start of phase 2",
        "middle": "After the first epoch of phase 2",
        "end": "End of phase 2",
    }
    for state, rows in results.items():
        lines += [f"## {titles[state]}", "", table(rows), "", notes[state], ""]
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    lines += [
        "## How it was made",
        "",
        f"On {time.strftime('%Y-%m-%d')} at commit {commit} with Python "
        f"{platform.python_version()} and torch {version('torch')}, on a CPU:",
        "",
        "```",
        f"python scripts/estimators.py --sets {' '.join(args.sets)} --questions {args.questions} "
        f"--facts {args.facts}",
        "```",
        "",
        "It trains both phases on each set, if the folder of the runs does not have them:",
        "",
        "```",
    ]
    for name in args.sets:
        for phase in (1, 2):
            shown = " ".join(command(name, phase, f"runs/estimators/{name}", "$DRAGKIT_DATA"))
            lines.append(f"python -m dragkit.train {shown}")
    return "\n".join([*lines, "```", ""])


def main() -> None:
    """Trains what is missing, makes the tables of every state, and writes page and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sets", nargs="+", default=["demo"], choices=SETS)
    add("--questions", type=int, default=12, help="questions of each set")
    add("--facts", type=int, default=8, help="facts of a question; the prompts are 2^facts")
    add("--runs", type=Path, default=ROOT / "runs" / "estimators", help="folder of the runs")
    add("--output", type=Path, default=ROOT / "docs" / "estimators.md", help="the page")
    args = parser.parse_args()
    for name in args.sets:
        train(name, args.runs / name)
    results, notes = {}, {}
    for state in STATES:
        tables = []
        for name in args.sets:
            start = time.time()
            tables += tables_of_set(args.runs / name, state, args.questions, args.facts)
            sys.stdout.write(f"{name}, {state}: {time.time() - start:.0f} s\n")
            sys.stdout.flush()
        results[state], notes[state] = summaries(tables), remarks(tables)
        # Every state is written at once: a run takes minutes.
        args.output.write_text(document(results, notes, args), encoding="utf-8")
        plot(results, args.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
