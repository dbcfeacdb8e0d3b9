"""A person at a terminal."""

import os
import pty

from office import Office


def at_a_terminal(office: Office, arguments: list[str], answers: dict[str, str], status: int = 0) -> str:
    """Run with a terminal for all three streams and answer each question once; what was on the screen."""
    pid, terminal = pty.fork()
    if pid == 0:
        command = office.command(*arguments)
        environment = office.environment | {"HSM_TOKEN_CONFIG": str(office.config)}
        os.execvpe(command[0], command, environment)  # noqa: S606  # a shell would only be in the way
    screen, waiting = "", dict(answers)
    while True:
        try:
            screen += os.read(terminal, 4096).decode()
        except OSError:  # EIO: the command has ended
            break
        for question in [question for question in waiting if question in screen]:
            os.write(terminal, f"{waiting.pop(question)}\n".encode())
    _, ended = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(ended) == status, screen
    return screen


def shown_at_last(screen: str) -> str:
    """What is left on the lines of the screen when each carriage return overwrites."""
    lines = []
    for line in screen.replace("\r\n", "\n").split("\n"):
        first, *over = line.split("\r")
        cells = first
        for part in over:
            cells = part + cells[len(part) :]
        lines.append(cells.rstrip() if over else line)
    return "\n".join(lines)
