"""Pretrains the embedded base model, dit_jax/assets/tiny_qwen3, from scratch.

    python -m dit_jax.main --config configs/tiny_world_base.py --workdir runs/tiny_world_base

Writes WORKDIR/base in Hugging Face format. docs/tiny_world.md has the expected loss curve and times.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    config = ConfigDict()
    config.stages = ("tools.pretrain:STAGE",)
    config.seed = int(arg or 0)

    config.model = ConfigDict()
    config.model.hidden_size = 128
    config.model.num_hidden_layers = 4
    config.model.intermediate_size = 256
    config.model.num_attention_heads = 4
    config.model.num_key_value_heads = 2
    config.model.head_dim = 32
    config.model.rope_theta = 1e4
    config.model.scan_layers = False  # at this size, unrolled layers are twice as fast on a CPU

    config.pretrain = ConfigDict()
    config.pretrain.world_seed = 0
    config.pretrain.steps = 800
    config.pretrain.batch_size = 192
    config.pretrain.parts = 3  # of a batch, split by length: less padding
    config.pretrain.kernel_learning_rate = 0.02  # Muon
    config.pretrain.learning_rate = 4e-3  # Adam, for embeddings and norms
    config.pretrain.warmup_steps = 30
    config.pretrain.weight_decay = 0.05
    config.pretrain.log_every = 25
    return config
