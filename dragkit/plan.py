"""The plan of a run: `python -m dragkit.plan --preset h200`; needs no GPU and no weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dragkit import __version__
from dragkit.config.arguments import PlanArguments, parse_plan_args
from dragkit.console import run_main, setup_console
from dragkit.errors import ConfigError

if TYPE_CHECKING:
    from dragkit.config import TrainConfig
    from dragkit.memory_plan.choice import Device, MemoryPlan

# Share of a card's peak that a step may sustain: first versions, and well-tuned ones.
_PEAK_FRACTIONS = (0.1, 0.4)
# Tokens of a prompt: the question with the instructions, and a fact with its vector.
_PROMPT_TOKENS, _TOKENS_PER_FACT = 100, 25
_GIB = 2.0**30


def _device(args: PlanArguments) -> Device:
    import torch

    from dragkit.memory_plan.choice import DEVICES, local_card

    if args.card is not None:
        return DEVICES[args.card]
    if torch.cuda.is_available():
        name = args.config.run.device
        return local_card(torch.device("cuda" if name in ("auto", "cpu") else name))
    return DEVICES.get((args.config.preset or "").upper(), DEVICES["H200"])


def _estimate_work(config: TrainConfig, plan: MemoryPlan) -> dict[str, object]:
    """Operations and time of a batch of usual prompts."""
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
    each = sum(parts.values())
    work: dict[str, object] = {
        "tokens_per_prompt": prompt,
        "questions_per_batch": questions,
        "tokens_per_batch": tokens,
        "flops_per_token": parts,
    }
    if plan.device.flops:
        passes = -(-questions // max(plan.tokens // prompt, 1))
        # Weights are read forward and backward, and once more where blocks are computed again.
        reads = 3 if plan.policy == "all" else 2
        whole = plan.fixed["frozen weights"] * plan.shards
        reading = passes * reads * whole / plan.device.bandwidth
        work |= {"passes": passes, "seconds_reading_weights": reading}
        for share in _PEAK_FRACTIONS:
            seconds = max(tokens * each / (share * plan.device.flops), reading)
            work[f"seconds_at_{share:.0%}"] = seconds
            work[f"tokens_per_second_at_{share:.0%}"] = tokens / seconds
    return work


def plan_document(args: PlanArguments) -> dict[str, object]:
    """The plan as JSON-ready data.

    Raises:
        ConfigError: the generator is none of those that have figures.
    """
    from dragkit.memory_plan.choice import alternatives, make_plan
    from dragkit.memory_plan.dims import generator_dims, num_parameters

    config, device = args.config, _device(args)
    dims = generator_dims(config.generator, name=config.generator_model)
    if dims is None:
        raise ConfigError(
            f"generator.model: {config.generator_model} is not a Nemotron-H, and there are no "
            "figures for other models."
        )
    plan = make_plan(config, dims, device, args.ranks)
    instead = [] if plan.fits else list(alternatives(config, dims, device, args.ranks))[:3]
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
        "alternatives": instead,
    }


def format_plan(plan: dict) -> str:
    """The same for a terminal."""
    head = [
        f"plan by dragkit {plan['dragkit']}: predictions, not measurements",
        f"card       {plan['device']}, {plan['device_bytes'] / _GIB:.1f} GiB",
        f"generator  {plan['generator']}: {plan['blocks']} blocks, "
        f"{plan['parameters'] / 1e9:.2f} G parameters",
        f"choice     generator.activation_checkpointing={plan['activation_checkpointing']} "
        f"generator.max_tokens_per_microbatch={plan['max_tokens_per_microbatch']}",
        f"fits       {'yes' if plan['fits'] else 'no'}",
        *([f"weights    shared out to {plan['shards']} ranks"] if plan["shards"] > 1 else []),
        "",
        f"peak memory of a pass of {plan['max_tokens_per_microbatch']:,} tokens, "
        f"{plan['supervised_rows']:,} of them supervised      GiB",
    ]
    together = plan["questions_decoded_at_once"]
    lines = [
        *_sizes(plan["bytes"]),
        "",
        f"{f'memory when validating, {together} questions decoded at once':<66}GiB",
        *_sizes(plan["validation_bytes"]),
    ]
    fit = ", ".join(f"{name} {count:,}" for name, count in plan["tokens_that_fit"].items())
    work = plan["work"]
    flops = work["flops_per_token"]
    lines += ["", f"tokens of a pass that fit, by checkpointing: {fit}", ""]
    lines.append("operations per token, training step                       GFLOP")
    lines += [
        f"  {name:<50}{count / 1e9:>11.2f}"
        for name, count in (*flops.items(), ("all", sum(flops.values())))
    ]
    if plan["peak_flops"]:
        low, high = (f"{share:.0%}" for share in _PEAK_FRACTIONS)
        slow, fast = work[f"seconds_at_{low}"], work[f"seconds_at_{high}"]
        lines += [
            "",
            f"estimate for the generator: {work['questions_per_batch']} prompts of "
            f"{work['tokens_per_prompt']} tokens, passes: {work['passes']}",
            f"  {1e3 * fast:.0f} to {1e3 * slow:.0f} ms, {_rate(work, low)} to "
            f"{_rate(work, high)} tokens/s, at {low} to {high} of "
            f"{plan['peak_flops'] / 1e12:.0f} TFLOP/s",
            f"  at least {1e3 * work['seconds_reading_weights']:.0f} ms of that read the weights",
        ]
    if plan["alternatives"]:
        lines += ["", "does not fit; what would:", *(f"  {x}" for x in plan["alternatives"])]
    return "\n".join([*head, *lines])


def _sizes(parts: dict[str, int]) -> list[str]:
    rows = (*parts.items(), ("all", sum(parts.values())))
    return [f"  {name:<58}{size / _GIB:>9.2f}" for name, size in rows]


def _rate(work: dict, share: str) -> str:
    return f"{work[f'tokens_per_second_at_{share}']:,.0f}"


def _plan(argv: list[str]) -> int:
    args = parse_plan_args(argv)
    setup_console(debug="--debug" in argv)
    found = plan_document(args)
    sys.stdout.write((json.dumps(found, indent=1) if args.json else format_plan(found)) + "\n")
    return 0 if found["fits"] else ConfigError.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return run_main(_plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
