"""The one error that a user of data/ can meet."""


class DataError(ValueError):
    """Something that the user can put right: a wrong path, argument or file. Its message is one line that names it."""
