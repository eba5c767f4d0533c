"""Plans memory and time of phase 2 without a GPU: `python -m dragkit.plan --preset h200`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dragkit import __version__
from dragkit.config.arguments import parse_train_args
from dragkit.config.flags import EXIT_CODE_HELP, Parser, train_parser, with_underscores
from dragkit.config.schema import TrainConfig
from dragkit.console import run_main, setup_console
from dragkit.errors import ConfigError
from dragkit.observe.gpu import CARDS

if TYPE_CHECKING:
    from dragkit.memory_plan.choice import Device, MemoryPlan

# Fractions of a GPU's peak FLOP/s that a training step may reach: untuned and well tuned.
_PEAK_FRACTIONS = (0.1, 0.4)
# Tokens of the question with the instructions, and of a fact with its vector.
_PROMPT_TOKENS, _TOKENS_PER_FACT = 100, 25
_GIB = 2.0**30
_EPILOG = f"""\
The plan needs no GPU and no weights. All figures are predictions, none is measured.

examples:
  python -m dragkit.plan --preset h200
  python -m dragkit.plan --preset b200 --set generator.activation_checkpointing=all
  python -m dragkit.plan --card H100 --generator_model random:nemotron-3-nano-30b-a3b:layers=26

{EXIT_CODE_HELP}"""


@dataclass(frozen=True)
class PlanArguments:
    """A parsed plan command.

    Attributes:
        config: configuration of phase 2.
        card: name of the GPU. None takes the GPU of this machine, else the preset's.
        ranks: number of ranks, one GPU each.
        json: write JSON.
        debug: show tracebacks.
    """

    config: TrainConfig
    card: str | None
    ranks: int
    json: bool
    debug: bool


def plan_parser() -> Parser:
    """Builds the parser: the flags of training and three more."""
    text = "Predict memory and time of phase 2, and what a run would choose. Loads nothing."
    parser = train_parser("python -m dragkit.plan", text, _EPILOG)
    add = parser.add_argument_group("plan").add_argument
    add(
        "--card",
        choices=CARDS,
        metavar="NAME",
        help=f"plan for {', '.join(CARDS)} (default: this machine's GPU, else the preset's)",
    )
    add("--ranks", default="1", metavar="N", help="number of ranks, one GPU each (default: 1)")
    add("--json", action="store_true", help="write JSON")
    return parser


def parse_plan_args(argv: Sequence[str]) -> PlanArguments:
    """Parses the command line of the plan.

    Raises:
        ConfigError: lists all unknown flags, wrong keys and wrong values.
        MissingInputError: the file of --config cannot be read.
    """
    parser = plan_parser()
    args, _ = parser.parse_known_args(with_underscores(argv))
    if not args.ranks.isdecimal() or int(args.ranks) < 1:
        parser.error(f"--ranks must be a whole number of at least 1, got {args.ranks!r}")
    train = parse_train_args(argv, parser=parser)
    config = train.config_for_phase(2)
    return PlanArguments(config, args.card, int(args.ranks), args.json, train.debug)


def _device(args: PlanArguments) -> Device:
    import torch

    from dragkit.memory_plan.choice import DEVICES, local_card

    # A named GPU comes first, then this machine's, then the one that the preset is named after.
    if args.card is not None:
        return DEVICES[args.card]
    if torch.cuda.is_available():
        name = args.config.run.device
        return local_card(torch.device("cuda" if name in ("auto", "cpu") else name))
    return DEVICES.get((args.config.preset or "").upper(), DEVICES["H200"])


def _estimate_work(config: TrainConfig, plan: MemoryPlan) -> dict[str, object]:
    """Estimates FLOPs and time of a batch of typical prompts."""
    from dragkit.memory_plan.choice import SUPERVISED_FRACTION, lora_dims_of
    from dragkit.memory_plan.memory import flops_per_token

    prompt = min(
        _PROMPT_TOKENS + _TOKENS_PER_FACT * config.sampler.k_facts,
        config.generator.max_prompt_tokens,
    )
    questions = config.optim.batch_size_in(2)
    tokens = questions * prompt
    parts = flops_per_token(
        plan.dims, plan.policy, lora_dims_of(config), prompt, SUPERVISED_FRACTION
    )
    work: dict[str, object] = {
        "tokens_per_prompt": prompt,
        "questions_per_batch": questions,
        "tokens_per_batch": tokens,
        "flops_per_token": parts,
    }
    if plan.device.flops:
        microbatches = -(-questions // max(plan.tokens // prompt, 1))
        # Forward and backward each read the weights once. Recomputing all blocks reads them again.
        reads = 3 if plan.policy == "all" else 2
        weight_bytes = plan.fixed["frozen weights"] * plan.shards
        read_s = microbatches * reads * weight_bytes / plan.device.bandwidth
        work |= {"microbatches": microbatches, "seconds_reading_weights": read_s}
        # A step takes at least the time to read the weights, however few tokens it has.
        flops = tokens * sum(parts.values())
        for fraction in _PEAK_FRACTIONS:
            seconds = max(flops / (fraction * plan.device.flops), read_s)
            work[f"seconds_at_{fraction:.0%}"] = seconds
            work[f"tokens_per_second_at_{fraction:.0%}"] = tokens / seconds
    return work


def plan_document(args: PlanArguments) -> dict[str, object]:
    """The plan as JSON-ready data.

    Raises:
        ConfigError: the generator is not a Nemotron-H.
    """
    from dragkit.memory_plan.choice import alternatives, make_plan
    from dragkit.memory_plan.dims import generator_dims, num_parameters

    config, device = args.config, _device(args)
    dims = generator_dims(config.generator, name=config.generator_model)
    if dims is None:
        raise ConfigError(
            f"generator.model: {config.generator_model} is not a Nemotron-H. The plan covers "
            "Nemotron-H models only."
        )
    plan = make_plan(config, dims, device, args.ranks)
    fitting = [] if plan.fits else list(alternatives(config, dims, device, args.ranks))[:3]
    return {
        "dragkit": __version__,
        "preset": config.preset,
        "device": device.name,
        "device_bytes": device.memory,
        "shards": plan.shards,
        "peak_flops": device.flops,
        "generator": config.generator_model,
        "blocks": len(dims.block_types),
        "parameters": num_parameters(dims),
        "fits": plan.fits,
        "activation_checkpointing": plan.policy,
        "max_tokens_per_microbatch": plan.tokens,
        "bytes": plan.components,
        "validation_bytes": plan.validation,
        "questions_decoded_at_once": plan.questions,
        "peak_bytes": plan.peak,
        "bytes_per_token": plan.per_token,
        "tokens_that_fit": plan.fit,
        "supervised_rows": plan.rows,
        "work": _estimate_work(config, plan),
        "alternatives": fitting,
    }


def format_plan(plan: dict) -> str:
    """The plan as text for a terminal."""
    header = [
        f"plan by dragkit {plan['dragkit']}: predictions, not measurements",
        f"card       {plan['device']}, {plan['device_bytes'] / _GIB:.1f} GiB",
        f"generator  {plan['generator']}: {plan['blocks']} blocks, "
        f"{plan['parameters'] / 1e9:.2f} G parameters",
        f"choice     generator.activation_checkpointing={plan['activation_checkpointing']} "
        f"generator.max_tokens_per_microbatch={plan['max_tokens_per_microbatch']}",
        f"fits       {'yes' if plan['fits'] else 'no'}",
        *([f"weights    sharded over {plan['shards']} ranks"] if plan["shards"] > 1 else []),
        "",
        f"peak memory of a micro-batch of {plan['max_tokens_per_microbatch']:,} tokens, "
        f"{plan['supervised_rows']:,} of them supervised   GiB",
    ]
    num_decoded = plan["questions_decoded_at_once"]
    lines = [
        *_format_bytes(plan["bytes"]),
        "",
        f"{f'memory when validating, {num_decoded} questions decoded at once':<66}GiB",
        *_format_bytes(plan["validation_bytes"]),
    ]
    fit = ", ".join(f"{name} {count:,}" for name, count in plan["tokens_that_fit"].items())
    work = plan["work"]
    flops = work["flops_per_token"]
    lines += ["", f"tokens of a micro-batch that fit, by activation checkpointing: {fit}", ""]
    lines.append("FLOPs per token of a training step                        GFLOP")
    lines += [
        f"  {name:<50}{count / 1e9:>11.2f}"
        for name, count in (*flops.items(), ("all", sum(flops.values())))
    ]
    if plan["peak_flops"]:
        low, high = (f"{fraction:.0%}" for fraction in _PEAK_FRACTIONS)
        slow, fast = work[f"seconds_at_{low}"], work[f"seconds_at_{high}"]
        lines += [
            "",
            f"estimate for the generator: {work['questions_per_batch']} prompts of "
            f"{work['tokens_per_prompt']} tokens, micro-batches: {work['microbatches']}",
            f"  {1e3 * fast:.0f} to {1e3 * slow:.0f} ms, {_rate(work, low)} to "
            f"{_rate(work, high)} tokens/s, at {low} to {high} of "
            f"{plan['peak_flops'] / 1e12:.0f} TFLOP/s",
            f"  at least {1e3 * work['seconds_reading_weights']:.0f} ms to read the weights",
        ]
    if plan["alternatives"]:
        lines += [
            "",
            "This does not fit. These settings do:",
            *(f"  {x}" for x in plan["alternatives"]),
        ]
    return "\n".join([*header, *lines])


def _format_bytes(parts: dict[str, int]) -> list[str]:
    rows = (*parts.items(), ("all", sum(parts.values())))
    return [f"  {name:<58}{size / _GIB:>9.2f}" for name, size in rows]


def _rate(work: dict, fraction: str) -> str:
    return f"{work[f'tokens_per_second_at_{fraction}']:,.0f}"


def _plan(argv: list[str]) -> int:
    args = parse_plan_args(argv)
    setup_console(debug=args.debug)
    plan = plan_document(args)
    sys.stdout.write((json.dumps(plan, indent=1) if args.json else format_plan(plan)) + "\n")
    return 0 if plan["fits"] else ConfigError.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_main(_plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
