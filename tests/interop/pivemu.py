"""An emulated PIV card (NIST SP 800-73-4) in the virtual reader of vsmartcard.

``python pivemu.py DIRECTORY PORT`` puts the card into the reader, ending the process pulls it out. There are
keys of P-256 in slot 9A, which signs after the PIN was verified once, and 9C, which wants the PIN before each
signature. DIRECTORY holds what a card keeps without power: keys, certificates, its number and the tries that
are left, 3 at first.
"""

import datetime
import secrets
import socket
import struct
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.x509.oid import NameOID

PIN = b"27182818"
TRIES = 3
ATR = bytes.fromhex("3bf81300008131fe15597562696b657934d4")  # one that OpenSC takes for a PIV card
AID = bytes.fromhex("a000000308")
SLOTS = {0x9A: "5fc105", 0x9C: "5fc10a"}  # and the data object of each slot's certificate (part 1, table 3)
FASC_N = bytes.fromhex("d4e739da739ced39ce739d836858210842108421c84210c3eb")

OK = b"\x90\x00"  # status words: ISO/IEC 7816-4 §5.1.3
NOT_SATISFIED = b"\x69\x82"
BLOCKED = b"\x69\x83"
NOT_FOUND = b"\x6a\x82"
NO_SUCH_KEY = b"\x6a\x88"
UNKNOWN_INSTRUCTION = b"\x6d\x00"


def tlv(tag: str, value: bytes) -> bytes:
    """BER-TLV with the shortest length (ISO/IEC 7816-4 §5.2.2)."""
    size = len(value)
    length = (
        bytes([size]) if size < 128 else b"\x81" + bytes([size]) if size < 256 else b"\x82" + size.to_bytes(2)
    )
    return bytes.fromhex(tag) + length + value


class Memory:
    """What the card keeps without power, in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.keys = {slot: self._key(slot) for slot in SLOTS}
        self.objects = {tag: self._certificate(slot) for slot, tag in SLOTS.items()}
        chuid = (
            tlv("30", FASC_N)
            + tlv("34", self._guid())
            + tlv("35", b"20351231")
            + tlv("3e", b"")
            + tlv("fe", b"")
        )
        self.objects["5fc102"] = tlv("53", chuid)
        discovery = tlv("4f", AID + bytes.fromhex("000010000100")) + tlv("5f2f", b"\x40\x10")
        self.objects["7e"] = tlv("7e", discovery)

    @property
    def tries(self) -> int:
        file = self._directory / "tries"
        return int(file.read_text()) if file.exists() else TRIES

    @tries.setter
    def tries(self, left: int) -> None:
        (self._directory / "tries").write_text(str(left))

    def _guid(self) -> bytes:
        file = self._directory / "guid"  # what OpenSC shows as the serial number
        if not file.exists():
            file.write_bytes(secrets.token_bytes(16))
        return file.read_bytes()

    def _key(self, slot: int) -> ec.EllipticCurvePrivateKey:
        file = self._directory / f"{slot:02x}.pem"
        if not file.exists():
            encoding = (
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            file.write_bytes(ec.generate_private_key(ec.SECP256R1()).private_bytes(*encoding))
        key = serialization.load_pem_private_key(file.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    def _certificate(self, slot: int) -> bytes:
        file = self._directory / f"{slot:02x}.der"
        if not file.exists():
            name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"piv-{slot:02x}")])
            start = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
            key = self.keys[slot]
            builder = x509.CertificateBuilder(
                name, name, key.public_key(), 7, start, start.replace(year=2035)
            )
            usage = x509.KeyUsage(True, True, *[False] * 7)  # digitalSignature, nonRepudiation
            builder = builder.add_extension(usage, critical=True)
            file.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER))
        return tlv("53", tlv("70", file.read_bytes()) + tlv("71", b"\0") + tlv("fe", b""))


class Card:
    """The card under power: :meth:`answer` takes a command APDU and gives the response (part 2)."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._verified = False
        self._fresh = False  # verified, and no signature since
        self._chain = b""
        self._rest = b""

    def answer(self, command: bytes) -> bytes:
        cla, instruction, _, reference = command[:4]
        data = self._body(command[4:])
        if instruction == 0xC0:  # GET RESPONSE
            return self._send(self._rest)
        if cla & 0x10:  # command chaining: more follows
            self._chain += data
            return OK
        data, self._chain = self._chain + data, b""
        match instruction:
            case 0xA4:
                return self._select(data)
            case 0x20:
                return self._verify(reference, data)
            case 0xCB:
                found = self._memory.objects.get(data[2 : 2 + data[1]].hex())
                return self._send(found) if found else NOT_FOUND
            case 0x87:
                return self._sign(reference, data)
            case 0xFD:  # version, of a YubiKey
                return b"\x05\x04\x03" + OK
        return UNKNOWN_INSTRUCTION

    @staticmethod
    def _body(body: bytes) -> bytes:
        if len(body) < 2:
            return b""
        if body[0] == 0 and len(body) >= 3:  # extended length
            return body[3 : 3 + int.from_bytes(body[1:3])]
        return body[1 : 1 + body[0]]

    def _send(self, data: bytes) -> bytes:
        if len(data) <= 256:
            return data + OK
        self._rest = data[256:]
        return data[:256] + bytes([0x61, min(len(self._rest), 255)])

    def _select(self, data: bytes) -> bytes:
        if not data.startswith(AID):
            return NOT_FOUND
        pix = tlv("4f", bytes.fromhex("000010000100"))
        return self._send(tlv("61", pix + tlv("79", tlv("4f", AID))))

    def _verify(self, reference: int, pin: bytes) -> bytes:
        if reference != 0x80:
            return NO_SUCH_KEY
        if not pin and self._verified:
            return OK
        if pin and self._memory.tries:
            self._verified = self._fresh = pin == PIN.ljust(8, b"\xff")
            self._memory.tries = TRIES if self._verified else self._memory.tries - 1
            if self._verified:
                return OK
        return bytes([0x63, 0xC0 | self._memory.tries]) if self._memory.tries else BLOCKED

    def _sign(self, slot: int, template: bytes) -> bytes:
        if slot not in SLOTS:
            return NO_SUCH_KEY
        if not self._verified or (slot == 0x9C and not self._fresh):
            return NOT_SATISFIED
        self._fresh = False
        digest = template[-32:]  # 7C { 82 empty, 81 digest }
        signature = self._memory.keys[slot].sign(digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
        return self._send(tlv("7c", tlv("82", signature)))


def serve(reader: socket.socket, memory: Memory) -> None:
    """Speak vpcd's protocol: each message follows its length in two bytes; one byte is a control command."""
    stream = reader.makefile("rb")
    card = Card(memory)
    while len(head := stream.read(2)) == 2:
        message = stream.read(struct.unpack(">H", head)[0])
        if message == b"\x04":
            answer = ATR
        elif len(message) == 1:  # power off, power on, reset
            card = Card(memory)
            continue
        else:
            answer = card.answer(message)
        reader.sendall(struct.pack(">H", len(answer)) + answer)


if __name__ == "__main__":
    with socket.create_connection(("127.0.0.1", int(sys.argv[2]))) as virtual_reader:
        serve(virtual_reader, Memory(Path(sys.argv[1])))
