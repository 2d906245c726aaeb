"""The ``jaxserve`` command."""

from jaxserve.cli.app import main

__all__ = ["main"]
