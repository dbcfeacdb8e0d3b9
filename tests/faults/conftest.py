"""What the tests of the faulty module share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest
from conftest import SoftToken

from faults import FaultyModule
from faults.behind import Behind, make_keys


@pytest.fixture
def modules(
    new_token: Callable[[], SoftToken], faulty_shared_object: Path, softhsm_module: str, tmp_path: Path
) -> Iterator[Behind]:
    """As many modules before one token as wanted, none of them loaded yet."""
    token = new_token()  # not another test's: in a process a PIN that was rejected stays rejected
    make_keys(token)

    def make() -> Iterator[Behind]:
        while True:
            directory = Path(mkdtemp(dir=tmp_path))
            yield Behind(token, FaultyModule(faulty_shared_object, Path(softhsm_module), directory))

    return make()
