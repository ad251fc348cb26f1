"""Data sets on a disk: finds them, checks them once, reads them. Framework-free."""
