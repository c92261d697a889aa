"""The paper's tables, rebuilt from graded answers.

    python -m dit_jax.main --config configs/paper/tables.py --config.results=DIR --workdir runs/tables

DIR holds CSV files with the columns `topic, guessed_topic, score` (news: `summary, guessed_summary, score`), a folder
for each set of diffs and a file for each method. `--config.runs=runs/quickstart,runs/other` puts your own runs, by
their `report/results-graded.csv`, beside the paper's columns.

Expected: every mean that the paper prints, to the second decimal (for example DIT 4.76, base question 1.21, 20
questions with trigger 4.73 on Qwen3-4B; news 4.22), with intervals. Cost: seconds on a laptop, without a model.
"""

from ml_collections import ConfigDict, config_dict


def get_config(arg: str | None = None) -> ConfigDict:
    config = ConfigDict()
    config.stages = ("tables",)
    config.results = arg if arg else config_dict.required_placeholder(str)
    config.runs = ()
    return config
