"""Text similarity: the spelling of label and answer compared by rapidfuzz."""

from collections.abc import Sequence

from rapidfuzz import fuzz

from dit_jax.data.labels import normalise
from dit_jax.graders.grades import Grade, Item, to_scale
from dit_jax.graders.offline import Offline


class Similarity(Offline):
    """Indel similarity of the normalised, sorted words (`fuzz.token_sort_ratio`), stretched over 1–5.

    It knows no meaning: `automobile` scores low for `car`. Its raw value is the
    similarity in [0, 1].
    """

    name = "similarity"

    def __call__(self, items: Sequence[Item], repeat: int = 0) -> list[Grade]:
        grades = []
        for item in items:
            label, answer = normalise(item.label), normalise(item.answer or "")
            ratio = fuzz.token_sort_ratio(label, answer) / 100
            grades.append(Grade(to_scale(ratio), f"{ratio:.4f}", self.name))
        return grades
