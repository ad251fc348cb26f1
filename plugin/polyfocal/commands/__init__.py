"""The subcommands of ``polyfocal``, a module each: ``tools/NAME.py`` of a clone are the same.

A module has ``main(argv)``, which returns the exit status. :mod:`polyfocal.__main__` finds it.
"""
