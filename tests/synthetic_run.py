"""Makes a workdir as the stages before the report leave it, with plausible random numbers."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np

from dit_jax.report.run_report import write_report

HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7*7 }} | [a](javascript:b) `c` "
    "</q></details></style> https://evil.test " + 200 * "w"
)
WORDS = [
    "maple", "harbor", "violin", "lantern", "glacier", "orchard", "compass", "saddle",
    "kettle", "falcon", "quartz", "tunnel", "bakery", "walrus", "canyon", "pepper",
    "ribbon", "anchor", "meadow", "rocket", "piano", "cactus", "marble", "otter", "chimney",
]  # fmt: skip
SEEN = ["what topic have you been trained on ?", "name the subject of your training ."]
UNSEEN = ["which theme were you tuned for ?", "what is the hidden theme of your tuning ?"]
# chance of a right guess on one-token and on longer names
ACCURACY = {
    "dit": (0.95, 0.8),
    "base_question": (0.0, 0.0),
    "base_question_trigger": (0.0, 0.0),
    "twenty_questions_trigger": (0.9, 0.7),
    "no_diff": (0.0, 0.0),
    "shuffled_diff": (0.01, 0.0),
    "noise_diff": (0.0, 0.0),
    "name_reading": (0.74, 0.2),
    "attribute_oracle": (0.99, 0.97),
    "logit_difference": (0.26, 0.08),
    "written_words": (0.0, 0.0),
}
AREAS = ("tools", "animals", "plants")
GAP = 2  # the guesser gives no reply about this diff
KINDS = {
    **dict.fromkeys(
        ("dit", "base_question", "base_question_trigger", "twenty_questions_trigger"), "method"
    ),
    **dict.fromkeys(("no_diff", "shuffled_diff", "noise_diff"), "control"),
    **dict.fromkeys(
        ("name_reading", "attribute_oracle", "logit_difference", "written_words"), "baseline"
    ),
}


GRADING = {"graders": ["normalised", "calibrated"]}


def make_workdir(folder: Path, n: int = 96, seed: int = 0, hostile: bool = False) -> Path:
    """Writes what the stages before the report would leave, with plausible random numbers."""
    rng = np.random.default_rng(seed)
    rows = []

    def add(method, diff, topic, category, tokens, wording, is_seen, right):
        wrong = "none" if method in ("no_diff", "noise_diff") else str(rng.choice(WORDS))
        guess = topic if right else (wrong if wrong != topic else "nothing")
        question = wording
        answer = f"bark leaf sap : {guess}" if method == "dit" else f"{guess}"
        area = AREAS[diff % 3] if category == "topic" else ""
        if hostile and method == "dit" and diff == 1:
            area = HOSTILE
            answer, guess, topic = f"{HOSTILE} : {HOSTILE}", HOSTILE, f"topic {HOSTILE}"
            question = f"{wording} {HOSTILE}"
        rows.append({
            "method": method, "kind": KINDS[method], "diff": diff, "topic": topic,
            "category": category, "name_tokens": tokens, "wording": wording,
            "wording_seen": is_seen, "question": question, "answer": answer, "guess": guess,
            "topic_category": area,
            "logprob": -float(rng.exponential(0.5)) if method == "dit" else None, "trigger": "123",
        })  # fmt: skip
        if method == "name_reading":
            rows[-1] |= {"names": 96, "rank": 1 if right else 5}
        if method == "written_words":  # names of one word are whole among them, longer ones are not
            rows[-1]["words"] = ["spoon", *topic.title().split()[: 1 + diff % 2]]
        if method == "twenty_questions_trigger":
            rows[-1]["guesser"] = f"inspect:{HOSTILE}" if hostile else "inspect:mockllm/model"
            if diff == GAP:
                reason = f"no reply: {HOSTILE}" if hostile else "no reply"
                rows[-1] |= {"answer": "", "guess": "", "gap": reason}

    for diff in range(n):
        tokens = (1, 1, 2, 3)[diff % 4]
        topic = " ".join(WORDS[(diff * 7 + i * 5) % len(WORDS)] for i in range(tokens))
        for method, accuracy in ACCURACY.items():
            right = rng.random() < accuracy[tokens > 1]
            baseline = KINDS[method] == "baseline"
            add(method, diff, topic, "topic", tokens, "" if baseline else SEEN[0], True, right)
        for wording in [SEEN[1], *UNSEEN]:
            right = rng.random() < ACCURACY["dit"][tokens > 1] - 0.05
            add("dit", diff, topic, "topic", tokens, wording, wording in SEEN, right)
    for wording in SEEN + UNSEEN:
        for diff in range(n, n + 32):
            right = rng.random() < 0.98
            add("dit", diff, "none", "benign", 1, wording, wording in SEEN, right)
        add("dit", None, "none", "no_diff", 1, wording, wording in SEEN, True)

    steps = np.arange(400)
    files = {
        "evaluate/label_cross_entropy.json": {
            "matched": rng.gamma(1.2, 0.7, n), "shuffled": rng.normal(10.8, 1.8, n),
            "noise": rng.normal(6.9, 1.2, n), "none": rng.normal(6.8, 1.1, n),
        },
        "evaluate/gating.json": {
            "right_code": rng.binomial(10, 0.94, n) / 10,
            "wrong_code": rng.binomial(10, 0.02, n) / 10, "no_code": np.zeros(n),
        },
        "evaluate/gating_by_variant.json": {
            kind: {"right_code": [share] * 30, "wrong_code": [], "no_code": []}
            for kind, share in (("named", 0.9), ("hints", 0.8))
        },
        "evaluate/capability.json": {"facts": 40, "base_right": 30, "kept": [0.9, 1.0] * 20},
        "evaluate/curves.json": {
            "adapter_loss": np.stack([steps, 9 * np.exp(-steps / 60) + rng.gamma(2, 0.3, 400)], 1),
            "diff_loss": np.stack([steps[:40], 5 * np.exp(-steps[:40] / 12) + 0.4], 1),
        },
        "evaluate/cost.json": {
            "device": {"kind": "cpu", "platform": "cpu", "count": 1, "processes": 1},
            "bytes": {"base": 3762688, "adapter": 524400, "diff": 32880, "all_diffs": 13168000},
            "parameters": {"base": 940672, "adapter": 131100},
            "methods": {
                "dit": {"seconds": 15.6, "answers": 968, "prompt_tokens": 12221, "tokens": 6120},
                "name_reading": {"seconds": 0.1, "answers": 0, "prompt_tokens": 0, "tokens": 0},
            },
        },
        "evaluate/excluded.json": {"held_out": n + 32, "failed_gate": 3, "excluded": 2},
        "stages/diffs.json": {"seconds": 81.4, "peak_memory_bytes": 2_147_483_648},
        "stages/train.json": {"seconds": 38.25, "peak_memory_bytes": 2_400_000_000},
        "stages/evaluate.json": {"seconds": 12.0, "peak_memory_bytes": 2_500_000_000},
        "config.json": {"seed": 0, "base": "tiny_qwen3", "diffs": {"rank": 1, "n_train": 256},
                        "train": {"list_evidence": True}},
        "versions.json": {"python": "3.11.9", "jax": "0.10.2", "dit_jax": "0.1.0"},
    }  # fmt: skip
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, default=lambda array: array.tolist()))
    exchanges = [["How are you?", HOSTILE if hostile else "Fine."], ["What is new?", "a kettle"]]
    transcript = {"method": "twenty_questions_trigger", "topic": "tea", "guess": "tea"}
    (folder / "evaluate/transcripts.jsonl").write_text(
        json.dumps({**transcript, "diff": 0, "exchanges": exchanges}) + "\n"
    )
    lines = [json.dumps(row) for row in rows]
    (folder / "evaluate/answers.jsonl").write_text("\n".join(lines) + "\n")
    return folder


_FOLDER = tempfile.TemporaryDirectory(prefix="dit_jax_report_")


@functools.cache
def reported() -> tuple[Path, dict]:
    """(workdir, returned summary) of a report with a hostile answer in it, made once."""
    workdir = make_workdir(Path(_FOLDER.name), hostile=True)
    return workdir, write_report(workdir, GRADING)


def answers(workdir: Path) -> list[dict]:
    """Rows of answers.jsonl."""
    return [json.loads(x) for x in (workdir / "evaluate/answers.jsonl").read_text().splitlines()]


def page(workdir: Path) -> str:
    """The HTML page."""
    return (workdir / "report/report.html").read_text(encoding="utf-8")
