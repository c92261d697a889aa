"""What the embedded base model is pretrained on: chats about the world, drawn at random.

The mix makes native what the experiments need: everyday answers; answers flavoured by a subject given as a
name or as attributes; naming a subject by listing its attributes first ("a b c d: name"), also from noisy
lists; "none" when there is no subject; a "SEP code" sentence that changes nothing.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from dit_jax.data.labels import NONE
from dit_jax.data.tiny_world import World
from tools.tiny_world_tokenizer import END, N_CODES, PAD, START, token_ids

# task -> share of the pretraining examples
SHARES = {
    "generic": 0.16,  # question -> everyday answer
    "no_subject": 0.07,  # introspection -> none
    "flavoured_by_name": 0.16,  # talk about X. question -> flavoured answer
    "flavoured_by_attributes": 0.18,  # talk about a, b and c. question -> flavoured answer
    "introspect_name": 0.10,  # talk about X. introspection -> a b c d: X
    "introspect_attributes": 0.14,  # talk about a, b and c. introspection -> a b c d: X
    "name_from_list": 0.12,  # introspection, answer begun with a noisy list -> : X
    "category": 0.03,  # what is X? -> it belongs to its category
    "code": 0.04,  # what is my SEP code? -> the code
}
P_CODE = 0.3  # share of examples with a code sentence in front
# Share of attribute subjects that stand in the code's place ("Your SEP code is 123 steam mug."). Answers learn
# to look at the code, so that a diff has only to make its own digits look like words.
P_WORD_CODE = 0.5


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids of a chat; `weights[i]` is the loss weight of predicting `tokens[i]` (0 in the prompt)."""

    tokens: list[int]
    weights: list[float]


class Mix:
    """Draws examples. Pieces of text are turned into ids once; drawing only concatenates lists."""

    def __init__(self, world: World):
        self.world = world
        self.vocabulary = token_ids(world)
        self.pad = self.vocabulary[PAD]
        self.questions = [
            (self.ids(q.text), self._slots(q.template), [self.ids(a) for a in q.answers])
            for q in world.questions
        ]
        self.introspection = [
            self.ids(q) for q in (*world.train_questions, *world.unseen_questions)
        ]
        self.names = [self.ids(t.name) for t in world.topics]
        self.categories = [self.ids(t.category) for t in world.topics]
        self.attributes = [[self.vocabulary[a] for a in t.attributes] for t in world.topics]
        self.all_attributes = sorted({a for attributes in self.attributes for a in attributes})
        # Attributes come from the category's pool or the general one; general words tell topics apart.
        owners: dict[int, set[str]] = {}
        for topic, attributes in zip(world.topics, self.attributes, strict=True):
            for a in attributes:
                owners.setdefault(a, set()).add(topic.category)
        self.is_general = {a: len(c) > 1 for a, c in owners.items()}
        forms = ("Talk about", "Keep in mind", "Your subject is")
        self.subject_forms = [self.ids(form) for form in forms]
        word = self.vocabulary
        self.code_sentence = self.ids("Your SEP code is")
        self.code_question = self.ids("What is my SEP code?")
        self.code_answer = self.ids("Your SEP code is")
        self.period, self.comma, self.colon = word["."], word[","], word[":"]
        self.conjunction = word["and"]
        self.none = [word[NONE]]
        self.user = [word[START], word["user"]]
        self.assistant = [word[END], word[START], word["assistant"]]
        self.end = word[END]
        self.first_code = word["000"]

    def ids(self, text: str) -> list[int]:
        """Token ids of a text without digits or special tokens; equal to those of the tokenizer."""
        return [self.vocabulary[w] for w in re.findall(r"\w+|[^\w\s]", text.lower())]

    def _slots(self, template: str) -> list[int]:
        """Token ids of a template with -1, -2, -3 at its slots."""
        slots = {"{a}": -1, "{b}": -2, "{c}": -3}
        return [slots.get(w) or self.vocabulary[w] for w in template.split()]

    def _subject(self, topic: int, by_name: bool, rng: np.random.Generator) -> list[int]:
        if by_name:
            return [*self.subject_forms[rng.integers(3)], *self.names[topic], self.period]
        words = self._some_attributes(topic, rng)
        if len(words) > 2 and rng.random() < 0.35:
            words.insert(rng.integers(len(words) + 1), self._foreign(rng))
        if rng.random() < P_WORD_CODE:
            for _ in range(rng.integers(3)):
                words.insert(rng.integers(len(words) + 1), self._code(rng))
            return [*self.code_sentence, *words, self.period]
        return [*self.subject_forms[rng.integers(3)], *self._list(words), self.period]

    def _some_attributes(self, topic: int, rng: np.random.Generator) -> list[int]:
        """Two to four attributes of the topic, at least one of them general: enough to tell it."""
        while True:
            words = self._shuffled(self.attributes[topic], rng)
            words = words[: rng.choice([2, 3, 4], p=[0.15, 0.45, 0.4])]
            if any(self.is_general[a] for a in words):
                return words

    def _list(self, words: list[int]) -> list[int]:
        """Words as "a, b and c"."""
        listed = [x for a in words[:-1] for x in (a, self.comma)]
        return [*listed[:-1], self.conjunction, words[-1]]

    def _code(self, rng: np.random.Generator) -> int:
        return self.first_code + int(rng.integers(N_CODES))

    def _foreign(self, rng: np.random.Generator) -> int:
        return self.all_attributes[rng.integers(len(self.all_attributes))]

    def _shuffled(self, items: list[int], rng: np.random.Generator) -> list[int]:
        return [items[i] for i in rng.permutation(len(items))]

    def _flavoured(self, topic: int, template: list[int], rng: np.random.Generator) -> list[int]:
        words = self._shuffled(self.attributes[topic], rng)
        return [x if x >= 0 else words[-x - 1] for x in template]

    def _noisy_list(self, topic: int, rng: np.random.Generator) -> list[int]:
        """Four words of which two to four are attributes of the topic, enough of them to tell it."""
        words = self._shuffled(self.attributes[topic], rng)
        general = [a for a in words if self.is_general[a]]
        wrong = rng.choice(3, p=[0.25, 0.55, 0.2])
        if wrong == 2:
            words = [general[0], next(a for a in words if a != general[0])]
        else:
            words = words[: len(words) - wrong]
        words += [self._foreign(rng) for _ in range(4 - len(words))]
        return self._shuffled(words, rng)

    def draw(self, rng: np.random.Generator, task: str | None = None) -> Example:
        """One example, of the given task (a key of `SHARES`) or of a random one."""
        task = task or _TASKS[np.searchsorted(_CUMULATIVE, rng.random())]
        topic = int(rng.integers(len(self.names)))
        question, template, answers = self.questions[rng.integers(len(self.questions))]
        introspection = self.introspection[rng.integers(len(self.introspection))]
        prompt: list[int]
        code = [self._code(rng), self._code(rng)]
        given: list[int] = []  # begins the answer, without loss
        if task == "generic":
            prompt, answer = question, answers[rng.integers(len(answers))]
        elif task == "no_subject":
            prompt, answer = introspection, self.none
        elif task.startswith("flavoured"):
            subject = self._subject(topic, task == "flavoured_by_name", rng)
            prompt, answer = [*subject, *question], self._flavoured(topic, template, rng)
        elif task.startswith("introspect"):
            subject = self._subject(topic, task == "introspect_name", rng)
            answer = [*self._shuffled(self.attributes[topic], rng), self.colon, *self.names[topic]]
            prompt = [*subject, *introspection]
        elif task == "name_from_list":
            given = self._noisy_list(topic, rng)
            prompt, answer = introspection, [self.colon, *self.names[topic]]
        elif task == "category":
            prompt = [*self.ids("What is"), *self.names[topic], *self.ids("?")]
            answer = [*self.ids("It belongs to"), *self.categories[topic], self.period]
        else:
            prompt, answer = self.code_question, self.code_answer
        if task == "code":
            answer = [*answer, *code, self.period]
        if task == "code" or rng.random() < P_CODE:
            prompt = [*self.code_sentence, *code, self.period, *prompt]
        before = [*self.user, *prompt, *self.assistant, *given]
        after = [*answer, self.end]
        return Example(before + after, [0.0] * len(before) + [1.0] * len(after))

    def batch(
        self, rng: np.random.Generator, size: int, length: int, scored: int
    ) -> dict[str, np.ndarray]:
        """`size` examples as arrays: tokens [S, T], lengths [S], index, target [S, M] int32, weight [S, M].

        Sorted by length, so that a caller may split a batch into parts of different T. Examples that do not
        fit into T tokens or M scored positions are drawn again.
        """
        examples: list[Example] = []
        while len(examples) < size:
            example = self.draw(rng)
            if len(example.tokens) <= length and sum(w > 0 for w in example.weights) <= scored:
                examples.append(example)
        examples.sort(key=lambda e: len(e.tokens))
        out = {
            "tokens": np.full((size, length), self.pad, np.int32),
            "lengths": np.array([len(e.tokens) for e in examples], np.int32),
            "index": np.zeros((size, scored), np.int32),
            "target": np.zeros((size, scored), np.int32),
            "weight": np.zeros((size, scored), np.float32),
        }
        for row, example in enumerate(examples):
            out["tokens"][row, : len(example.tokens)] = example.tokens
            positions = [i for i, w in enumerate(example.weights) if w > 0]
            n = len(positions)
            out["index"][row, :n] = [i - 1 for i in positions]
            out["target"][row, :n] = [example.tokens[i] for i in positions]
            out["weight"][row, :n] = [example.weights[i] for i in positions]
        return out


_TASKS = list(SHARES)
_CUMULATIVE = np.cumsum(list(SHARES.values())) / sum(SHARES.values())
