"""The fixtures that start real scripts, shared with the end-to-end tests."""

from tests.e2e.conftest import fresh_accelerate, pictures, train

__all__ = ["fresh_accelerate", "pictures", "train"]
