"""Each way to break an installation, really done; the doctor names the cause and not its consequences."""

import datetime
import functools
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import leaks
import pytest
import trustme
from endpoint import Endpoint, Reply, Seen, raw_server
from faults import FaultyModule
from office import SCOPE, Office
from software_signer import SoftwareSigner

from hsm_signer import ecdsa, x509


@dataclass
class Scene:
    """What there is to break an office with."""

    office: Office
    ca: trustme.CA
    faulty: FaultyModule
    new_token: Callable[..., object]
    held: ExitStack
    environment: dict[str, str] = field(default_factory=dict)

    def profile(self, **settings: object) -> None:
        self.office.configure(**settings)

    @property
    def endpoint(self) -> str:
        return str(self.office.profile["token-endpoint"])

    @property
    def issuer(self) -> str:
        return str(self.office.profile["issuer"])

    def server_without_metadata(self, port: int, scheme: str = "https") -> None:
        self.profile(token_endpoint=f"{scheme}://127.0.0.1:{port}/token", issuer=None)

    def certificate(self, *, start: int, days: int) -> None:
        """One that is in date as told; whose key it holds is not looked at then."""
        not_before = int(time.time()) + start * 86400
        der = x509.self_signed(SoftwareSigner(), common_name="x", not_before=not_before, days=days)
        (self.office.home / "es256_cert.pem").write_text(ecdsa.pem("CERTIFICATE", der))
        self.profile(key_thumbprint=None)

    def key(self, label: str, *arguments: str) -> None:
        self.office.token.pkcs11_tool("--keypairgen", "--label", label, "--usage-sign", *arguments)
        self.profile(key=label, key_thumbprint=None, certificate=None)

    def bare_token(self, label: str) -> None:
        """A token without a user PIN."""
        token = self.office.token
        slots = subprocess.check_output(["softhsm2-util", "--show-slots"], text=True)
        slot = [line.split()[1] for line in slots.splitlines() if line.startswith("Slot ")][-1]
        tool = ["pkcs11-tool", "--module", token.module, "--init-token", "--slot", slot, "--label", label]
        subprocess.run([*tool, "--so-pin", "12345678"], check=True, capture_output=True)

    def serve(self, token: Reply, **metadata: object) -> None:
        """A server of our own, with metadata, that answers a token request like this."""

        def answer(seen: Seen) -> Reply:
            if seen.method == "POST":
                return token
            origin = server.origin
            own = {"issuer": origin, "token_endpoint": f"{origin}/token", "jwks_uri": f"{origin}/keys"}
            return Reply(body=own | metadata)  # at every path, so that it is the JWK Set too

        server = self.held.enter_context(Endpoint(self.ca, answer))
        self.profile(token_endpoint=f"{server.origin}/token", issuer=server.origin, deadline=1)

    def speak(self, ca: object, talk: Callable[[socket.socket], None] = lambda _: None) -> int:
        return self.held.enter_context(raw_server(ca, talk))


@dataclass(frozen=True)
class Case:
    """``check`` is the first that fails, with exit ``status``; its evidence or remedy ``says`` the cause."""

    break_it: Callable[[Scene], None]
    check: str
    status: int
    says: str
    login: bool = False


CASES: dict[str, Case] = {}


def broken(check: str, status: int, says: str, *, login: bool = False) -> Callable[..., None]:
    def add(break_it: Callable[[Scene], None]) -> None:
        CASES[break_it.__name__] = Case(break_it, check, status, says, login)

    return add


@functools.cache
def closed_port() -> int:
    """A port that stays bound, so that nobody else gets it, and that nobody listens on."""
    deaf = socket.socket()
    deaf.bind(("127.0.0.1", 0))
    port: int = deaf.getsockname()[1]
    deaf.detach()
    return port


# --- configuration


@broken("configuration", 2, "did you mean pin-source")
def a_key_of_the_profile_is_misspelt(scene: Scene) -> None:
    scene.office.config.write_text(scene.office.config.read_text() + 'pin-sorce = "prompt"\n')


@broken("configuration", 2, "other users could write")
def others_can_write_the_configuration(scene: Scene) -> None:
    scene.office.config.chmod(0o622)


@broken("configuration", 2, "is no TOML")
def the_configuration_is_no_toml(scene: Scene) -> None:
    scene.office.config.write_text("[profiles.office\n")


@broken("configuration", 2, "config init")
def the_configuration_is_gone(scene: Scene) -> None:
    scene.office.config.unlink()


@broken("configuration", 2, "profiles there: office")
def the_profile_is_another(scene: Scene) -> None:
    scene.environment["HSM_TOKEN_PROFILE"] = "das"


@broken("configuration", 2, "no client-id given")
def the_client_id_is_missing(scene: Scene) -> None:
    scene.profile(client_id=None)


@broken("configuration", 2, "https is needed")
def the_endpoint_is_plain_http(scene: Scene) -> None:
    scene.profile(token_endpoint="http://das.example/token", issuer=None)


@broken("configuration", 2, "of another server")
def the_environment_sends_assertions_for_another_server(scene: Scene) -> None:
    scene.environment["HSM_TOKEN_AUDIENCE"] = "https://evil.example/token"


@broken("configuration", 2, "1 to 1800 seconds")
def assertions_live_too_long(scene: Scene) -> None:
    scene.profile(lifetime=3600)


# --- module


@broken("module", 3, "found on this machine: ")
def the_module_is_gone(scene: Scene) -> None:
    scene.profile(module="/usr/lib/softhsm/none.so")


@broken("module", 3, "no PKCS#11 module")
def the_module_is_no_library(scene: Scene) -> None:
    (scene.office.home / "module.so").write_text("not a library")
    scene.profile(module=str(scene.office.home / "module.so"))


@broken("module", 3, "no PKCS#11 module")
def the_module_is_another_library(scene: Scene) -> None:
    library = next(Path("/usr/lib").glob("*/libz.so.1"), None) or next(Path("/lib").glob("*/libz.so.1"))
    scene.profile(module=str(library))


@broken("module", 2, "other users could write")
def others_can_write_the_module(scene: Scene) -> None:
    Path(scene.faulty.path).chmod(0o777)
    scene.profile(module=scene.faulty.path)


@broken("module", 3, "its own configuration")
def the_configuration_of_the_module_is_gone(scene: Scene) -> None:
    scene.environment["SOFTHSM2_CONF"] = "/nowhere/softhsm2.conf"


@broken("module", 3, "CKR_DEVICE_ERROR")
def the_module_does_not_start(scene: Scene) -> None:
    scene.faulty.set("fail C_Initialize 0 CKR_DEVICE_ERROR")
    scene.profile(module=scene.faulty.path)


# --- token


@broken("token", 3, "pkcs11:token=token-")
def the_token_has_another_label(scene: Scene) -> None:
    scene.profile(token="pkcs11:token=offfice")


@broken("token", 3, "; there is: pkcs11:token=")
def the_token_has_another_serial(scene: Scene) -> None:
    scene.profile(token=f"{scene.office.token.uri};serial=0123456789abcdef")


@broken("token", 3, "add serial= or slot-id=")
def two_tokens_have_one_label(scene: Scene) -> None:
    scene.bare_token("twin")
    scene.bare_token("twin")
    scene.profile(token="twin")


@broken("token", 4, "has no user PIN yet")
def the_token_has_no_user_pin(scene: Scene) -> None:
    scene.bare_token("bare")
    scene.profile(token="bare")


@broken("token", 4, "is locked")
def the_pin_is_locked(scene: Scene) -> None:
    scene.faulty.set("token-flags CKF_USER_PIN_LOCKED")
    scene.profile(module=scene.faulty.path)


@broken("token", 3, "CKR_DEVICE_ERROR")
def the_token_does_not_answer(scene: Scene) -> None:
    scene.faulty.set("fail C_GetTokenInfo 0 CKR_DEVICE_ERROR")
    scene.profile(module=scene.faulty.path)


@broken("mechanism", 3, "needs a token with elliptic curves")
def the_token_has_no_ecdsa(scene: Scene) -> None:
    conf = scene.office.home / "softhsm2.conf"
    conf.write_text(
        Path(scene.office.token.conf).read_text() + "slots.mechanisms = CKM_SHA256,CKM_RSA_PKCS\n"
    )
    scene.environment["SOFTHSM2_CONF"] = str(conf)


# --- PIN


@broken("PIN source", 4, "chmod 06")
def others_can_read_the_pin(scene: Scene) -> None:
    (scene.office.home / "pin").chmod(0o644)


@broken("PIN source", 2, "it holds the PIN alone")
def the_pin_file_is_gone(scene: Scene) -> None:
    (scene.office.home / "pin").unlink()


@broken("PIN source", 4, "several lines")
def the_pin_file_has_two_lines(scene: Scene) -> None:
    (scene.office.home / "pin").write_text(f"{leaks.pin()}\n{leaks.pin()}\n")


@broken("PIN source", 4, "empty PIN")
def the_pin_file_is_empty(scene: Scene) -> None:
    (scene.office.home / "pin").write_text("\n")


@broken("PIN source", 2, "NOWHERE")
def the_variable_of_the_pin_is_not_set(scene: Scene) -> None:
    scene.profile(pin_source="env:NOWHERE")


@broken("PIN source", 2, "LoadCredential")
def systemd_gave_no_credential(scene: Scene) -> None:
    scene.profile(pin_source="systemd:hsm-pin")


@broken("PIN source", 2, "no-such-program")
def the_program_of_the_pin_command_is_gone(scene: Scene) -> None:
    scene.profile(pin_source="command:no-such-program --pin")


@broken("PIN source", 4, "no PIN pad")
def the_token_has_no_pin_pad(scene: Scene) -> None:
    scene.profile(pin_source="pinpad")


@broken("configuration", 2, "must be a known source")
def the_pin_source_is_misspelt(scene: Scene) -> None:
    scene.profile(pin_source="datei:pin")


@broken("PIN source", 4, "other users could write")
def others_can_write_the_state_directory(scene: Scene) -> None:
    (scene.office.home / "state").mkdir()
    (scene.office.home / "state").chmod(0o777)
    scene.profile(state_dir="state")


@broken("PIN source", 4, "--retry-pin")
def an_earlier_login_did_not_succeed(scene: Scene) -> None:
    scene.faulty.set("fail C_Login 1 CKR_DEVICE_ERROR")
    scene.profile(module=scene.faulty.path)
    assert scene.office.run("key", "list").status == 3
    scene.profile()


@broken("audit log", 2, "chmod 0600 /")
def others_can_read_the_audit_log(scene: Scene) -> None:
    scene.profile(audit_log="audit.jsonl")
    assert scene.office.run("assertion").status == 0
    (scene.office.home / "audit.jsonl").chmod(0o644)


@broken("audit log", 2, "is a link, not a regular file", login=True)
def the_audit_log_is_a_link(scene: Scene) -> None:
    (scene.office.home / "audit.jsonl").symlink_to("elsewhere")
    scene.profile(audit_log="audit.jsonl")


@broken("audit log", 2, "does not end as a log of ours does", login=True)
def the_audit_log_is_something_else(scene: Scene) -> None:
    (scene.office.home / "notes").touch(mode=0o600)
    (scene.office.home / "notes").write_text("notes of mine\n")
    scene.profile(audit_log="notes")


@broken("login", 4, "tokens lock after a few wrong PINs", login=True)
def the_pin_is_wrong(scene: Scene) -> None:
    token = scene.new_token()
    scene.profile(token=token.uri)


@broken("login", 4, "one last try", login=True)
def one_wrong_pin_more_locks_the_token(scene: Scene) -> None:
    scene.faulty.set("token-flags CKF_USER_PIN_FINAL_TRY")
    scene.profile(module=scene.faulty.path)


# --- key


@broken("key", 5, "no private EC key matches", login=True)
def the_key_is_gone(scene: Scene) -> None:
    scene.profile(key="das-2019")


@broken("key", 5, "2 private EC keys match", login=True)
def two_keys_have_one_label(scene: Scene) -> None:
    scene.key("twin", "--key-type", "EC:prime256v1", "--id", "a1")
    scene.key("twin", "--key-type", "EC:prime256v1", "--id", "a2")


@broken("key", 5, "is not the pinned one", login=True)
def the_key_is_another_than_the_pinned_one(scene: Scene) -> None:
    scene.profile(key_thumbprint="w" * 43, certificate=None)


@broken("key", 5, "can leave the token", login=True)
def the_key_can_leave_the_token(scene: Scene) -> None:
    scene.key("loose", "--key-type", "EC:prime256v1", "--id", "a3", "--extractable")


@broken("key", 5, "ES256 needs P-256", login=True)
def the_key_is_on_another_curve(scene: Scene) -> None:
    scene.key("p384", "--key-type", "EC:secp384r1", "--id", "a4", "--sensitive")


@broken("key", 5, "no public key and no certificate", login=True)
def somebody_deleted_the_public_half(scene: Scene) -> None:
    scene.key("half", "--key-type", "EC:prime256v1", "--id", "a5", "--sensitive")
    scene.office.token.pkcs11_tool("--delete-object", "--type", "pubkey", "--id", "a5")


@broken("key", 5, "is not its own", login=True)
def somebody_planted_another_public_half(scene: Scene) -> None:
    scene.key("planted", "--key-type", "EC:prime256v1", "--id", "a6", "--sensitive")
    token, der = scene.office.token, scene.office.home / "public.der"
    token.pkcs11_tool("--delete-object", "--type", "pubkey", "--id", "a6")
    der.write_bytes(ecdsa.spki_from_point(ecdsa.point_from_jwk(SoftwareSigner().jwk)))
    token.pkcs11_tool("--write-object", str(der), "--type", "pubkey", "--id", "a6", "--label", "planted")


@broken("key", 5, "is not its own", login=True)
def the_token_signs_wrongly(scene: Scene) -> None:
    scene.faulty.set("signature wrong")
    scene.profile(module=scene.faulty.path)


@broken("signature", 5, "the token itself refuses it", login=True)
def the_token_refuses_its_own_signature(scene: Scene) -> None:
    scene.faulty.set("fail C_Verify 0 CKR_SIGNATURE_INVALID")
    scene.profile(module=scene.faulty.path)


# --- certificate


@broken("certificate", 5, "is not of the key")
def the_certificate_is_of_another_key(scene: Scene) -> None:
    scene.certificate(start=0, days=700)
    scene.profile()


@broken("certificate", 8, "ended")
def the_certificate_has_ended(scene: Scene) -> None:
    scene.certificate(start=-30, days=29)


@broken("certificate", 8, "see the clock")
def the_certificate_is_not_valid_yet(scene: Scene) -> None:
    scene.certificate(start=2, days=700)


@broken("certificate", 2, "No such file")
def the_certificate_is_gone(scene: Scene) -> None:
    (scene.office.home / "es256_cert.pem").unlink()


@broken("certificate", 2, "no certificate in")
def the_certificate_is_no_certificate(scene: Scene) -> None:
    (scene.office.home / "es256_cert.pem").write_text("-----BEGIN PUBLIC KEY-----\n")


@broken("certificate", 8, "says was enrolled")
def the_certificate_is_not_the_enrolled_one(scene: Scene) -> None:
    folder = scene.office.home / "folder"
    assert scene.office.run("enroll", "--out", str(folder), "--replace").status == 0
    (folder / "es256_cert.pem").unlink()
    scene.office.run("cert", "self-signed", "--out", str(folder / "es256_cert.pem"))
    scene.profile(certificate="folder/es256_cert.pem")


# --- network


@broken("proxy", 7, "the proxy 127.0.0.1")
def the_proxy_is_down(scene: Scene) -> None:
    scene.profile(token_endpoint="https://das.example/token", issuer=None)
    scene.environment["HTTPS_PROXY"] = f"http://127.0.0.1:{closed_port()}"


@broken("TLS", 7, "403")
def the_proxy_lets_nobody_through(scene: Scene) -> None:
    port = scene.speak(
        None, lambda sock: sock.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
    )
    scene.profile(token_endpoint="https://das.example/token", issuer=None, proxy=f"http://127.0.0.1:{port}")


@broken("DNS", 7, "das.invalid is not resolved")
def the_name_of_the_server_is_not_known(scene: Scene) -> None:
    scene.profile(token_endpoint="https://das.invalid/token", issuer=None)


@broken("TCP", 7, "Connection refused")
def the_server_is_down(scene: Scene) -> None:
    scene.server_without_metadata(closed_port())


@broken("TLS", 7, "ca-bundle")
def the_root_of_the_server_is_not_trusted(scene: Scene) -> None:
    scene.profile(ca_bundle=None)


@broken("TLS", 2, "is no PEM file of certificates")
def the_ca_bundle_is_no_bundle(scene: Scene) -> None:
    (scene.office.home / "ca.pem").write_text("roots")
    scene.profile(ca_bundle="ca.pem")


class OneCertificate:
    """In the place of a CA: whatever is asked for, this is issued."""

    def __init__(self, certificate: trustme.LeafCert) -> None:
        self.issue_cert = lambda *_: certificate


@broken("TLS", 7, "certificate has expired")
def the_certificate_of_the_server_has_expired(scene: Scene) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    before = past - datetime.timedelta(days=9)
    expired = scene.ca.issue_cert("127.0.0.1", not_before=before, not_after=past)
    scene.server_without_metadata(scene.speak(OneCertificate(expired)))


@broken("TLS", 7, "is not the server's")
def another_server_answers(scene: Scene) -> None:
    scene.server_without_metadata(scene.speak(OneCertificate(scene.ca.issue_cert("das.example"))))


@broken("TLS", 7, "is this a TLS port")
def the_port_speaks_no_tls(scene: Scene) -> None:
    scene.server_without_metadata(scene.speak(None, lambda sock: sock.sendall(b"220 mail.example\r\n")))


# --- clock


@broken("clock", 8, "s ahead of ours")
def the_clock_is_behind(scene: Scene) -> None:
    scene.profile(clock_offset=-600)


@broken("clock", 8, "an assertion lives 1800 s")
def the_clock_is_ahead(scene: Scene) -> None:
    scene.profile(clock_offset=600, lifetime=1800)


# --- what the server says


@broken("discovery", 6, "must name the issuer")
def the_issuer_is_written_otherwise(scene: Scene) -> None:
    scene.profile(issuer=f"{scene.issuer}/")


@broken("discovery", 6, "publishes no metadata")
def the_issuer_is_another(scene: Scene) -> None:
    scene.profile(issuer=f"{scene.issuer}/realms/office")


@broken("discovery", 6, "is not on the issuer's origin")
def the_metadata_names_a_foreign_endpoint(scene: Scene) -> None:
    scene.serve(Reply(), token_endpoint="https://evil.example/token")


@broken("token request", 6, "'/' at character", login=True)
def the_audience_is_written_otherwise(scene: Scene) -> None:
    scene.profile(audience=f"{scene.endpoint}/")


@broken("token request", 6, "is it spelt as registered", login=True)
def the_client_is_not_registered(scene: Scene) -> None:
    scene.profile(client_id="nobody")


@broken("token request", 6, "is not registered for this client", login=True)
def the_key_is_not_registered(scene: Scene) -> None:
    assert scene.office.run("key", "generate", "unregistered").status == 0
    scene.profile(key="unregistered", key_thumbprint=None, certificate=None)


@broken("token request", 6, "invalid_scope", login=True)
def the_scope_is_not_known(scene: Scene) -> None:
    scene.profile(scope="das-api/everything")


@broken("token request", 6, "404", login=True)
def the_endpoint_is_another_page(scene: Scene) -> None:
    scene.profile(token_endpoint=f"{scene.issuer}/token")


@broken("token request", 7, "503", login=True)
def the_server_is_overloaded(scene: Scene) -> None:
    scene.serve(Reply(503, b""))


@broken("token request", 6, "media type", login=True)
def a_web_page_answers_in_the_place_of_the_server(scene: Scene) -> None:
    scene.serve(Reply(200, b"<html>", {"Content-Type": "text/html"}))


@broken("scope", 6, "missing: das-api/das-access", login=True)
def the_server_grants_less(scene: Scene) -> None:
    grant = {
        "access_token": "access-token-opaque",
        "token_type": "Bearer",
        "expires_in": 60,
        "scope": "das-api/read",
    }
    scene.serve(Reply(body=grant))


@broken("access token", 8, "no signing key", login=True)
def the_access_token_is_not_of_the_issuer(scene: Scene) -> None:
    forged = "eyJhbGciOiJSUzI1NiIsImtpZCI6IngifQ.e30.AAAA"
    grant = {"access_token": forged, "token_type": "Bearer", "expires_in": 60, "scope": SCOPE}
    scene.serve(Reply(body=grant), keys=[])


@pytest.fixture
def scene(
    tls_office: Office,
    ca: trustme.CA,
    faulty: FaultyModule,
    new_token: Callable[..., object],
    tmp_path: Path,
) -> Iterator[Scene]:
    with ExitStack() as held:
        yield Scene(tls_office.copy(tmp_path), ca, faulty, new_token, held)


@pytest.mark.parametrize("name", CASES)
def test_the_doctor_names_the_cause(scene: Scene, name: str) -> None:
    case = CASES[name]
    case.break_it(scene)
    arguments = ["--login"] if case.login else []
    done = scene.office.run("doctor", "--json", *arguments, environment=scene.environment)
    failed = [each for each in done.json if each["verdict"] == "failed"]
    assert failed, [f"{each['check']}: {each['verdict']}, {each['evidence']}" for each in done.json]
    told = f"{failed[0]['check']}: {failed[0]['evidence']} → {failed[0]['remedy']}"
    assert failed[0]["check"] == case.check, told
    assert case.says in told
    assert done.status == case.status, told
    assert len(failed) == 1, f"{[each['check'] for each in failed]} fail, too"
