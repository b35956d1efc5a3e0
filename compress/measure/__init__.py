"""What a model costs: weights and work counted, latency measured, energy estimated, accuracy with its uncertainty."""

from __future__ import annotations

from compress.measure.counts import Profile, counted, profile
from compress.measure.estimate import HOROWITZ_45NM, Energy, EnergyTable, energy
from compress.measure.intervals import accuracy, paired, wilson
from compress.measure.timing import CHECKPOINT, RUNTIMES, Latency, available_threads, latency, require_runtime

__all__ = [
    "CHECKPOINT",
    "HOROWITZ_45NM",
    "RUNTIMES",
    "Energy",
    "EnergyTable",
    "Latency",
    "Profile",
    "accuracy",
    "available_threads",
    "counted",
    "energy",
    "latency",
    "paired",
    "profile",
    "require_runtime",
    "wilson",
]
