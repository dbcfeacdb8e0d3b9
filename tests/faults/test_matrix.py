"""Every function of a module failing once, at every step of a sign.

The steps are those that a good run was seen to take, so that a step which is added later is tested as well.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from canary import assert_no_trace

from faults import FaultyModule, codes
from faults.behind import ALWAYS, DATA, KEY, Behind, verify
from hsm_signer.errors import HsmSignerError, PinError, PinRejectedError

CODES = [
    "CKR_DEVICE_ERROR",
    "CKR_DEVICE_REMOVED",
    "CKR_TOKEN_NOT_PRESENT",
    "CKR_SESSION_HANDLE_INVALID",
    "CKR_OBJECT_HANDLE_INVALID",
    "CKR_USER_NOT_LOGGED_IN",
    "CKR_OPERATION_NOT_INITIALIZED",
    "CKR_CRYPTOKI_NOT_INITIALIZED",
    "CKR_HOST_MEMORY",
    "CKR_PIN_INCORRECT",
    "CKR_GENERAL_ERROR",
    "CKR_BUFFER_TOO_SMALL",
]


def steps(faulty: FaultyModule, code: str) -> list[tuple[str, int]]:
    """Functions and the how manieth of their calls. Only logins say that a PIN is wrong."""
    counts: Counter[str] = Counter()
    found = []
    for call in faulty.log():
        counts[call.function] += 1
        found.append((call.function, counts[call.function]))
    return [step for step in found if code != "CKR_PIN_INCORRECT" or step[0] == "C_Login"]


def complaint(code: str, run: Callable[[], None]) -> str | None:
    """What is wrong with the outcome of a run in which a function answered ``code``."""
    try:
        run()
    except HsmSignerError as exc:
        named = code in str(exc) or f"{codes()[code]:#010x}" in str(exc)  # C_Initialize's odder answers
        return None if named else f"{type(exc).__name__} does not name the code: {exc}"
    except BaseException as exc:  # noqa: BLE001  # whatever it is, it is one line of the report
        return f"{type(exc).__name__}: {exc}"
    return None


def complaint_of_the_next(behind: Behind, rejected: bool, run: Callable[[], None]) -> str | None:
    logins = behind.faulty.calls("C_Login")
    try:
        run()
    except PinError as exc:
        if not rejected:
            return f"the next one: {type(exc).__name__}: {exc}"
    except BaseException as exc:  # noqa: BLE001  # as above
        return f"the next one: {type(exc).__name__}: {exc}"
    if rejected and behind.faulty.calls("C_Login") > logins:
        return "a rejected PIN was sent again"
    return None


@pytest.mark.parametrize("code", CODES)
def test_a_failure_at_any_step_from_opening_to_closing_is_told_or_overcome(
    modules: Iterator[Behind], code: str
) -> None:
    good = next(modules)
    sign_once(good)
    assert len(steps(good.faulty, "")) > 20
    wrong = []
    for function, nth in steps(good.faulty, code):
        behind = next(modules)
        rejected = (function, code) == ("C_Login", "CKR_PIN_INCORRECT")
        behind.faulty.set(f"fail {function} {nth} {code}")
        found = complaint(code, lambda: sign_once(behind))  # noqa: B023  # called in this turn of the loop
        behind.faulty.set()
        found = found or complaint_of_the_next(behind, rejected, lambda: sign_once(behind))  # noqa: B023  # called in this turn of the loop
        lost = 1 if function in ("C_Login", "C_CloseSession") else 0  # by python-pkcs11; cannot be closed
        if not found and behind.faulty.sessions() > lost:
            found = f"{behind.faulty.sessions()} sessions are left"
        wrong += [f"{function} {nth}: {found}"] if found else []
    assert not wrong, "\n".join(wrong)


def sign_once(behind: Behind) -> None:
    with behind.open() as token:
        signer = token.signer(KEY)
        verify(signer, signer.sign(DATA))


@pytest.mark.parametrize("key", [KEY, ALWAYS])
@pytest.mark.parametrize("code", CODES)
def test_a_failure_at_any_step_of_a_signature_is_told_or_overcome(
    modules: Iterator[Behind], code: str, key: str
) -> None:
    behind = next(modules)
    wrong = []
    with behind.open() as token:
        signer = token.signer(key)

        def sign() -> None:
            verify(signer, signer.sign(DATA))

        sign()
        behind.faulty.forget()
        sign()
        sessions = behind.faulty.sessions()
        for function, nth in steps(behind.faulty, code):
            rejected = (function, code) == ("C_Login", "CKR_PIN_INCORRECT")
            behind.faulty.set(f"fail {function} {nth} {code}")
            found = complaint(code, sign)
            behind.faulty.set()
            found = found or complaint_of_the_next(behind, rejected, sign)
            if not found and behind.faulty.sessions() > sessions:
                found = f"{behind.faulty.sessions()} sessions, {sessions} before"
            wrong += [f"{function} {nth}: {found}"] if found else []
    assert not wrong, "\n".join(wrong)


def test_a_rejected_pin_of_one_signature_leaves_no_session_half_way(modules: Iterator[Behind]) -> None:
    """The token has begun to sign (C_SignInit) when it is sent the PIN."""
    behind = next(modules)
    with behind.open() as token:
        signer, other = token.signer(ALWAYS), token.signer(KEY)
        behind.faulty.set("fail C_Login 1 CKR_PIN_INCORRECT")
        with pytest.raises(PinRejectedError) as caught:
            signer.sign(DATA)
        assert_no_trace(caught.value, [behind.token.pin])
        behind.faulty.set()
        verify(other, other.sign(DATA))
        assert "CKR_OPERATION_ACTIVE" not in {call.result for call in behind.faulty.log()}
