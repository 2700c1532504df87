"""What a user did wrong."""


class UserError(ValueError):
    """A mistake of the user's: the message says where, what was found and what to do about it.

    `config.run_stage` prints it as one line. Any other exception is a bug and keeps its traceback.
    """
