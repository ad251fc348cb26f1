"""The exceptions that mean "the input is wrong", as opposed to "the program is wrong"."""


class UserError(ValueError):
    """Bad input: one sentence that names what was given, what was found and what would be right.

    The command-line tools print the sentence as ``error: ...`` and exit with status 2.
    """


class PackageError(UserError, ImportError):
    """A package is missing, or packages do not fit together: one sentence with what to install."""
