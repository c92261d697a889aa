"""Exact and normalised match: 5 if the answer is the label, 1 if not."""

from collections.abc import Sequence

from dit_jax.data.labels import exact_match
from dit_jax.graders.grades import HIGH, LOW, Grade, Item
from dit_jax.graders.offline import Offline


class Exact(Offline):
    """Character by character, apart from white space at the ends."""

    name = "exact"

    def __call__(self, items: Sequence[Item], repeat: int = 0) -> list[Grade]:
        return [self._grade((item.answer or "").strip() == item.label.strip()) for item in items]

    def _grade(self, same: bool) -> Grade:
        return Grade(HIGH if same else LOW, "match" if same else "no match", self.name)


class Normalised(Exact):
    """After `labels.normalise`: case, punctuation, articles and Unicode forms do not count."""

    name = "normalised"

    def __call__(self, items: Sequence[Item], repeat: int = 0) -> list[Grade]:
        return [self._grade(exact_match(item.answer or "", item.label)) for item in items]
