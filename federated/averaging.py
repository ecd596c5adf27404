"""Means over clients, and random numbers that are functions of what they are for."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]


def average(like: Arrays, states: Sequence[Arrays], weights: Sequence[float]) -> Arrays:
    """The weighted mean of floating-point arrays, in float64 and in the order given; the maximum of all others.

    Args:
        like: What the result's names and types are taken from.
        states: Arrays [K] of these names.
        weights: Their weights [K], at least 0 and not all 0.
    """
    total = math.fsum(weights)
    found: Arrays = {}
    for name, before in like.items():
        if floating(before):
            mean = np.zeros(before.shape)
            for state, weight in zip(states, weights, strict=True):
                mean += (weight / total) * state[name].astype(np.float64)
            found[name] = mean.astype(before.dtype)
        else:
            highest = np.max(np.stack([state[name] for state in states]), axis=0)
            found[name] = np.asarray(highest, dtype=before.dtype)
    return found


def digest(*words: object) -> bytes:
    """32 bytes that are a function of some words, for what must be random and repeatable.

    Args:
        words: The words.
    """
    return hashlib.sha256("\n".join(map(str, words)).encode()).digest()


def floating(array: npt.NDArray[Any]) -> bool:
    """Whether an array holds floating-point numbers.

    Args:
        array: Any array.
    """
    return bool(np.issubdtype(array.dtype, np.floating))
