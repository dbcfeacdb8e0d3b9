"""Objects found, and their attributes read, in as few calls as a module allows (PKCS#11 v3.1 §5.7)."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pkcs11 import _pkcs11
from pkcs11.constants import Attribute
from pkcs11.exceptions import (
    AttributeSensitive,
    AttributeTypeInvalid,
    FunctionFailed,
    GeneralError,
    PKCS11Error,
)

from hsm_signer.hsm.cryptoki import Functions
from hsm_signer.hsm.login import MAPPER

_ROOM = 256  # bytes for each attribute of a key; what is longer takes more calls
_LONG_ROOM = 8192  # for a certificate
_OF_ANY_LENGTH = {Attribute.LABEL, Attribute.ID, Attribute.EC_PARAMS}
_NOT_THERE = (AttributeTypeInvalid, AttributeSensitive, FunctionFailed, GeneralError)


def search(
    session: Any,
    template: dict[Attribute, object],
    how: Any = _pkcs11.SearchIter,  # type: ignore[attr-defined]  # python-pkcs11 ships no types
) -> list[Any]:
    """All objects that match, in one search that is always finished (``C_FindObjects``)."""
    operation = how(session, template, 16)
    try:
        operation.__enter__()
        return [found for batch in operation for found in batch]
    finally:
        with suppress(PKCS11Error):  # left to its destructor, it would be printed
            operation._finalize()


class _Numbers(_pkcs11.SearchIter):  # type: ignore[misc, name-defined]  # python-pkcs11 ships no types
    """A search that asks nothing about what it finds."""

    def _batch_iter(self, results: Any, count: int) -> list[int]:
        return list(results[:count])


def values(
    session: Any, template: dict[Attribute, object], attribute: Attribute, direct: Functions | None
) -> list[bytes]:
    """The attribute of each object that matches and has it; of public keys and certificates there are many."""
    if direct is not None:
        numbers = search(session, template, _Numbers)
        at_once = [direct.read(session.handle, each, [attribute], _LONG_ROOM) for each in numbers]
        if None not in at_once:
            return [value for found in at_once if found and (value := found.get(attribute))]
    handles = search(session, template)
    return [value for handle in handles if (value := read(handle, [attribute]).get(attribute))]


def read(
    handle: Any, attributes: Sequence[Attribute], direct: Functions | None = None
) -> dict[Attribute, Any]:
    """Those of the attributes that the object has; one by one where the token cannot do it in one go."""
    failed: PKCS11Error | None = None
    at_once = direct and direct.read(handle.session.handle, handle.handle, attributes, _ROOM)
    # of several errors a module names one, and what is too long may look as if it were not there
    if at_once and at_once.keys() >= _OF_ANY_LENGTH.intersection(attributes):
        return {each: MAPPER.unpack_attributes(each, at_once[each]) for each in attributes if each in at_once}
    try:
        return dict(handle.get_attributes(list(attributes)))
    except _NOT_THERE:
        found = {}
        for attribute in attributes:
            try:
                found[attribute] = handle[attribute]
            except (AttributeTypeInvalid, AttributeSensitive):
                continue
            except _NOT_THERE as exc:
                failed = exc
        if failed and not found:
            raise failed from None
        return found
