"""What makes the project's numbers and pictures. It needs the packages of requirements-dev.txt."""

import sys


def name_what_is_missing(kind, error, trace):
    """Print an error that nobody handled as Python does; if a package is missing, one line that says so."""
    if issubclass(kind, ModuleNotFoundError):
        print(f"the package {error.name} is missing: pip install -r requirements-dev.txt", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = name_what_is_missing
