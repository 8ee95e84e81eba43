"""Lets a Python that finds this folder on its path start Ray with the launcher of tests/support/warm.py."""

import os
import sys

sys.executable = os.environ.get("BGE_RAY_TESTS_PYTHON", sys.executable)
