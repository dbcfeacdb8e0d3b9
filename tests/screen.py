"""A person at a terminal."""

import os
import pty

from office import Office


def at_a_terminal(office: Office, arguments: list[str], answers: dict[str, str]) -> str:
    """Run with a terminal for all three streams and answer each question once; what was on the screen."""
    pid, terminal = pty.fork()
    if pid == 0:
        command = office.command(*arguments)
        os.execvpe(command[0], command, office.environment | {"HSM_TOKEN_CONFIG": str(office.config)})
    screen, waiting = "", dict(answers)
    while True:
        try:
            screen += os.read(terminal, 4096).decode()
        except OSError:  # EIO: the command has ended
            break
        for question in [question for question in waiting if question in screen]:
            os.write(terminal, f"{waiting.pop(question)}\n".encode())
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0, screen
    assert office.token.pin not in screen
    return screen
