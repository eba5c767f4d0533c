"""What the generator is shown when: copying, then lists by marker, then questions that grow."""

from __future__ import annotations

from collections.abc import Sequence

from dragkit.tiny.batches import PromptWriter, Row, induction_row
from dragkit.tiny.names import NameSource
from dragkit.tiny.tasks import KINDS, draw_drill, draw_sample, noisy_markers, without_clue

STAGES = ("copy", "drill", "questions")
ROWS = 32
KIND_WEIGHTS = (26, 14, 24, 16, 20)
# A stage ends when its token accuracy passes the first number, or at the second: a step.
COPY_UNTIL = (0.9, 1500)
DRILL_UNTIL = (0.95, 800)
GROW_ABOVE = 0.8
GROW_EVERY = 25
DRILL_FACTS = (3, 8)
QUESTION_FACTS = (3, 12)
MEMORY = 0.93
SEVERAL_SHARE, DRILL_SHARE = 0.15, 0.1
MARKER_RIGHT = 0.93


class Curriculum:
    """Draws training rows and moves on by the accuracy it is told; no clock is involved.

    Args:
        writer: writes the rows.
        names: draws the names, and shares its random generator.
        ids: vocabulary entries for copying.
    """

    def __init__(self, writer: PromptWriter, names: NameSource, ids: Sequence[int]) -> None:
        self.writer, self.names, self.rng, self.ids = writer, names, names.rng, ids
        self.stage = "copy"
        self.num_facts = DRILL_FACTS[0]
        self.accuracy: dict[str, float] = {}
        self._since = 0
        self._drawn = ""

    def draw(self) -> list[Row]:
        """The rows of one step."""
        rng = self.rng
        chance = rng.random()
        self._drawn = self.stage
        if self.stage == "copy":
            return [induction_row(rng, self.ids, 6, 7) for _ in range(ROWS)]
        if self.stage == "drill" or chance < DRILL_SHARE:
            self._drawn = "drill"
            count = rng.randint(2, self.num_facts if self.stage == "drill" else DRILL_FACTS[1])
            return [self.writer.drill(draw_drill(rng, count)) for _ in range(ROWS)]
        if chance < DRILL_SHARE + SEVERAL_SHARE:
            self._drawn = "several"
            return [self._several() for _ in range(ROWS // 2)]
        count = rng.randint(2, self.num_facts)
        return [self._question(count) for _ in range(ROWS)]

    def _kind(self) -> str:
        return self.rng.choices(KINDS, KIND_WEIGHTS)[0]

    def _question(self, num_facts: int) -> Row:
        """One prompt of phase 2; slots hold markers in half of them, else nothing that helps."""
        rng = self.rng
        sample = draw_sample(self._kind(), self.names, rng, num_facts)
        chance = rng.random()
        if chance < 0.55:
            # Where the text gives no clue the markers must be right, or nothing could be learned.
            if rng.random() < 0.2:
                return self.writer.prompt(without_clue(sample, self.names, rng), "marked")
            return self.writer.prompt(sample, "marked", noisy_markers(sample, rng, MARKER_RIGHT))
        slots = "neutral" if chance < 0.68 else "empty" if chance < 0.76 else "none"
        return self.writer.prompt(sample, slots)

    def _several(self) -> Row:
        count = max(2, self.num_facts // 4)
        draws = [draw_sample(self._kind(), self.names, self.rng, count) for _ in range(4)]
        return self.writer.several_questions(draws[: max(2, self.num_facts // count)])

    def observe(self, token_accuracy: float) -> None:
        """Takes the token accuracy on the rows last drawn, and moves on when it suffices."""
        before = self.accuracy.get(self._drawn, 0.0)
        self.accuracy[self._drawn] = MEMORY * before + (1 - MEMORY) * token_accuracy
        self._since += 1
        if self._drawn != self.stage:
            return
        accuracy = self.accuracy[self.stage]
        if self.stage == "copy":
            if accuracy > COPY_UNTIL[0] or self._since >= COPY_UNTIL[1]:
                self._enter("drill", DRILL_FACTS[0])
            return
        most = (DRILL_FACTS if self.stage == "drill" else QUESTION_FACTS)[1]
        if self.num_facts < most:
            if accuracy > GROW_ABOVE and self._since % GROW_EVERY == 0:
                self.num_facts += 1
        elif self.stage == "drill" and accuracy > DRILL_UNTIL[0]:
            self._enter("questions", QUESTION_FACTS[0])
        if self.stage == "drill" and self._since >= DRILL_UNTIL[1]:
            self._enter("questions", QUESTION_FACTS[0])

    def _enter(self, stage: str, num_facts: int) -> None:
        self.stage, self.num_facts, self._since = stage, num_facts, 0
