"""The flags of the command lines, built from the schema. Torch is not imported: help is quick."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn, get_args, get_origin

from dragkit.config.resolve import FIELDS, nearest_key
from dragkit.config.schema import DEVICE_PATTERN, PRESETS
from dragkit.errors import EXIT_CODES, ConfigError
from dragkit.observe.gpu import CARDS

# The command line is frozen: a new knob is a schema field, reached by --set, not a new flag.
FLAG_GROUPS: dict[str, tuple[str, ...]] = {
    title: tuple(keys.split())
    for title, keys in {
        "run": """
            run.phase run.seed run.device run.compile run.profile_steps run.checkpoint_dir
            run.phase1_checkpoint run.resume
        """,
        "data": "data.heuristics_path data.val_heuristics_path data.num_workers",
        "retriever": """
            retriever.hidden_dim retriever.node_dim retriever.relation_dim
            retriever.num_reasoning_steps
        """,
        "drawing of facts": """
            sampler.k_facts sampler.max_facts_cap sampler.prob_threshold sampler.temperature
        """,
        "generator": """
            generator.model generator.revision generator.generator_dim generator.freeze_lm
            generator.generator_microbatch
        """,
        "optimisation": """
            optim.epochs optim.batch_size optim.lr optim.lora_lr optim.lora_lr_scale
            optim.weight_decay loss.ret_loss_weight loss.rho loss.margin loss.eos_loss_weight
            loss.use_grad_norm_balance
        """,
        "validation and logging": """
            run.val_generation run.val_max_new_tokens run.val_generation_limit
            run.val_log_samples run.log_grad_norms run.grad_norm_log_interval
        """,
    }.items()
}
_LONGER_NAMES = {"generator.model": "generator_model", "generator.revision": "generator_revision"}
FLAGS: dict[str, str] = {
    _LONGER_NAMES.get(key, key.rpartition(".")[2]): key
    for keys in FLAG_GROUPS.values()
    for key in keys
}
_EXIT_CODES = "exit codes:\n" + "\n".join(
    f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()
)
_TRAIN_EPILOG = f"""\
Words join by _ or -. A switch stands alone, takes true or false, or begins with --no_.
Precedence: defaults < preset < --config < flags; `python -m dragkit.config show` tells the origin
of every value. With no data named, the bundled demo set and the preset tiny are used.

examples:
  python -m dragkit.train
      the bundled demo on a laptop: phase 1, then phase 2
  python -m dragkit.train --phase 1 --preset cwq --heuristics_path train.jsonl \\
      --checkpoint_dir runs/cwq
      a retriever on own data
  python -m dragkit.train --phase 2 --heuristics_path train.jsonl --phase1_checkpoint runs/cwq
      retriever and generator jointly, with the 30B generator

{_EXIT_CODES}"""
_EVALUATE_EPILOG = f"""\
Architecture and data settings come from the checkpoint and have no flags here.

examples:
  python -m dragkit.evaluate runs/demo
  python -m dragkit.evaluate runs/demo --data test.jsonl other.jsonl --output results.json
  python -m dragkit.evaluate runs/demo --checkpoint latest --limit 100

{_EXIT_CODES}"""

_PLAN_EPILOG = f"""\
Works without a GPU and without weights. All figures are predictions, none is measured.

examples:
  python -m dragkit.plan --preset h200
  python -m dragkit.plan --preset b200 --set generator.activation_checkpointing=all
  python -m dragkit.plan --card H100 --generator_model random:nemotron-3-nano-30b-a3b:layers=26

{_EXIT_CODES}"""


class Parser(argparse.ArgumentParser):
    """Argument parser whose mistakes are ConfigErrors."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=f"{prog} {'RUN ' if 'evaluate' in prog else ''}[flags]",
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` lists all flags")


class _Setting(argparse.Action):
    """Notes (dotted key, value, flag) in the order of the command line: the last one wins."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        key, value, label = self.dest, values, option_string
        if key == "set":
            key, equals, value = str(values).partition("=")
            if not equals:
                parser.error(f"--set takes section.field=value, got {values!r}")
            label = f"--set {key}"
        elif self.nargs == 0:
            value = self.const
        namespace.settings = [*namespace.settings, (key, value, label)]


def plan_parser() -> Parser:
    """The parser of `dragkit.plan`: the flags of `dragkit.train` and three more."""
    text = "Predict memory and time of phase 2, and what a run would choose; loads nothing."
    parser = train_parser("python -m dragkit.plan", text, _PLAN_EPILOG)
    add = parser.add_argument_group("plan").add_argument
    add(
        "--card",
        choices=CARDS,
        metavar="NAME",
        help=f"plan for {', '.join(CARDS)} (default: the GPU that is here, else the preset's)",
    )
    add(
        "--ranks",
        type=_positive,
        default=1,
        metavar="N",
        help="number of ranks, one GPU each (default 1)",
    )
    add("--json", action="store_true", help="write JSON")
    return parser


def train_parser(
    prog: str,
    description: str = "Train a D-RAG model: one loop, two phases.",
    epilog: str = _TRAIN_EPILOG,
) -> Parser:
    """The parser of `dragkit.train`: `settings` collects (dotted key, text, flag) in order."""
    parser = Parser(prog, description, epilog)
    parser.set_defaults(settings=[])
    general = parser.add_argument_group("sources of settings")
    general.add_argument(
        "--preset", metavar="NAME", help=f"start from a preset: {', '.join(PRESETS)}"
    )
    general.add_argument("--config", metavar="PATH", help="YAML file with sections and keys")
    general.add_argument(
        "--set",
        action=_Setting,
        dest="set",
        metavar="SECTION.FIELD=VALUE",
        help="set any value of the schema, repeatable; `none` empties an optional one",
    )
    general.add_argument("--debug", action="store_true", help="show tracebacks")
    names = {key: name for name, key in FLAGS.items()}
    for title, keys in FLAG_GROUPS.items():
        group = parser.add_argument_group(title)
        for key in keys:
            _add_flag(group, names[key], key)
    return parser


def evaluate_parser() -> Parser:
    """The parser of `dragkit.evaluate`: no flag for what the checkpoint knows."""
    parser = Parser("python -m dragkit.evaluate", "Evaluate a trained run.", _EVALUATE_EPILOG)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run or of one of its checkpoints")
    add(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="questions, JSONL or JSONL.gz (default: the run's test, else validation file)",
    )
    add(
        "--checkpoint",
        type=_checkpoint,
        default="best",
        metavar="{best,latest,STEP}",
        help="which checkpoint of the run (default: best)",
    )
    add("--output", type=Path, metavar="FILE", help="where the JSON goes (default: into the run)")
    add("--limit", type=_positive, metavar="N", help="first N questions of each file")
    add(
        "--batch_size", type=_positive, metavar="N", help="questions per batch (default: the run's)"
    )
    add(
        "--device",
        type=_device,
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N (default: auto)",
    )
    add(
        "--max_new_tokens",
        type=_positive,
        metavar="N",
        help="longest answer, in tokens (default: the run's)",
    )
    add("--seed", type=_seed, metavar="N", help="seed (default: the run's)")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def _add_flag(group: argparse._ArgumentGroup, name: str, key: str) -> None:
    """Add the flag of one field. A switch also gets its --no_ form."""
    field = FIELDS[key]
    options = (field.annotation, *get_args(field.annotation))
    silent = field.default is None or field.default is False
    default = "" if silent else f" (default: {_shown(field.default)})"
    is_switch = bool in options
    if get_origin(field.annotation) is Literal:
        metavar = "{" + ",".join(str(option) for option in options[1:]) + "}"
    elif is_switch:
        metavar = "PATH" if str in options else "BOOL"
    elif str in options:
        metavar = "PATH" if name.endswith(("_path", "_dir", "_checkpoint")) else "TEXT"
    else:
        metavar = "N" if int in options else "X"
    group.add_argument(
        f"--{name}",
        action=_Setting,
        dest=key,
        nargs="?" if is_switch else None,
        const=True if is_switch else None,
        metavar=metavar,
        help=f"{field.description}{default}".replace("%", "%%"),
    )
    if is_switch:
        group.add_argument(
            f"--no_{name}",
            action=_Setting,
            dest=key,
            nargs=0,
            const=False,
            help=argparse.SUPPRESS,
        )


def _shown(value: object) -> str:
    return "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Spell every flag with underscores. Values stay as they are."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--") and len(name) > 2:
            word = f"--{name[2:].replace('-', '_')}{equals}{value}"
        words.append(word)
    return words


def explain_unknown_flags(
    extras: Sequence[str], known: Sequence[str], training: bool = True
) -> list[str]:
    """One line for each unknown argument. The value after an unknown flag is not reported."""
    problems, after_flag = [], False
    for word in extras:
        name = word.partition("=")[0].removeprefix("--")
        if not word.startswith("-"):
            if not after_flag:
                problems.append(f"unexpected argument {word!r}")
            after_flag = False
            continue
        after_flag = "=" not in word
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        key = name if name in FIELDS else nearest_key(name)
        if not training and name in FLAGS:
            hint = "is read from the checkpoint or has no part in evaluation; leave it out"
        elif near:
            hint = f"unknown flag; did you mean --{near[0]}?"
        elif training and key:
            hint = f"unknown flag; did you mean --set {key}=VALUE?"
        else:
            hint = "unknown flag; --help lists all"
        problems.append(f"--{name}: {hint}" if word.startswith("--") else f"{word}: {hint}")
    return problems


def _positive(text: str) -> int:
    return _checked(text, 1, None)


def _seed(text: str) -> int:
    return _checked(text, 0, 2**32 - 1)


def _checked(text: str, low: int, high: int | None) -> int:
    """Whole number in a range, for argparse."""
    if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
        upper = "" if high is None else f" and at most {high}"
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {low}{upper}, got {text!r}"
        )
    return int(text)


def _checkpoint(text: str) -> str | int:
    if text in ("best", "latest"):
        return text
    step = text.removeprefix("step-")
    if not step.isdecimal():
        raise argparse.ArgumentTypeError(f"must be best, latest or a step, got {text!r}")
    return int(step)


def _device(text: str) -> str:
    if not re.fullmatch(DEVICE_PATTERN, text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, got {text!r}")
    return text
