"""Distillation: trains the Forecast heads of a frozen model (docs/algorithm.md §5)."""
