"""The rules of the test suite itself."""

import os
import re
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
        path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
        environment = os.environ | {"PYTHONPATH": path, "CI": ci}
        command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", str(tmp_path)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert summary in done.stdout
        assert done.returncode == (1 if ci else 0)
        assert ("skipped, which CI forbids" in done.stdout) is bool(ci)


HEAD = """import logging, os, pty, subprocess, sys
import leaks
PIN, JWS = leaks.pin(), "eyJhbGciOiJFUzI1NiJ9.e30.c2lnbmVk"

"""
LEAKS = {
    "a PIN that is printed": "print(f'rejected: {PIN}')",
    "a PIN in a log below what is shown": "logging.getLogger('a').debug(PIN)",
    "an assertion that is cut off": "print(JWS[:14])",
    "the signature of an assertion": "print('s' * 86)",
    "an access token in a log": "logging.getLogger('a').info('granted access-token-1')",
    "on stderr of a process": "subprocess.run([sys.executable, '-c', f'import sys; sys.exit({JWS!r})'], stderr=-1)",
    "on stdout of a process": "subprocess.check_output(['echo', PIN], text=True)",
    "in pieces": "subprocess.run(['sh', '-c', f'printf {PIN[:8]}; sleep 0.1; printf {PIN[8:]}'], stdout=-1, stderr=-1)",
    "line by line": (
        "with subprocess.Popen(['echo', PIN], stdout=-1, text=True) as process:\n"
        "        process.stdout.readline()"
    ),
    "without a pipe": "subprocess.run(['echo', PIN])",
    "on stderr where stdout may": "subprocess.run(['sh', '-c', f'echo {JWS} >&2 # hsm-token fetch'], stderr=-1)",
    "a PIN where an access token may": "subprocess.run(['sh', '-c', f'echo {PIN} # hsm-token fetch'], stdout=-1)",
    "at a terminal": (
        "child, terminal = pty.fork()\n"
        "    if child == 0: os.execvp('echo', ['echo', PIN])\n"
        "    os.read(terminal, 99); os.waitpid(child, 0)"
    ),
}
HARMLESS = {
    "what is the result": "subprocess.run(['sh', '-c', f'echo {JWS} # hsm-token fetch'], stdout=-1)",
    "what is asked, not shown": "subprocess.run(['cat', '/dev/null'], stdout=-1, env={'PIN': PIN})",
    "what looks alike": "print('access token eyJ', 's' * 85, PIN[:8], 'base64+' + 's' * 86 + '/')",
}


def test_a_test_that_shows_a_secret_fails(tmp_path: Path) -> None:
    cases = [*LEAKS.values(), *HARMLESS.values()]
    tests = [f"def test_{number}():\n    {body}\n" for number, body in enumerate(cases)]
    (tmp_path / "test_leaks.py").write_text(HEAD + "\n".join(tests))
    (tmp_path / "pytest.ini").write_text("[pytest]\nlog_level = DEBUG\n")
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent}"}
    quiet = ["-p", "no:cacheprovider", "--show-capture=no"]
    command = [sys.executable, "-m", "pytest", "-p", "conftest", *quiet, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    failed = {int(number) for number in re.findall(r"^ERROR .*::test_(\d+) - a secret w", done.stdout, re.M)}
    assert {list(LEAKS | HARMLESS)[number] for number in failed} == set(LEAKS)
    assert f"{len(cases)} passed, {len(LEAKS)} errors" in done.stdout
