"""The app: base, diff and adapter in a browser (docs/serving.md)."""
