"""Ctrl-C on systems that know less (tests/test_cli.py has the real thing)."""

import os
import signal

from hsm_signer.cli.interrupt import interruptible


def test_a_system_without_set_blocking_runs_commands_too(monkeypatch):
    pipe, set_blocking = os.pipe, os.set_blocking

    def that_never_blocks():  # only Windows takes one that may, and only Windows lacks set_blocking
        ends = pipe()
        set_blocking(ends[1], False)
        return ends

    monkeypatch.setattr(os, "pipe", that_never_blocks)
    monkeypatch.delattr(os, "set_blocking")
    before = signal.getsignal(signal.SIGINT)
    with interruptible(130):
        pass
    assert signal.getsignal(signal.SIGINT) == before
