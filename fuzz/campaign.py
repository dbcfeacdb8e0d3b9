"""Run one target under atheris for some seconds: ``campaign.py TARGET SECONDS DIRECTORY``.

The directory keeps what was found: inputs that reach new code in ``corpus``, one that fails as ``crash-…``.
"""

import sys
from hashlib import sha256
from pathlib import Path

import atheris

# Where the decisions are: ours, and the parsers in Python that stand behind ours
with atheris.instrument_imports(include=["hsm_signer", "asn1crypto", "tomllib", "urllib.parse"]):
    from targets import TARGETS

LONGEST = 8192  # bytes of an input


def main() -> None:
    name, seconds, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    target = TARGETS[name]
    corpus = directory / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (corpus / sha256(seed).hexdigest()).write_bytes(seed)
    for hook in ("RegEx", "str"):
        atheris.enabled_hooks.add(hook)
    atheris.Setup(
        [
            sys.argv[0],
            str(corpus),
            f"-max_total_time={seconds}",
            f"-max_len={LONGEST}",
            f"-artifact_prefix={directory}/",
            "-timeout=20",  # seconds for one input
            "-print_final_stats=1",
        ],
        target.check,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
