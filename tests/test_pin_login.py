"""Whole logins in processes of their own: however many try, a wrong PIN reaches the token once."""

import collections
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import leaks
import pytest
from conftest import SoftToken
from faults import FaultyModule

from hsm_signer import files

WRONG = leaks.pin()
PROGRAM = """
import json, os, sys
from pathlib import Path

import hsm_signer.hsm.token, hsm_signer.verification  # all that a command needs, before the start is given
from hsm_signer.errors import HsmSignerError
from hsm_signer.pin import from_source

uri, module, state, retry, commands = json.loads(sys.argv[1])

def run(job, source):
    pin = from_source(source, prompt=lambda text: input(), state_directory=Path(state), retry=retry)
    try:
        with hsm_signer.open_token(uri, module=module, pin=pin) as token:
            if job == "keys":
                token.keys()
            elif job == "prove":
                token.prove("ours")
            elif job != "open":
                for _ in range(2):
                    token.signer(job).sign(b"data")
            return "done"
    except HsmSignerError as exc:
        return f"{type(exc).__name__} {getattr(exc, 'code', None)} {exc}"

if len(commands) == 1:
    print(run(*commands[0]))
    sys.exit()
start, go = os.pipe()
for command in commands:
    if os.fork() == 0:
        os.close(go)
        os.read(start, 1)  # until the parent has made all of them
        os.write(1, (run(*command) + chr(10)).encode())
        os._exit(0)
os.close(go)
for _ in commands:
    assert os.wait()[1] == 0
"""

Command = tuple[str, str]  # a job and a PIN source


class Office:
    """A token behind the module that counts, its PIN file, and a state directory of their own."""

    def __init__(self, token: SoftToken, module: FaultyModule, home: Path) -> None:
        self.token = token
        self.module = module
        self.home = home
        self.state = home / "state"
        self.pin_file = home / "pin"
        files.create(self.pin_file, f"{token.pin}\n".encode())

    def start(
        self, *commands: Command, module: str = "", state: Path | None = None, retry: bool = False
    ) -> subprocess.Popen[str]:
        """Run one command in a process, or several at the same time in one each, forked after the imports."""
        arguments = [self.token.uri, module or self.module.path, str(state or self.state), retry, commands]
        pipe = subprocess.PIPE
        program = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
        return subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def run(self, job: str = "open", source: str = "", *, typed: str = "", **more: object) -> str:
        """Answer ``done``, or class, code and text of the error."""
        process = self.start((job, source or f"file:{self.pin_file}"), **more)
        return self.finish(process, f"{typed}\n")

    def finish(self, process: subprocess.Popen[str], typed: str = "") -> str:
        out, err = process.communicate(typed, timeout=100)
        assert process.returncode == 0, err
        return out.strip()

    def mistype(self) -> None:
        """Somebody put a wrong PIN into the file."""
        files.replace(self.pin_file, WRONG.encode())

    def markers(self) -> list[Path]:
        return list(self.state.glob("*.marker"))

    def logins(self) -> int:
        return self.module.calls("C_Login")


@pytest.fixture
def office(soft_token: SoftToken, faulty: FaultyModule, tmp_path: Path) -> Office:
    return Office(soft_token, faulty, tmp_path)


MAKE_KEYS = """
import os, sys
import pkcs11
from pkcs11 import Attribute, KeyType
from pkcs11.util.ec import encode_named_curve_parameters

curve = {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
token = pkcs11.lib(sys.argv[1]).get_token(token_label=sys.argv[2])
with token.open(rw=True, user_pin=os.environ["TEST_PIN"]) as session:
    for label, always in (("ours", False), ("each", True)):
        private = {Attribute.ALWAYS_AUTHENTICATE: always}
        parameters = session.create_domain_parameters(KeyType.EC, curve, local=True)
        parameters.generate_keypair(label=label, id=label.encode(), store=True, private_template=private)
"""


@pytest.fixture(scope="session")
def keys(soft_token: SoftToken) -> None:
    """Make the keys ``ours`` and ``each``; the second wants its PIN for each signature.

    In a process of its own: SoftHSM2 sees no token that is made after a process has loaded it.
    """
    command = [sys.executable, "-c", MAKE_KEYS, soft_token.module, soft_token.label]
    subprocess.run(command, env=os.environ | {"TEST_PIN": soft_token.pin}, check=True)


@pytest.mark.usefixtures("keys")
def test_50_processes_of_mixed_commands_send_a_wrong_pin_once(office: Office) -> None:
    office.mistype()
    jobs, sources = ("keys", "prove", "ours", "open", "each"), ("file:", "command:cat ")
    commands = [(jobs[number % 5], f"{sources[number % 2]}{office.pin_file}") for number in range(50)]
    told = collections.Counter(
        line.split()[0] for line in office.finish(office.start(*commands)).splitlines()
    )
    assert office.logins() == 1
    assert told == {"PinRejectedError": 1, "PinRefusedError": 49}


@pytest.mark.usefixtures("keys")
def test_many_processes_with_the_right_pin_all_work(office: Office) -> None:
    commands = [(job, f"file:{office.pin_file}") for job in ("keys", "prove", "ours", "each") * 4]
    assert office.finish(office.start(*commands)).splitlines() == ["done"] * 16
    assert office.markers() == []


def test_a_rejected_pin_is_not_sent_again_until_a_person_has_looked(office: Office) -> None:
    office.mistype()
    assert office.run().startswith("PinRejectedError CKR_PIN_INCORRECT")
    assert office.run().startswith("PinRefusedError")
    assert office.run(source=f"command:cat {office.pin_file}").startswith("PinRefusedError")
    assert office.logins() == 1
    assert office.run(retry=True).startswith("PinRejectedError")
    assert office.run().startswith("PinRefusedError")
    assert office.logins() == 2
    files.replace(office.pin_file, office.token.pin.encode())
    assert office.run(retry=True) == "done"
    assert office.run() == "done"


def test_a_login_at_a_prompt_clears_the_marker_and_a_wrong_one_does_not(office: Office) -> None:
    office.mistype()
    office.run()
    assert office.run(source="prompt", typed="mistyped").startswith("PinRejectedError")
    assert office.run().startswith("PinRefusedError")
    assert office.run(source="prompt", typed=office.token.pin) == "done"
    assert office.markers() == []
    files.replace(office.pin_file, office.token.pin.encode())
    assert office.run() == "done"


def test_a_process_killed_inside_the_login_stops_the_next_unattended_one(office: Office) -> None:
    office.module.set("hang C_Login")
    with office.start(("open", f"file:{office.pin_file}")) as process:
        while office.logins() == 0:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    office.module.set()
    office.module.forget()
    assert office.run().startswith("PinRefusedError")
    assert office.logins() == 0
    assert office.run(retry=True) == "done"
    assert office.run() == "done"


@pytest.mark.parametrize("flag", ["CKF_USER_PIN_FINAL_TRY", "CKF_USER_PIN_LOCKED"])
def test_flags_that_refuse_the_login_leave_no_marker(office: Office, flag: str) -> None:
    office.module.set(f"token-flags {flag}")
    assert office.run().split()[0] in ("PinRefusedError", "PinLockedError")
    assert office.logins() == 0
    assert office.markers() == []


def test_flags_are_read_again_after_the_pin_was_fetched(office: Office) -> None:
    """Somebody else spends tries while a slow command gets the PIN."""
    control, later = Path(f"{office.module.path}.control"), office.home / "later"
    office.module.set("token-flags CKF_USER_PIN_FINAL_TRY")
    later.write_bytes(control.read_bytes())
    office.module.set()
    told = office.run(source=f"command:sh -c 'cp {later} {control}; cat {office.pin_file}'")
    assert told.startswith("PinRefusedError") and "last try" in told
    assert office.logins() == 0
    assert office.markers() == []


@pytest.mark.parametrize(
    ("rule", "stays"),
    [
        ("fail C_Login 1 CKR_DEVICE_ERROR", True),
        ("fail C_Login 1 CKR_PIN_LOCKED", True),
        ("fail C_Login 1 CKR_DEVICE_REMOVED", True),
        ("fail C_Login 1 CKR_TOKEN_NOT_PRESENT", False),
        ("fail C_Login 1 CKR_USER_PIN_NOT_INITIALIZED", False),
        ("fail C_OpenSession 0 CKR_SESSION_COUNT", False),
        ("fail C_OpenSession 0 CKR_DEVICE_ERROR", False),
        ("fail C_GetTokenInfo 0 CKR_DEVICE_ERROR", False),
        ("max-sessions 1", False),
    ],
)
def test_trouble_leaves_a_marker_only_where_a_try_may_be_spent(
    office: Office, rule: str, stays: bool
) -> None:
    office.module.set(rule)
    told = office.run()
    assert (told == "done") is (rule == "max-sessions 1")
    assert bool(office.markers()) is stays
    office.module.set()
    assert office.run().split()[0] == ("PinRefusedError" if stays else "done")
    assert office.logins() <= 2


def test_without_a_state_directory_no_unattended_login_reaches_the_token(office: Office) -> None:
    (office.home / "file").touch()
    for state in (office.home / "file", office.home / "file" / "below", Path("/proc/nowhere")):
        assert office.run(state=state).startswith("PinRefusedError None no unattended login without")
    assert office.logins() == 0
    assert office.run(source="prompt", typed=office.token.pin, state=office.home / "file" / "below") == "done"


def test_one_token_through_two_modules_has_one_marker(office: Office) -> None:
    """The guard knows the token, not the way to it: a second profile spends no second try."""
    office.mistype()
    assert office.run().startswith("PinRejectedError")
    assert office.run(module=office.token.module).startswith("PinRefusedError")


@pytest.mark.usefixtures("keys")
def test_each_signature_that_carries_the_pin_is_guarded(office: Office) -> None:
    assert office.run("each") == "done"
    assert office.logins() >= 3  # the user, and each of two signatures
    assert office.markers() == []
    office.module.set("fail C_Login 2 CKR_PIN_INCORRECT")
    office.module.forget()
    assert office.run("each").startswith("PinRejectedError")
    assert office.logins() == 2
    assert office.run("each").startswith("PinRefusedError")
    assert office.logins() == 2


WITH_A_TEXT = """
import os, sys
from hsm_signer import open_token
from hsm_signer.errors import HsmSignerError

uri, module = sys.argv[1:]
with open_token(uri, module=module, pin=os.environ["TEST_PIN"]) as token:
    try:
        token.signer("each").sign(b"data")
    except HsmSignerError as exc:
        print(type(exc).__name__)
"""


@pytest.mark.usefixtures("keys")
def test_a_signature_whose_login_may_have_spent_a_try_is_not_tried_again(office: Office) -> None:
    office.module.set("fail C_Login 2 CKR_GENERAL_ERROR")  # the first one is the user's
    office.module.forget()
    command = [sys.executable, "-c", WITH_A_TEXT, office.token.uri, office.module.path]
    environment = os.environ | {"TEST_PIN": office.token.pin}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("PinRefusedError\n", "")
    assert office.logins() == 2


@pytest.mark.usefixtures("keys")
def test_trouble_before_the_login_of_a_signature_leaves_no_marker(office: Office) -> None:
    office.module.set("fail C_SignInit 1 CKR_KEY_HANDLE_INVALID")
    assert office.run("each") == "done"
    office.module.set("only-hashing")
    assert office.run("each") == "done"
    assert office.markers() == []


def test_no_pin_is_in_what_is_left_on_the_disk(office: Office) -> None:
    office.mistype()
    office.run()
    left = [path for path in office.state.rglob("*") if path.is_file()]
    assert len(left) == 2  # marker and lock
    for path in left:
        assert WRONG.encode() not in path.read_bytes() + os.fsencode(path)


SHARED = """
import os, sys
import pkcs11
from hsm_signer import open_token
from hsm_signer.errors import HsmSignerError

uri, label, module = sys.argv[1:]
theirs = pkcs11.lib(os.path.realpath(module)).get_token(token_label=label).open(user_pin=os.environ["TEST_PIN"])
with open_token(uri, module=module, pin=os.environ["WRONG"]) as token:
    token.signer("each")  # keeps the PIN for its signatures
    signer = token.signer("ours")
    theirs.close()  # and logs everybody out
    try:
        signer.sign(b"data")
    except HsmSignerError as exc:
        print(type(exc).__name__)
"""


@pytest.mark.usefixtures("keys")
def test_a_pin_that_no_login_has_proved_is_not_sent_to_bring_a_login_back(office: Office) -> None:
    token, module = office.token, office.module
    command = [sys.executable, "-c", SHARED, token.uri, token.label, module.path]
    environment = os.environ | {"TEST_PIN": token.pin, "WRONG": WRONG}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "KeyNotFoundError\n"), done.stderr
    assert office.logins() == 1  # theirs
