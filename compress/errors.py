"""The ways in which a run can end badly, told apart by what the user can do about them."""

from __future__ import annotations


class UserError(ValueError):
    """Something the caller asked for cannot be done; the message says which rule it breaks and the remedy."""


class ConfigError(UserError):
    """A recipe, a setting or an order of stages that does not make sense. Holds all problems found, one a line."""


class DataError(UserError):
    """Images or weights that are absent, truncated, altered or of the wrong kind."""


class CheckpointError(UserError):
    """A checkpoint that is truncated, altered, hostile or not ours."""


class TrainingError(RuntimeError):
    """Training that turned to NaN or infinity; the last good state has been kept."""
