"""Training: one loop, two phases."""

from dragkit.trainer.loop import Trainer
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.phase2 import JointPhase

PHASES = {1: RetrieverPhase, 2: JointPhase}

__all__ = ["PHASES", "JointPhase", "RetrieverPhase", "Trainer"]
