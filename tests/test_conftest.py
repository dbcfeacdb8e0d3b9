"""The rules of the test suite itself."""

import os
import subprocess
import sys
from pathlib import Path

SKIPPING = {
    "test_call.py": "import pytest\ndef test_it(): pytest.skip('no hardware')\n",
    "test_mark.py": "import pytest\n@pytest.mark.skip(reason='no hardware')\ndef test_it(): pass\n",
    "test_module.py": "import pytest\npytest.skip('no hardware', allow_module_level=True)\n",
}


def test_a_skip_passes_at_home_and_fails_in_ci(tmp_path: Path) -> None:
    for name, text in SKIPPING.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --continue-on-collection-errors\n")
    for ci, summary in (("", "3 skipped"), ("true", "1 failed, 2 errors")):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "CI": ci}
        command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", str(tmp_path)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert summary in done.stdout
        assert done.returncode == (1 if ci else 0)
        assert ("skipped, which CI forbids" in done.stdout) is bool(ci)
