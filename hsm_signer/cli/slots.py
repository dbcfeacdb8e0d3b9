"""``hsm-token slots``: what a module offers."""

from typing import TYPE_CHECKING

import typer

from hsm_signer.cli import options, terminal
from hsm_signer.config import Settings, prepared_module

if TYPE_CHECKING:
    from hsm_signer.hsm.module import SlotInfo

MECHANISMS = ("ECDSA", "ECDSA_SHA256", "EC_KEY_PAIR_GEN")  # what signs and makes keys; --json has all

app = typer.Typer()


@app.command()
@options.configured("module")
def slots(settings: Settings, as_json: options.Json = False) -> None:
    """List slots, tokens, flags and mechanisms of a module. No PIN is asked for.

    Example: hsm-token slots --module /usr/lib/softhsm/libsofthsm2.so
    """
    module = prepared_module(settings)
    from hsm_signer.hsm.module import slots

    found = slots(module)
    if as_json:
        terminal.json_result(found)
        return
    terminal.table(("slot", "token", "serial", "model", "hardware", "flags", "mechanisms"), map(_row, found))


def _row(slot: "SlotInfo") -> tuple[str, ...]:
    if slot.token is None:
        return str(slot.slot_id), slot.problem or "empty", "", "", "", "", ""
    label = slot.token.label if slot.token.initialized else "not initialised"
    flags = " ".join(sorted(slot.token.flags))
    mechanisms = " ".join(name for name in MECHANISMS if name in slot.mechanisms)
    return (
        str(slot.slot_id),
        label,
        slot.token.serial,
        slot.token.model,
        _yes(slot.hardware),
        flags,
        mechanisms or "none of ours",
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"
