"""The flags of training, built from the schema. This module does not import torch."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Literal, NoReturn, get_args, get_origin

from dragkit.config.resolve import FIELDS, nearest_key
from dragkit.config.schema import PRESETS
from dragkit.console import show
from dragkit.errors import EXIT_CODES, ConfigError

# The set of flags is frozen. A new setting is a field of the schema, and --set reaches it.
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
        "fact sampling": """
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
_FLAG_NAMES = {"generator.model": "generator_model", "generator.revision": "generator_revision"}
FLAGS: dict[str, str] = {
    _FLAG_NAMES.get(key, key.rpartition(".")[2]): key
    for keys in FLAG_GROUPS.values()
    for key in keys
}
EXIT_CODE_HELP = "exit codes:\n" + "\n".join(
    f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()
)
_TRAIN_EPILOG = f"""\
Flags may be written with _ or -. A switch stands alone, takes true or false, or begins with --no_.
Precedence: defaults < preset < --config < flags. `python -m dragkit.config show` prints the origin
of every value. Without training data, a run takes the bundled demo set and the preset tiny.

examples:
  python -m dragkit.train
      the bundled demo on a laptop: phase 1, then phase 2
  python -m dragkit.train --phase 1 --preset cwq --heuristics_path train.jsonl \\
      --checkpoint_dir runs/cwq
      a retriever on your questions
  python -m dragkit.train --phase 2 --heuristics_path train.jsonl --phase1_checkpoint runs/cwq
      retriever and generator jointly, with the 30B generator

{EXIT_CODE_HELP}"""


class Parser(argparse.ArgumentParser):
    """Argument parser that raises ConfigError instead of exiting."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            # An abbreviation would change its meaning when a flag is added.
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=f"{prog} {'RUN ' if prog.endswith('evaluate') else ''}[flags]",
        )

    def print_help(self, file: object = None) -> None:
        show(self.format_help().rstrip("\n"))

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. `{self.prog} --help` lists all flags.")


class _CollectSetting(argparse.Action):
    """Appends (dotted key, value, flag) to `settings` in the order of the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        key, value, spelling = self.dest, values, option_string
        if key == "set":
            key, equals, value = str(values).partition("=")
            if not equals:
                parser.error(f"--set takes section.field=value, got {values!r}")
            spelling = f"--set {key}"
        elif self.nargs == 0:
            value = self.const
        namespace.settings = [*namespace.settings, (key, value, spelling)]


def train_parser(
    prog: str,
    description: str = "Train a D-RAG model: one loop, two phases.",
    epilog: str = _TRAIN_EPILOG,
) -> Parser:
    """Builds the parser of training. Its `settings` are (dotted key, value, flag) in order."""
    parser = Parser(prog, description, epilog)
    parser.set_defaults(settings=[])
    general = parser.add_argument_group("sources of settings")
    general.add_argument(
        "--preset", metavar="NAME", help=f"start from a preset: {', '.join(PRESETS)}"
    )
    general.add_argument("--config", metavar="PATH", help="YAML file with sections and keys")
    general.add_argument(
        "--set",
        action=_CollectSetting,
        dest="set",
        metavar="SECTION.FIELD=VALUE",
        help="set any setting, any number of times (`none` empties an optional one)",
    )
    general.add_argument("--debug", action="store_true", help="show tracebacks")
    names = {key: name for name, key in FLAGS.items()}
    for title, keys in FLAG_GROUPS.items():
        group = parser.add_argument_group(title)
        for key in keys:
            _add_flag(group, names[key], key)
    return parser


def _add_flag(group: argparse._ArgumentGroup, name: str, key: str) -> None:
    """Adds the flag of one field. A switch also gets its --no_ form."""
    # Types and ranges are left to the schema, so that all wrong values are reported together.
    field = FIELDS[key]
    options = (field.annotation, *get_args(field.annotation))
    no_default = field.default is None or field.default is False
    default = "" if no_default else f" (default: {_format_default(field.default)})"
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
        action=_CollectSetting,
        dest=key,
        nargs="?" if is_switch else None,
        const=True if is_switch else None,
        metavar=metavar,
        help=f"{field.description}{default}".replace("%", "%%"),
    )
    if is_switch:
        group.add_argument(
            f"--no_{name}",
            action=_CollectSetting,
            dest=key,
            nargs=0,
            const=False,
            help=argparse.SUPPRESS,
        )


def _format_default(value: object) -> str:
    return "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Writes every flag with underscores. Values stay as they are."""
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
    """One line per unknown argument, except for the value after an unknown flag."""
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
            hint = "is read from the checkpoint or is not used in evaluation. Omit it."
        elif near:
            hint = f"unknown flag; did you mean --{near[0]}?"
        elif training and key:
            hint = f"unknown flag; did you mean --set {key}=VALUE?"
        else:
            hint = "unknown flag (--help lists all)"
        problems.append(f"--{name}: {hint}" if word.startswith("--") else f"{word}: {hint}")
    return problems
