"""Scenario, simulator, search, cost and report: which GPUs should run what, and whether decoupling the add-ons pays."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("diffplan")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+checkout"
