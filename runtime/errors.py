"""The exception for mistakes of the user."""


class UserError(ValueError):
    """A mistake of the user. The message says where it is, what was found and what to do about it.

    `runtime.config.run_stage` prints it as one line. Any other exception is a bug and keeps its traceback.
    """
