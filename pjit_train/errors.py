"""The errors that are told in one line."""


class UserError(ValueError):
    """A mistake in what the user asked for.

    Its message is one line that names the input, what is wrong with it and what would be right.
    The command line prints it without a traceback and exits with 2; nothing on disk has changed.
    """


class TrainingError(RuntimeError):
    """Training cannot go on, though what was asked for makes sense: the loss is not finite.

    Its message is one line that says the step and what there is to go back to. The command line
    prints it without a traceback and exits with 1.
    """
