"""Errors a user can mend. Each message is one sentence: what is wrong, where, how to mend it."""


class LongspanError(Exception):
    """A condition the user can mend; shown without a traceback."""


class ConfigError(LongspanError):
    """The configuration is unknown, mistyped, contradictory or impossible."""


class CheckpointError(LongspanError):
    """A saved or downloaded state is missing, damaged or belongs to something else."""


class DataError(LongspanError):
    """Training or evaluation text is missing, empty or malformed."""
