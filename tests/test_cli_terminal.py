"""The standard streams and the terminal: where each word goes, and what happens where a stream fails."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import office as offices
import pytest
from endpoint import GRANT, Endpoint, Reply
from screen import shown_at_last

SLOW = 1.2  # seconds of an answer: long enough for a spinner
ACCESS_TOKEN = GRANT["access_token"]


@pytest.fixture
def scratch(office, tmp_path):
    return offices.found(tmp_path, office.token, **{"token-endpoint": office.profile["token-endpoint"]})


@pytest.fixture
def slow(scratch):
    """An office whose server takes its time."""

    def answer(_):
        time.sleep(SLOW)
        return Reply()

    with Endpoint(None, answer) as server:
        yield scratch.configure(**{"token-endpoint": server.url, "scope": None})


def with_terminal(office, *arguments, answers=(), environment=None):
    """Run with a terminal for stdin and stderr and a pipe for stdout: ``(stdout, screen, status)``."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        office.command(*arguments),
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=slave,
        env=office.environment | {"HSM_TOKEN_CONFIG": str(office.config)} | (environment or {}),
        start_new_session=True,
    )
    os.close(slave)
    screen, waiting = "", list(answers)
    while True:
        try:
            screen += os.read(master, 4096).decode()
        except OSError:  # EIO: the command has ended
            break
        if waiting and waiting[0][0] in screen:
            _, pause, text = waiting.pop(0)
            time.sleep(pause)
            os.write(master, f"{text}\n".encode())
    stdout = process.communicate(timeout=30)[0].decode()
    os.close(master)
    return stdout, screen, process.returncode


def test_an_access_token_goes_to_stdout_also_after_a_spinner(slow):
    stdout, screen, status = with_terminal(slow, "fetch", "--no-cache")
    assert (stdout, status) == (f"{ACCESS_TOKEN}\n", 0)
    assert "asking the authorization server" in screen
    assert shown_at_last(screen) == ""


def test_a_server_that_is_down_is_one_line_and_meanwhile_the_spinner_tells(scratch):
    scratch.configure(**{"token-endpoint": "http://127.0.0.1:1/token", "deadline": 4})
    stdout, screen, status = with_terminal(scratch, "fetch", "--no-cache")
    assert (stdout, status) == ("", 7)
    assert re.search(r"[|/\\-] http://127.0.0.1:1: .*refused.*; again in \d\.\d", screen), screen
    [line] = shown_at_last(screen).splitlines()
    assert re.fullmatch(r"hsm-token: error: tried \d times in \d s: http://127.0.0.1:1: .*refused.*", line)
    assert line.count("127.0.0.1") == 1


def test_causes_of_a_refusal_are_lines_with_the_likeliest_first(scratch):
    with Endpoint(None, Reply(401, {"error": "invalid_client"})) as server:
        done = scratch.configure(**{"token-endpoint": server.url}).run("fetch", "--no-cache")
    assert done.status == 6
    kinds = [line.split(" ")[:2] for line in done.lines]
    assert kinds == [["error:", "the"], *(["hint:", f"{n}."] for n in range(1, 5)), ["hint:", "ruled"]]
    assert server.url in done.lines[2] and "das-api-auth" in done.lines[3]


@pytest.mark.parametrize("options", [("--quiet",), ("--pin-source", "env:TYPED")])
def test_no_spinner_is_shown_where_it_is_not_wanted_or_nobody_looks(slow, options):
    if options == ("--quiet",):
        stdout, screen, _ = with_terminal(slow, "fetch", "--no-cache", *options)
    else:
        done = slow.run("fetch", "--no-cache", *options, environment={"TYPED": slow.token.pin})
        stdout, screen = done.stdout, done.stderr
    assert (stdout, screen) == (f"{ACCESS_TOKEN}\n", "")


def test_the_spinner_leaves_the_question_for_the_pin_on_the_screen(slow):
    typed = ("PIN", 1.0, slow.token.pin)
    stdout, screen, status = with_terminal(slow, "fetch", "--pin-source", "prompt", answers=[typed])
    assert (stdout, status) == (f"{ACCESS_TOKEN}\n", 0)
    asked, _, later = screen.partition(": \r\n")
    assert shown_at_last(asked).startswith(slow.token.uri), screen  # a spinner before it has gone
    assert "asking the authorization server" in later


def test_a_result_may_be_printed_while_something_is_worked_on():
    program = (
        "import sys, time\nfrom hsm_signer.cli import terminal\n"
        "with terminal.working('thinking'):\n    time.sleep(0.8)\n"
        "    terminal.result('the result')\n    terminal.note('a word')\n    time.sleep(0.3)\n"
    )
    master, slave = pty.openpty()
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, text=True) as process:
        stdout, _ = process.communicate(timeout=30)
    os.close(slave)
    screen = os.read(master, 65536).decode()
    os.close(master)
    assert stdout == "the result\n"
    assert "thinking" in screen
    assert shown_at_last(screen) == "hsm-token: a word\n"


def test_quiet_keeps_warnings_back(scratch):
    ending = ["cert", "self-signed", "--days", "5", "--out", str(scratch.home / "ending.pem")]
    assert scratch.run(*ending).status == 0
    scratch.configure(certificate="ending.pem")
    assert "warning" in scratch.run("fetch", "--no-cache").stderr
    assert scratch.run("fetch", "--no-cache", "-q").stderr == ""


def on_a_terminal(office, *arguments, **environment):
    """What a command writes on a terminal that is its stdout."""
    master, slave = pty.openpty()
    command = office.command(*arguments)
    environment = office.environment | {"HSM_TOKEN_CONFIG": str(office.config), "TERM": "xterm"} | environment
    process = subprocess.Popen(command, stdout=slave, stderr=subprocess.PIPE, env=environment)
    os.close(slave)
    screen = b""
    while True:
        try:
            screen += os.read(master, 4096)
        except OSError:
            break
    os.close(master)
    process.communicate(timeout=30)
    return screen.decode()


def test_a_terminal_gets_colours_unless_no_color_is_set(office):
    assert "\x1b[32m" in on_a_terminal(office, "doctor", "--offline")
    plain = on_a_terminal(office, "doctor", "--offline", NO_COLOR="1")
    assert "ok" in plain
    assert "\x1b[3" not in plain


def closed(office, descriptors, *arguments, environment=None):
    """Run with these standard descriptors closed: ``(status, what was written to the others)``."""
    redirections = " ".join(f"{each}{'<' if each == 0 else '>'}&-" for each in descriptors)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirections}', "sh", *office.command(*arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env=office.environment | {"HSM_TOKEN_CONFIG": str(office.config)} | (environment or {}),
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("descriptors", [(0,), (2,), (0, 2)])
def test_fetch_works_with_closed_descriptors(office, descriptors):
    status, stdout, stderr = closed(office, descriptors, "fetch", "--no-cache")
    assert (status, stdout.count("\n"), stdout.count("."), stderr) == (0, 1, 2, "")
    assert closed(office, descriptors, "doctor", "--offline")[0] == 0


def test_an_error_does_not_go_to_stdout_where_stderr_is_closed(office):
    assert closed(office, (2,), "fetch", "--lifetime", "x") == (2, "", "")
    assert closed(office, (0, 2), "fetch", "--no-such-option") == (2, "", "")


def test_no_file_of_ours_gets_the_number_of_a_closed_descriptor(scratch):
    source = f"command:sh -c 'ls -l /proc/$PPID/fd >{scratch.home}/fds; cat {scratch.home}/pin'"
    closed(scratch, (0, 1, 2), "key", "list", "--pin-source", source)
    listed = (scratch.home / "fds").read_text().splitlines()
    found = {line.split()[-3]: line.split()[-1] for line in listed if "->" in line}
    assert [found[number] for number in "012"] == ["/dev/null"] * 3


@pytest.mark.parametrize(
    "arguments",
    [("config", "presets"), ("--help",), ("doctor", "--offline"), ("--show-completion", "bash")],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
class TestStdoutThatCannotBeWritten:
    def run(self, office, arguments, unbuffered, stdout):
        environment = office.environment | {"HSM_TOKEN_CONFIG": str(office.config)}
        done = subprocess.run(
            office.command(*arguments),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=environment
            | {"PYTHONUNBUFFERED": unbuffered, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        )
        return done.returncode, done.stderr.splitlines()

    def test_a_closed_pipe_is_quiet(self, office, arguments, unbuffered):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "wb") as stdout:
            assert self.run(office, arguments, unbuffered, stdout) == (141, [])

    def test_a_full_disk_is_an_error(self, office, arguments, unbuffered):
        with Path("/dev/full").open("wb") as stdout:
            status, lines = self.run(office, arguments, unbuffered, stdout)
        assert (status, lines) == (
            2,
            ["hsm-token: error: cannot write to stdout: No space left on device"],
        )


def test_a_closed_stdout_is_an_error(office):
    status, _, stderr = closed(office, (1,), "config", "presets")
    assert (status, stderr) == (2, "hsm-token: error: cannot write to stdout: Bad file descriptor\n")


def test_a_closed_pipe_for_stderr_leaves_the_exit_status_as_it_is(office):
    reading, writing = os.pipe()
    os.close(reading)
    for arguments, status in ((("fetch", "--lifetime", "x"), 2), (("fetch", "-vv", "--no-cache"), 0)):
        with os.fdopen(os.dup(writing), "wb") as stderr:
            environment = office.environment | {"HSM_TOKEN_CONFIG": str(office.config)}
            command = office.command(*arguments)
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, env=environment, timeout=60)
        assert done.returncode == status
    os.close(writing)


@pytest.mark.parametrize("stdin", [b"\xff\xfe\xff", b"", b"x" * 20000])
def test_what_is_no_assertion_on_stdin_is_said_so(office, stdin):
    done = subprocess.run(
        office.command("exchange"),
        input=stdin,
        capture_output=True,
        env=office.environment | {"HSM_TOKEN_CONFIG": str(office.config), "PYTHONIOENCODING": "utf-8:strict"},
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.count(b"error: ") == 1


def complete(office, shell, **environment):
    """What a shell's completion gets from us."""
    done = subprocess.run(
        office.command(),
        capture_output=True,
        text=True,
        timeout=60,
        env=office.environment | environment | {"_HSM_TOKEN_COMPLETE": f"complete_{shell}"},
    )
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_are_completed(office, shell):
    words = {
        "bash": {"COMP_WORDS": "hsm-token ro", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "hsm-token ro"},
        "fish": {
            "_TYPER_COMPLETE_ARGS": "hsm-token ro",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            "_TYPER_COMPLETE_WORD_TO_COMPLETE": "ro",
        },
    }[shell]
    completed = complete(office, shell, **words)
    assert "rollover" in completed
    assert "fetch" not in completed


@pytest.mark.parametrize(
    ("shell", "named"),
    [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --command hsm-token")],
)
def test_the_completion_of_each_shell_is_shown(office, shell, named):
    done = office.run(
        "--show-completion", shell, environment={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    )
    assert (done.status, done.stderr) == (0, "")
    assert named in done.stdout
    assert "_HSM_TOKEN_COMPLETE" in done.stdout


def test_the_completion_that_bash_is_shown_is_one(office):
    words = " ".join(office.command("--show-completion"))
    done = subprocess.run(
        ["bash", "-c", f'script=$({words}) && bash -n <<<"$script" && printf %s "$script"; exit $?'],
        capture_output=True,
        text=True,
        timeout=60,
        env=office.environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete -o" in done.stdout
