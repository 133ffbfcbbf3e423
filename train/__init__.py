"""Distillation: trains the Forecast heads of a frozen model (specification §5)."""
