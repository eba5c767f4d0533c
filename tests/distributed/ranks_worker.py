"""Training runs of several ranks for test_ranks.py, one process per rank.

`python ranks_worker.py plan.json` runs the cases of the plan one after the other and writes
`<name>.<rank>.json` for each. The test's own process runs the same cases as one rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from dragkit.config import RunConfig, resolve_config
from dragkit.console import run_main
from dragkit.distributed.ranks import RankError, Ranks
from dragkit.distributed.torchrun import init_ranks
from dragkit.errors import DragkitError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "heuristics_tiny.jsonl"


def execute(case: dict, ranks: Ranks) -> None:
    """Trains with the settings of a case and of this rank."""
    from dragkit.trainer.run import TrainingRun

    values = {
        "run.device": "cpu",
        "run.num_threads": 1,
        "run.log_every_steps": 1,
        "data.heuristics_path": str(FIXTURE),
        "generator.model": "tiny",
        "generator.max_new_tokens": 4,
        "retriever.hidden_dim": 16,
        "retriever.dropout": 0.0,
        "optim.epochs": 2,
        "optim.lr": 1e-4,
    } | case["settings"]
    values |= case.get("rank_settings", {}).get(str(ranks.rank), {})
    config, origins = resolve_config("tiny", None, values)
    phase1, _ = resolve_config("tiny", None, values | {"run.phase": 1})
    TrainingRun(config, origins, phase1, ranks).execute()


def run_case(case: dict, ranks: Ranks) -> dict:
    """Runs one case; returns its exit code, its message and the steps that this rank saved."""
    from dragkit.trainer import loop  # `_silence` starts faster without it

    train_step, save = loop.Trainer.train_step, loop.save_checkpoint
    saves = []
    after = case.get("after", {})  # {"rank": r, "steps": n, "do": what}

    def counted_step(self: object, batches: list) -> list:
        outputs = train_step(self, batches)
        if after.get("rank") == ranks.rank and self.state.step == after["steps"]:
            if after["do"] == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            elif after["do"] == "drift":
                self.parameters[0].data.view(-1)[0] += 1e-3
            else:
                raise ValueError("planted failure")
        return outputs

    def counted_save(*args: object, **options: object) -> Path:
        saves.append(args[1])
        return save(*args, **options)

    loop.Trainer.train_step, loop.save_checkpoint = counted_step, counted_save
    outcome = {"code": 0, "message": "", "saves": saves}
    try:
        execute(case, ranks)
    except RankError:
        raise
    except DragkitError as error:
        outcome |= {"code": error.exit_code, "message": str(error)}
    finally:
        loop.Trainer.train_step, loop.save_checkpoint = train_step, save
    return outcome


def _plan(argv: list[str]) -> int:
    plan = Path(argv[0])
    cases = json.loads(plan.read_text())
    with init_ranks(RunConfig(rank_timeout=60)) as ranks:
        for case in cases:
            outcome = run_case(case, ranks)
            path = plan.with_name(f"{case['name']}.{ranks.rank}.json")
            path.write_text(json.dumps(outcome))
    return 0


def _silence(argv: list[str]) -> int:
    """Rank 1 never answers. Both first wait for each other's file: starting takes longer."""
    folder = Path(argv[1])
    (folder / os.environ["RANK"]).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.05)
    with init_ranks(RunConfig(rank_timeout=3)) as ranks:
        if not ranks.is_main:
            time.sleep(60)
        ranks.progress = "at step 7"
        ranks.barrier()
    return 0


if __name__ == "__main__":
    silent = sys.argv[1] == "--silence"
    raise SystemExit(run_main(_silence if silent else _plan, sys.argv[1:]))
