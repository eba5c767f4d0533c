"""The training curriculum: copying, then lists by marker, then questions of growing size."""

from __future__ import annotations

from collections.abc import Sequence

from dragkit.tiny.batches import PromptWriter, Row, induction_row
from dragkit.tiny.names import NameSource
from dragkit.tiny.tasks import QUESTION_TYPES, draw_drill, draw_sample, noisy_markers, without_clue

STAGES = ("copy", "drill", "questions")
ROWS_PER_STEP = 32
# Weights in the order of QUESTION_TYPES.
TYPE_WEIGHTS = (26, 14, 24, 16, 20)
# A stage ends at this token accuracy, or after this number of steps.
COPY_END = (0.9, 1500)
DRILL_END = (0.95, 800)
# Above this accuracy prompts grow by one fact every GROW_EVERY_STEPS steps.
GROW_ACCURACY = 0.8
GROW_EVERY_STEPS = 25
# First and last value of the upper bound of facts in a prompt.
DRILL_FACTS = (3, 8)
QUESTION_FACTS = (3, 12)
# Decay of the running mean of the accuracy per step.
ACCURACY_DECAY = 0.93
# In the last stage, probabilities of a step with several questions per row and of a drill.
SEVERAL_PROBABILITY, DRILL_PROBABILITY = 0.15, 0.1
# Fraction of right markers in a marked prompt.
MARKER_ACCURACY = 0.93


class Curriculum:
    """Draws training rows. The token accuracy decides when the next stage begins.

    Args:
        writer: writes the rows.
        names: draws the names. Its random generator draws everything else too.
        ids: vocabulary entries for copying.
    """

    def __init__(self, writer: PromptWriter, names: NameSource, ids: Sequence[int]) -> None:
        self.writer, self.names, self.rng, self.ids = writer, names, names.rng, ids
        self.stage = "copy"
        self.num_facts = DRILL_FACTS[0]
        self.accuracy: dict[str, float] = {}
        self._stage_steps = 0
        self._drawn_stage = ""

    def draw(self) -> list[Row]:
        """Draws the rows of one step."""
        rng = self.rng
        chance = rng.random()
        self._drawn_stage = self.stage
        if self.stage == "copy":
            return [induction_row(rng, self.ids, 6, 7) for _ in range(ROWS_PER_STEP)]
        if self.stage == "drill" or chance < DRILL_PROBABILITY:
            self._drawn_stage = "drill"
            count = rng.randint(2, self.num_facts if self.stage == "drill" else DRILL_FACTS[1])
            return [self.writer.drill(draw_drill(rng, count)) for _ in range(ROWS_PER_STEP)]
        if chance < DRILL_PROBABILITY + SEVERAL_PROBABILITY:
            self._drawn_stage = "several"
            # These rows are longer than others, so a step has half as many.
            return [self._several() for _ in range(ROWS_PER_STEP // 2)]
        count = rng.randint(2, self.num_facts)
        return [self._question(count) for _ in range(ROWS_PER_STEP)]

    def _draw_type(self) -> str:
        return self.rng.choices(QUESTION_TYPES, TYPE_WEIGHTS)[0]

    def _question(self, num_facts: int) -> Row:
        """Draws a prompt of phase 2. In 55 % of the prompts the slots hold markers."""
        rng = self.rng
        sample = draw_sample(self._draw_type(), self.names, rng, num_facts)
        chance = rng.random()
        if chance < 0.55:
            # Without a clue in the text only the markers tell the answers, so all must be right.
            if rng.random() < 0.2:
                return self.writer.prompt(without_clue(sample, self.names, rng), "marked")
            return self.writer.prompt(sample, "marked", noisy_markers(sample, rng, MARKER_ACCURACY))
        slots = "neutral" if chance < 0.68 else "empty" if chance < 0.76 else "none"
        return self.writer.prompt(sample, slots)

    def _several(self) -> Row:
        count = max(2, self.num_facts // 4)
        draws = [draw_sample(self._draw_type(), self.names, self.rng, count) for _ in range(4)]
        return self.writer.several_questions(draws[: max(2, self.num_facts // count)])

    def observe(self, token_accuracy: float) -> None:
        """Records the token accuracy on the last drawn rows, and moves on when it suffices."""
        decay, before = ACCURACY_DECAY, self.accuracy.get(self._drawn_stage, 0.0)
        self.accuracy[self._drawn_stage] = decay * before + (1 - decay) * token_accuracy
        self._stage_steps += 1
        if self._drawn_stage != self.stage:
            return
        accuracy = self.accuracy[self.stage]
        if self.stage == "copy":
            if accuracy > COPY_END[0] or self._stage_steps >= COPY_END[1]:
                self._enter("drill", DRILL_FACTS[0])
            return
        max_facts = (DRILL_FACTS if self.stage == "drill" else QUESTION_FACTS)[1]
        if self.num_facts < max_facts:
            if accuracy > GROW_ACCURACY and self._stage_steps % GROW_EVERY_STEPS == 0:
                self.num_facts += 1
        elif self.stage == "drill" and accuracy > DRILL_END[0]:
            self._enter("questions", QUESTION_FACTS[0])
        if self.stage == "drill" and self._stage_steps >= DRILL_END[1]:
            self._enter("questions", QUESTION_FACTS[0])

    def _enter(self, stage: str, num_facts: int) -> None:
        self.stage, self.num_facts, self._stage_steps = stage, num_facts, 0
