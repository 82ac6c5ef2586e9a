"""Marks of tests that need a system."""

import sys

import pytest

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, for its /proc or for CUDA")
