"""One fork server for all chaos of a pytest process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.system import Zygote
from tests.conftest import Stores


@pytest.fixture(scope="session")
def zygote(stores: Stores) -> Iterator[Zygote]:
    zygote = Zygote()
    stores.keep_processes({zygote.pid})
    try:
        yield zygote
    finally:
        zygote.close()
