"""Evaluations as functions, one for each task of `longlora eval`: longlora.eval.passkey(...)."""

from longlora.evaluation.passkey import run as passkey
from longlora.evaluation.tasks import run as tasks
from longlora.evaluation.topics import run as topics

__all__ = ["passkey", "topics", "tasks"]
