"""Where PKCS#11 modules usually lie; looked for, never loaded."""

from pathlib import Path

LIBRARY_DIRECTORIES = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt")
WELL_KNOWN = (  # relative to a library directory
    "softhsm/libsofthsm2.so",
    "*/softhsm/libsofthsm2.so",
    "pkcs11/*.so",
    "*/pkcs11/*.so",
    "libtpm2_pkcs11.so*",
    "*/libtpm2_pkcs11.so*",
    "libykcs11.so",
    "*/libykcs11.so",
    "yubihsm_pkcs11.so",
    "*/yubihsm_pkcs11.so",
    "nfast/toolkits/pkcs11/libcknfast.so",
    "safenet/lunaclient/lib/libCryptoki2_64.so",
    "cloudhsm/lib/libcloudhsm_pkcs11.so",
)
P11_KIT_DIRECTORIES = ("/etc/pkcs11/modules", "/usr/share/p11-kit/modules")
NOT_FOR_KEYS = (
    "p11-kit-trust",
    "p11-kit-proxy",
    "pkcs11-spy",
    "onepin-",
)  # trust anchors, relays, duplicates


def known_modules() -> list[Path]:
    """The modules at well-known paths and in p11-kit's list, each file once."""
    found = [
        path
        for directory in map(Path, LIBRARY_DIRECTORIES)
        for pattern in WELL_KNOWN
        for path in sorted(directory.glob(pattern))
    ]
    once = {path.resolve(): path for path in reversed([*_p11_kit_modules(), *found]) if path.is_file()}
    return sorted(path for path in once.values() if not path.name.startswith(NOT_FOR_KEYS))


def _p11_kit_modules() -> list[Path]:
    """``module:`` lines of p11-kit's configuration files (pkcs11.conf(5))."""
    found = []
    for directory in map(Path, P11_KIT_DIRECTORIES):
        for file in sorted(directory.glob("*.module")):
            try:
                text = file.read_text(errors="replace")
            except OSError:  # p11-kit leaves such a file out, too
                continue
            for line in text.splitlines():
                name, _, value = line.partition(":")
                if name.strip() == "module":
                    found += _located(Path(value.strip()))
    return found


def _located(module: Path) -> list[Path]:
    if module.is_absolute():
        return [module]
    return [path for directory in LIBRARY_DIRECTORIES for path in Path(directory).glob(f"*/pkcs11/{module}")]
