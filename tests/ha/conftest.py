"""One fork server for all failovers and restarts of a pytest process."""

from tests.chaos.conftest import zygote

__all__ = ["zygote"]
