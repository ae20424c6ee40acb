"""Tests; `from tests.<folder> import ...` reaches their helpers."""
