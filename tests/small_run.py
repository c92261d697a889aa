"""A run of the quickstart's config that takes seconds. Tests that use it share its compiled programs."""

SMALL = (
    "--config.model.scan_layers=True",  # compiles in half the time
    "--config.mesh.data=1",  # test_multiprocess.py runs it sharded
    "--config.data.train_topics=10",
    "--config.data.test_topics=4",
    "--config.data.train_benign=2",
    "--config.data.test_benign=2",
    "--config.diffs.diffs_per_batch=12",
    "--config.diffs.steps=3",
    "--config.diffs.gate_questions=1",
    "--config.diffs.gate_batch=36",
    "--config.train.steps=12",
    "--config.train.batch_size=8",
    "--config.train.save_every=4",
    "--config.evaluate.batch_size=16",
)


def flags(workdir, *extra):
    """The command line of such a run; `extra` comes last and so overrides."""
    return ["--config", "configs/quickstart.py", "--workdir", str(workdir), *SMALL, *extra]
