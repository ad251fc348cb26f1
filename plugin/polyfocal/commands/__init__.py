"""The subcommands of ``polyfocal``, one module each; ``tools/NAME.py`` of a clone calls the same.

A module has ``main(argv)``, which returns the exit status. :mod:`polyfocal.__main__` finds it.
"""
