"""A PIV card (NIST SP 800-73-4) through OpenSC and pcscd; the card and its reader are emulated."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import leaks
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509 import Certificate, load_der_x509_certificate, load_pem_x509_certificate

from hsm_signer import enrolment, open_token
from hsm_signer.errors import PinLockedError, PinRefusedError, PinRejectedError, TokenError
from hsm_signer.hsm.token import Token
from interop.waiting import wait_until

OPENSC = "/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so"
DRIVER = "/usr/lib/pcsc/drivers/serial/libifdvpcd.so"
PIN = leaks.pin("27182818")
WRONG = [leaks.pin(text) for text in ("14142135", "17320508", "16180339")]
AUTHENTICATION, SIGNATURE = "pkcs11:id=%01", "pkcs11:id=%02"  # slots 9A and 9C
DATA = b"header.claims"
PORT = 0x8C7B  # in the network namespace of the daemon
EMULATOR = Path(__file__).with_name("pivemu.py")
READER = f"""\
FRIENDLYNAME "hsm-signer test"
DEVICENAME   /dev/null:{PORT:#x}
LIBPATH      {DRIVER}
CHANNELID    {PORT:#x}
"""


class CardReader:
    """A pcscd with a virtual reader, in namespaces of its own.

    vpcd listens on all addresses, so the daemon gets a network that has none but its own loopback. A ``/run``
    of its own keeps it from the one pcscd that the machine may have, and from another test's.
    """

    def __init__(self, directory: Path) -> None:
        self._run = directory / "run"
        self._run.mkdir()
        (directory / "readers").mkdir()
        (directory / "readers" / "vpcd").write_text(READER)
        namespaces = ["unshare", "--mount", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
        start = 'mount --bind "$1" /run && ip link set lo up && exec pcscd --foreground --config "$2"'
        arguments = [str(self._run), str(directory / "readers")]
        self._log = (directory / "pcscd.log").open("wb")
        self._daemon = subprocess.Popen(
            [*namespaces, "sh", "-c", start, "sh", *arguments], stdout=self._log, stderr=subprocess.STDOUT
        )
        self.socket = self._run / "pcscd" / "pcscd.comm"
        wait_until(self.socket.exists)

    def insert(self, card: Path) -> subprocess.Popen[bytes]:
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        enter = ["nsenter", "--target", str(self._daemon.pid), *user, "--net"]
        return subprocess.Popen([*enter, sys.executable, str(EMULATOR), str(card), str(PORT)])

    def slots(self) -> str:
        """What pkcs11-tool lists: when it sees the card, so do we."""
        listing = ["pkcs11-tool", "--module", OPENSC, "--list-slots"]
        environment = os.environ | {"PCSCLITE_CSOCK_NAME": str(self.socket)}
        return subprocess.run(listing, env=environment, capture_output=True, text=True).stdout

    def close(self) -> None:
        self._daemon.terminate()
        self._daemon.wait()
        self._log.close()


class Card:
    """One card, in the reader or not."""

    def __init__(self, reader: CardReader, memory: Path) -> None:
        self._reader = reader
        self._memory = memory
        self._emulator: subprocess.Popen[bytes] | None = None

    def insert(self) -> None:
        self._emulator = self._reader.insert(self._memory)
        wait_until(lambda: "piv-9a" in self._reader.slots())

    def pull_out(self) -> None:
        if self._emulator:
            self._emulator.kill()
            self._emulator.wait()
            self._emulator = None
            wait_until(lambda: "piv-9a" not in self._reader.slots())

    def open(self, **options: Any) -> AbstractContextManager[Token]:
        return open_token("piv-9a", module=OPENSC, **{"pin": PIN} | options)

    @property
    def tries(self) -> int:
        return int((self._memory / "tries").read_text())

    def certificate(self, slot: str) -> Certificate:
        return load_der_x509_certificate((self._memory / f"{slot}.der").read_bytes())

    def verify(self, slot: str, data: bytes, raw: bytes) -> None:
        public = self.certificate(slot).public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        r, s = int.from_bytes(raw[:32]), int.from_bytes(raw[32:])
        public.verify(utils.encode_dss_signature(r, s), data, ec.ECDSA(SHA256()))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CardReader]:
    directory = Path(tmp_path_factory.mktemp("pcscd"))
    reader = CardReader(directory)
    os.environ["PCSCLITE_CSOCK_NAME"] = str(reader.socket)  # read once a process
    yield reader
    reader.close()


@pytest.fixture
def card(reader: CardReader, tmp_path: Path) -> Iterator["Card"]:
    card = Card(reader, tmp_path)
    card.insert()
    yield card
    card.pull_out()


def test_9a_signs_after_the_pin_was_given_once(card: Card) -> None:
    with card.open() as token:
        signer = token.signer(AUTHENTICATION)
        for _ in range(3):
            card.verify("9a", DATA, signer.sign(DATA))
    assert card.tries == 3


def test_9c_gets_the_pin_for_each_signature(card: Card) -> None:
    with card.open() as token:
        signer = token.signer(SIGNATURE)
        for _ in range(3):
            card.verify("9c", DATA, signer.sign(DATA))


def test_the_public_half_comes_from_the_card_and_is_proved(card: Card) -> None:
    with card.open() as token:
        assert len(token.signer(AUTHENTICATION).kid) == 43
        assert len(token.keys()) == 2


@pytest.mark.parametrize(("key", "slot"), [(AUTHENTICATION, "9a"), (SIGNATURE, "9c")])
def test_a_key_that_is_on_the_card_is_enrolled(card: Card, tmp_path: Path, key: str, slot: str) -> None:
    with card.open() as token:
        assert not enrolment.ensure_key(token, key, thumbprint=None)
        made = enrolment.enrol(token, key, client_id="das", common_name="das", days=9, now=int(time.time()))
    enrolment.write(made, tmp_path / "das")
    certificate = load_pem_x509_certificate((tmp_path / "das" / enrolment.CERTIFICATE).read_bytes())
    certificate.verify_directly_issued_by(certificate)
    assert certificate.public_key() == card.certificate(slot).public_key()
    assert made.proof.ok
    assert "piv-9a" in (tmp_path / "das" / enrolment.README).read_text()


def test_no_key_is_generated_on_the_card(card: Card) -> None:
    with card.open() as token:
        before = {info.id for info in token.keys()}  # noqa: SIM118  # a method, not a dict's
        with pytest.raises(TokenError, match="CKR_"):
            enrolment.ensure_key(token, "das-2028", thumbprint=None)
        assert {info.id for info in token.keys()} == before  # noqa: SIM118  # as above


def test_a_card_that_is_pulled_out_is_named_and_signs_again_once_it_is_back(card: Card) -> None:
    with card.open() as token:
        signer = token.signer(AUTHENTICATION)
        card.verify("9a", DATA, signer.sign(DATA))
        card.pull_out()
        with pytest.raises(TokenError, match="CKR_"):
            signer.sign(DATA)
        card.insert()
        card.verify("9a", DATA, signer.sign(DATA))


def test_a_wrong_pin_costs_one_try_and_is_not_sent_again(card: Card) -> None:
    with pytest.raises(PinRejectedError), card.open(pin=WRONG[0]):
        pass
    assert card.tries == 2
    with pytest.raises((PinRejectedError, PinRefusedError)), card.open(pin=WRONG[0]):
        pass
    assert card.tries == 2


def test_the_last_try_is_not_spent_unless_allowed_and_then_the_pin_is_locked(card: Card) -> None:
    for wrong in WRONG[:2]:
        with pytest.raises(PinRejectedError), card.open(pin=wrong):
            pass
    with pytest.raises(PinRefusedError), card.open():
        pass
    assert card.tries == 1
    with pytest.raises(PinLockedError), card.open(pin=WRONG[2], allow_final_try=True):
        pass
    assert card.tries == 0
    with pytest.raises(PinLockedError), card.open(allow_final_try=True):
        pass
