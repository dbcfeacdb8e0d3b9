"""opencryptoki's software token, which in Debian 12 has no elliptic curves."""

import os
import subprocess
import sys
from pathlib import Path

import leaks

MODULE = next(Path("/usr/lib").glob("*/pkcs11/libopencryptoki.so"), None)
PIN = leaks.pin("27182818")
# The daemon and what it keeps are one per machine, so here they get namespaces of their own.
START = r"""
set -eu
for directory in /run /var/lib/opencryptoki /etc/opencryptoki; do mount -t tmpfs tmpfs $directory; done
cat > /etc/opencryptoki/opencryptoki.conf <<END
version opencryptoki-3.1
slot 3
{
stdll = libpkcs11_sw.so
}
END
printf 'root:x:0:\npkcs11:x:0:root\n' > /run/group
mount --bind /run/group /etc/group
mkdir -p /run/lock/opencryptoki /var/lib/opencryptoki/swtok/TOK_OBJ
pkcsslotd
trap 'kill "$(cat /run/pkcsslotd.pid)"' EXIT
printf '87654321\nock\n' | pkcsconf -I -c 3 >/dev/null
printf '87654321\n11112222\n11112222\n' | pkcsconf -P -c 3 >/dev/null
printf '11112222\n12345678\n12345678\n' | pkcsconf -u -c 3 >/dev/null
printf '12345678\n%s\n%s\n' "$PIN" "$PIN" | pkcsconf -p -c 3 >/dev/null
"$@"
"""
PROGRAM = """
import os
from hsm_signer import HsmSignerError, open_token

with open_token("ock", module=os.environ["MODULE"], pin=os.environ["PIN"]) as token:
    print("keys:", token.keys())
    try:
        token.generate_key("das-2026")
    except HsmSignerError as exc:
        print("refused:", exc)
"""


def test_a_token_without_elliptic_curves_is_refused_clearly() -> None:
    assert MODULE, "opencryptoki is not installed: tests/run installs it"
    namespaces = ["unshare", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
    namespaces += [] if os.geteuid() == 0 else ["--map-root-user"]
    command = [*namespaces, "sh", "-c", START, "sh", sys.executable, "-c", PROGRAM]
    environment = os.environ | {"PIN": PIN, "MODULE": str(MODULE)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "keys: []" in done.stdout
    assert "refused:" in done.stdout
    assert "CKM_EC" in done.stdout
