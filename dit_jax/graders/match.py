"""Graders that compare spelling alone: exact match, normalised match, similarity."""

from collections.abc import Sequence

from rapidfuzz import fuzz

from dit_jax.data.labels import exact_match, normalise
from dit_jax.graders.grades import HIGH, LOW, Grade, Grader, Item, to_scale


class Exact(Grader):
    """5 if the answer is the label, character by character apart from white space at the ends; 1 if not."""

    name = "exact"
    about = "5 if the guess is the label, character by character, else 1"

    def __call__(self, items: Sequence[Item], repeat: int = 0) -> list[Grade]:
        return [
            Grade(HIGH, "match", self.name)
            if self._same(item.answer or "", item.label)
            else Grade(LOW, "no match", self.name)
            for item in items
        ]

    def _same(self, answer: str, label: str) -> bool:
        return answer.strip() == label.strip()


class Normalised(Exact):
    """The same after `labels.normalise`: case, punctuation, articles and Unicode forms do not count."""

    name = "normalised"
    about = "5 if the guess is the label up to case, punctuation and articles, else 1"

    def _same(self, answer: str, label: str) -> bool:
        return exact_match(answer, label)


class Similarity(Grader):
    """Indel similarity of the normalised, sorted words (`fuzz.token_sort_ratio`), stretched over 1–5.

    It knows no meaning: `automobile` scores low for `car`. Its raw value is the similarity in [0, 1].
    """

    name = "similarity"
    about = "offline: spelling, stretched over 1 to 5"

    def __call__(self, items: Sequence[Item], repeat: int = 0) -> list[Grade]:
        texts = [(normalise(item.label), normalise(item.answer or "")) for item in items]
        ratios = [fuzz.token_sort_ratio(*pair) / 100 for pair in texts]
        return [Grade(to_scale(ratio), f"{ratio:.4f}", self.name) for ratio in ratios]
