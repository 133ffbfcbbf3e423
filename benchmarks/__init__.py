"""Benchmark commands; nothing here is imported by the packages."""
