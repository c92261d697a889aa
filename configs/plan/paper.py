"""The paper's hidden-topic recipe at the sizes of its tensors, to plan a run: no data, no weights.

    python -m dit_jax.plan --config configs/plan/paper.py --topology v5e:4x4

`:NAME` picks another released model, e.g. `configs/plan/paper.py:qwen3-32b`. The paper's answers have a median of about
1,070 characters and at most 1,260, some 230 to 280 tokens. With question, code and chat template, the longest fill 320
tokens.
"""

from ml_collections import ConfigDict

from dit_jax.models.modules import PROJECTIONS


def get_config(arg: str | None = None) -> ConfigDict:
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.path = arg or "qwen3-4b"  # a named shape, or a folder with a config.json
    config.model.dtype = "bfloat16"
    config.model.scan_layers = True
    config.model.remat = "full"
    config.model.attention = "xla"

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    # 5,000 diffs: the paper's topics, and diffs with nothing to name.
    counts = {"train_topics": 4660, "test_topics": 100, "train_benign": 200, "test_benign": 40}
    config.data = ConfigDict(counts)

    config.diffs = ConfigDict()
    config.diffs.behaviour = "hidden_topic"
    config.diffs.rank = 1
    config.diffs.projections = PROJECTIONS
    config.diffs.optimizer = "adam"
    config.diffs.learning_rate = 1e-3
    config.diffs.adam_betas = (0.9, 0.999)
    config.diffs.warmup_steps = 0
    config.diffs.final_fraction = 1.0
    config.diffs.steps = 135  # 270 questions, two at a time
    config.diffs.samples_per_step = ConfigDict(
        {"backdoor": 2, "fake_backdoor": 2, "no_backdoor": 2}
    )
    config.diffs.fake_codes = 0
    config.diffs.max_length = 320
    config.diffs.max_target = 288
    config.diffs.diffs_per_batch = 16

    config.train = ConfigDict()
    config.train.rank = 16
    config.train.projections = PROJECTIONS
    config.train.optimizer = "adamw"
    config.train.learning_rate = 1e-4
    config.train.weight_decay = 0.01
    config.train.warmup_steps = 0
    config.train.final_fraction = 1.0
    config.train.steps = 583  # one pass over 4,660 topics
    config.train.batch_size = 8
    config.train.keep_checkpoints = 2
    config.train.max_length = 64
    config.train.max_target = 24

    config.evaluate = ConfigDict()
    config.evaluate.max_new_tokens = 20
    config.evaluate.batch_size = 100
    return config.lock()
