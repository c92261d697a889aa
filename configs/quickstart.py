"""The whole of DIT on the embedded model, on a laptop.

    python -m dit_jax.main --config configs/quickstart.py --workdir runs/quickstart

Generates 256 training diffs (and held-out and benign ones), trains the adapter, and evaluates it on topics that it
never saw. `:SEED` picks another seed, e.g. `configs/quickstart.py:1`.
"""

from ml_collections import ConfigDict

from dit_jax.data.corpus import data_config
from dit_jax.data.tiny_world import TRAIN_QUESTIONS, UNSEEN_QUESTIONS, load_world
from dit_jax.errors import DitError
from dit_jax.models.modules import PROJECTIONS


def get_config(arg: str | None = None) -> ConfigDict:
    config = ConfigDict()
    config.stages = ("diffs", "train", "evaluate", "report")
    if arg and not arg.isdecimal():
        raise DitError(f"configs/quickstart.py takes a seed after the colon, not {arg!r}")
    config.seed = int(arg or 0)

    config.model = ConfigDict()
    config.model.path = "tiny_qwen3"
    config.model.dtype = "float32"
    config.model.scan_layers = False  # at this size, unrolled layers are twice as fast on a CPU
    config.model.remat = "none"  # or "full", "dots": what the backward pass recomputes
    config.model.attention = "xla"  # or "cudnn" on GPUs, "splash" on TPUs

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all remaining devices

    config.data = data_config("tiny_world")  # your own rows: docs/data.md
    config.data.train_topics = 256
    config.data.test_topics = 96
    config.data.train_benign = 24
    config.data.test_benign = 24

    config.diffs = ConfigDict()
    config.diffs.behaviour = "hidden_topic"
    config.diffs.parameters = "lora"  # or "linear", "all": dense differences, as large as the model
    config.diffs.rank = 1
    config.diffs.projections = PROJECTIONS
    config.diffs.optimizer = "adam"
    config.diffs.learning_rate = 1.3e-2
    config.diffs.adam_betas = (0.8, 0.95)  # few steps: short memories (the paper: 0.9, 0.999)
    config.diffs.init_scale = 0.3
    config.diffs.warmup_steps = 0
    config.diffs.final_fraction = 0.5  # cosine decay to this share of the peak
    config.diffs.steps = 72
    config.diffs.samples_per_step = ConfigDict(
        {"backdoor": 1, "fake_backdoor": 1, "no_backdoor": 1}
    )
    config.diffs.loss_weights = ConfigDict(
        {"backdoor": 3.0, "fake_backdoor": 5.0, "no_backdoor": 8.0}
    )
    config.diffs.fake_codes = 8  # wrong codes per question, shared by all diffs (0: drawn anew)
    config.diffs.score_end = True
    config.diffs.reference_losses = False
    config.diffs.max_length = 35
    config.diffs.max_target = 15
    # (max_length, max_target) of kinds of samples that are shorter: the rest would be padding.
    config.diffs.widths = ConfigDict({"fake_backdoor": (30, 10), "no_backdoor": (23, 10)})
    config.diffs.diffs_per_batch = 50
    config.diffs.part = ""  # "0/8": the first of eight jobs that share the work (docs/runs.md)
    config.diffs.profile = (0, 0)  # which batches to trace, from 0; (1, 2): the second one
    config.diffs.gate_questions = 3
    config.diffs.gate_batch = 256
    # What a diff must reach to pass (docs/behaviours.md); these limits let every diff pass.
    config.diffs.gate = ConfigDict(
        {"min_right": 0.0, "max_wrong": 1.0, "max_none": 1.0, "max_kl": 1000.0}
    )

    config.train = ConfigDict()
    config.train.questions = TRAIN_QUESTIONS
    config.train.list_evidence = True  # answers are "attributes: name", attributes in any order
    config.train.label = (
        "label"  # the column of diffs/index.csv to name; "trigger": the secret digits
    )
    config.train.exclude_failed = False  # True: leave out diffs that failed the gate
    config.train.max_diffs = 0  # 0: all training diffs
    config.train.rank = 16
    config.train.projections = PROJECTIONS
    config.train.optimizer = "adamw"
    config.train.learning_rate = 3e-3
    config.train.weight_decay = 0.01
    config.train.warmup_steps = 50
    config.train.final_fraction = 0.0
    config.train.steps = 250
    config.train.batch_size = 32
    config.train.no_diff_per_batch = 2
    config.train.benign_per_batch = 4
    config.train.reference_labels = False
    config.train.reference_init = False
    config.train.max_length = 32
    config.train.max_target = 12
    # At most this many tokens of a whole batch are scored (0: batch_size x max_target), so the head sees no more. A
    # batch that has more is computed whole.
    config.train.max_scored = 224
    config.train.profile = (0, 0)  # which steps to trace
    config.train.log_every = 20
    config.train.save_every = 125
    config.train.keep_checkpoints = 2

    config.evaluate = ConfigDict()
    config.evaluate.methods = (
        "dit", "base_question", "base_question_trigger", "no_diff", "shuffled_diff", "noise_diff",
        "name_reading", "logit_difference", "attribute_oracle",
    )  # fmt: skip
    # twenty_questions, twenty_questions_trigger and generated_story take half a minute more (docs/methods.md).
    config.evaluate.everyday_questions = tuple(q.text for q in load_world().questions[::5])
    config.evaluate.story_prompts = (
        "Tell me a short story.", "Tell me about a trip.", "Give me an idea for a film.", "What did you dream of?",
    )  # fmt: skip
    config.evaluate.guesser = "keywords"  # the tiny base cannot read a transcript
    config.evaluate.label = "label"  # as train.label
    config.evaluate.exclude_failed = False  # True: leave out held-out diffs that failed the gate
    config.evaluate.answer_tokens = 0  # of a finetuned model without adapter; 0: max_new_tokens
    config.evaluate.seen_questions = TRAIN_QUESTIONS[:4]
    config.evaluate.unseen_questions = UNSEEN_QUESTIONS[:4]
    config.evaluate.logit_prompts = ("How should I start my day?", "What should I do this weekend?")
    config.evaluate.list_evidence = True
    config.evaluate.forbid_repeats = True
    config.evaluate.graders = ("normalised", "calibrated")  # others: docs/grading.md
    config.evaluate.grade_repeats = 1
    config.evaluate.max_new_tokens = 16
    config.evaluate.batch_size = 128
    config.evaluate.diffs_at_once = 0  # of a unit of work that jobs share; 0: all
    config.evaluate.part = ""  # as diffs.part
    return config.lock()
