"""``python -m hsm_signer.cli``: the command where the script is not on the path."""

from hsm_signer.cli import main

main()
