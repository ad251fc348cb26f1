"""Data sets on a disk: found, checked once, read. Framework-free."""
