"""Prints the memory plan of a run, without a GPU: `python -m dragkit.plan --preset h200`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dragkit import __version__
from dragkit.config.arguments import parse_train_args
from dragkit.config.flags import EXIT_CODE_HELP, Parser, train_parser, with_underscores
from dragkit.config.schema import TrainConfig
from dragkit.console import run_main, setup_console, show
from dragkit.errors import ConfigError
from dragkit.observe.gpu import CARDS, CardSpec

if TYPE_CHECKING:
    from dragkit.memory_plan.choice import MemoryPlan

# Fractions of a card's peak rate that a step may sustain: first versions, and well-tuned ones.
_PEAK_FRACTIONS = (0.1, 0.4)
# Forwards of the generator when it is loaded (`dragkit.generator.conformance`).
_CHECK_FORWARDS = 2
# Tokens of a prompt: the question with the instructions, and each fact with its vector.
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


def _card(args: PlanArguments) -> CardSpec:
    """The card of `--card`, else the local GPU, else the preset's card."""
    # Imports of torch stay inside functions, so that --help answers at once.
    import torch

    from dragkit.memory_plan.choice import local_card

    if args.card is not None:
        return CARDS[args.card]
    if torch.cuda.is_available():
        name = args.config.run.device
        return local_card(torch.device("cuda" if name in ("auto", "cpu") else name))
    return CARDS.get((args.config.preset or "").upper(), CARDS["H200"])


def _estimate_work(config: TrainConfig, plan: MemoryPlan) -> dict[str, object]:
    """FLOPs of a batch of typical prompts, and seconds where the card's rates are known."""
    from dragkit.memory_plan.choice import SUPERVISED_FRACTION, lora_dims_of
    from dragkit.memory_plan.memory import flops_per_token

    typical = _PROMPT_TOKENS + _TOKENS_PER_FACT * config.sampler.k_facts
    prompt = min(typical, config.generator.max_prompt_tokens)
    questions = config.optim.batch_size_in(2)
    prompts = questions * config.sampler.num_draws
    tokens = prompts * prompt
    lora = lora_dims_of(config)
    flops = flops_per_token(plan.dims, plan.policy, lora, prompt, SUPERVISED_FRACTION)
    work: dict[str, object] = {
        "tokens_per_prompt": prompt,
        "questions_per_batch": questions,
        "tokens_per_batch": tokens,
        "flops_per_token": flops,
    }
    if plan.card.bf16_tflops:
        passes = -(-prompts // max(plan.tokens // prompt, 1))
        # Weights are read in the forward and the backward, and once more to recompute all blocks.
        reads = 3 if plan.policy == "all" else 2
        weights = plan.fixed["frozen weights"] * plan.num_shards
        reading = passes * reads * weights / (plan.card.memory_gb_per_s * 1e9)
        work |= {"passes": passes, "seconds_reading_weights": reading}
        # Weights to be sharded are checked on the host, whose rates are not known.
        if plan.num_shards == 1:
            check = _CHECK_FORWARDS * weights / (plan.card.memory_gb_per_s * 1e9)
            work |= {"seconds_checking_at_load": check}
        for fraction in _PEAK_FRACTIONS:
            rate = fraction * (plan.card.bf16_tflops * 1e12)
            seconds = max(tokens * sum(flops.values()) / rate, reading)
            work[f"seconds_at_{fraction:.0%}"] = seconds
            work[f"tokens_per_second_at_{fraction:.0%}"] = tokens / seconds
    return work


def plan_document(args: PlanArguments) -> dict[str, object]:
    """The plan as JSON-ready data.

    Raises:
        ConfigError: the formulas do not cover the generator.
    """
    from dragkit.memory_plan.choice import alternatives, make_plan
    from dragkit.memory_plan.dims import generator_dims, num_parameters

    config, card = args.config, _card(args)
    dims = generator_dims(config.generator, name=config.generator_model)
    if dims is None:
        raise ConfigError(
            f"generator.model: {config.generator_model} is not a Nemotron-H. The memory plan "
            "covers no other model. Train without a plan, or choose a Nemotron-H."
        )
    plan = make_plan(config, dims, card, args.ranks)
    offers = [] if plan.fits else list(alternatives(config, dims, card, args.ranks))[:3]
    return {
        "dragkit": __version__,
        "preset": config.preset,
        "device": card.name,
        "device_bytes": card.memory_bytes,
        "shards": plan.num_shards,
        "peak_flops": card.bf16_tflops * 1e12,
        "generator": config.generator_model,
        "blocks": len(dims.block_types),
        "parameters": num_parameters(dims),
        "fits": plan.fits,
        "activation_checkpointing": plan.policy,
        "max_tokens_per_microbatch": plan.tokens,
        "bytes": plan.training,
        "validation_bytes": plan.decoding,
        "questions_decoded_at_once": plan.decode_batch,
        "peak_bytes": plan.peak_bytes,
        "bytes_per_token": plan.per_token,
        "tokens_that_fit": plan.fit,
        "supervised_rows": plan.supervised_rows,
        "work": _estimate_work(config, plan),
        "alternatives": offers,
    }


def format_plan(plan: dict) -> str:
    """The document of `plan_document` as text for a terminal."""
    tokens, decoded = plan["max_tokens_per_microbatch"], plan["questions_decoded_at_once"]
    fit = ", ".join(f"{policy} {count:,}" for policy, count in plan["tokens_that_fit"].items())
    work = plan["work"]
    flops = work["flops_per_token"]
    lines = [
        f"plan by dragkit {plan['dragkit']}: predictions, not measurements",
        f"card       {plan['device']}, {plan['device_bytes'] / _GIB:.1f} GiB",
        f"generator  {plan['generator']}: {plan['blocks']} blocks, "
        f"{plan['parameters'] / 1e9:.2f} G parameters",
        f"choice     generator.activation_checkpointing={plan['activation_checkpointing']} "
        f"generator.max_tokens_per_microbatch={tokens}",
        f"fits       {'yes' if plan['fits'] else 'no'}",
        *([f"weights    sharded between {plan['shards']} ranks"] if plan["shards"] > 1 else []),
        "",
        *_table(
            f"training: a micro-batch of {tokens:,} tokens, "
            f"{plan['supervised_rows']:,} of them supervised",
            "GiB",
            {name: size / _GIB for name, size in plan["bytes"].items()},
        ),
        "",
        *_table(
            f"validation: {decoded} questions decoded at once",
            "GiB",
            {name: size / _GIB for name, size in plan["validation_bytes"].items()},
        ),
        "",
        f"tokens of a micro-batch that fit, by activation checkpointing: {fit}",
        "",
        *_table(
            "work per token of a training step",
            "GFLOP",
            {name: count / 1e9 for name, count in flops.items()},
        ),
    ]
    if plan["peak_flops"]:
        low, high = (f"{fraction:.0%}" for fraction in _PEAK_FRACTIONS)
        slow, fast = work[f"seconds_at_{low}"], work[f"seconds_at_{high}"]
        tokens_per_s = [f"{work[f'tokens_per_second_at_{x}']:,.0f}" for x in (low, high)]
        lines += [
            "",
            f"estimate for the generator: {work['questions_per_batch']} prompts of "
            f"{work['tokens_per_prompt']} tokens, passes: {work['passes']}",
            f"  {1e3 * fast:.0f} to {1e3 * slow:.0f} ms, {tokens_per_s[0]} to "
            f"{tokens_per_s[1]} tokens/s, at {low} to {high} of "
            f"{plan['peak_flops'] / 1e12:.0f} TFLOP/s",
            f"  reading the weights takes {1e3 * work['seconds_reading_weights']:.0f} ms of that",
        ]
        if "seconds_checking_at_load" in work:
            lines.append(
                f"the check at load runs {_CHECK_FORWARDS} forwards over short prompts: at least "
                f"{1e3 * work['seconds_checking_at_load']:.0f} ms, to read the weights"
            )
    if plan["alternatives"]:
        lines += [
            "",
            "does not fit, but these settings would fit:",
            *(f"  {x}" for x in plan["alternatives"]),
        ]
    return "\n".join(lines)


def _table(title: str, unit: str, rows: dict[str, float]) -> list[str]:
    rows = rows | {"sum": sum(rows.values())}
    return [f"{title:<66}{unit:>5}", *(f"  {name:<58}{x:>11.2f}" for name, x in rows.items())]


def _plan(argv: list[str]) -> int:
    args = parse_plan_args(argv)
    setup_console(debug=args.debug)
    plan = plan_document(args)
    show(json.dumps(plan, indent=1) if args.json else format_plan(plan))
    return 0 if plan["fits"] else ConfigError.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns its exit code."""
    return run_main(_plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
