"""Evaluations as functions, one for each task of `longlora eval`: longlora.eval.passkey(...)."""

from longlora.evaluation.passkey import run as passkey

__all__ = ["passkey"]
