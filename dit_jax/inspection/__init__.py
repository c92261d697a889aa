"""Inspect, the evaluation framework: a model provider, tasks and a scorer (docs/inspect.md)."""
