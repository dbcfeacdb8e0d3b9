"""Find exactly one token (RFC 7512 §2.3), before anything is asked of it or sent to it."""

import logging
import time

from hsm_signer.errors import TokenAmbiguousError, TokenError, TokenNotFoundError
from hsm_signer.hsm.codes import code_of
from hsm_signer.hsm.module import FoundToken, Module, tokens
from hsm_signer.hsm.uri import Uri

log = logging.getLogger(__name__)

# Seconds between looks. Many modules list the tokens that they saw when they started, and a connection to a
# server that was restarted since is dead; so a module that nobody uses is started again before we give up.
# More than once, because SoftHSM overlooks a token whose files another process writes, as every login does.
_PAUSES = (0.0, 0.05, 0.1, 0.2, 0.4)
_PATIENCE = 2.0  # seconds after which a module that takes its time is not started once more


def find_token(module: Module, uri: Uri) -> FoundToken:
    """The one initialised token that matches; the error lists what is there otherwise."""
    begin = time.monotonic()
    pauses = iter(_PAUSES)
    if module.suspect:
        module.refresh()
    while True:
        try:
            return _look(module, uri)
        except TokenAmbiguousError:
            raise
        except TokenError as exc:
            pause = next(pauses, None)
            if pause is None or time.monotonic() - begin > _PATIENCE:
                raise
            time.sleep(pause)
            if not module.refresh():
                raise
            log.info("%s started again: %s", module.path, code_of(exc) or exc)


def _look(module: Module, uri: Uri) -> FoundToken:
    found, problems = tokens(module)
    asked = uri.token_attributes()
    ready = [one for one in found if one.info.initialized]
    matching = [one for one in ready if all(one.attributes[name] == value for name, value in asked.items())]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise TokenAmbiguousError(
            f"{len(matching)} tokens match {uri}",
            candidates=[f"{one.info.identity};slot-id={one.info.slot_id}" for one in matching],
            hint="add serial= or slot-id= to the token's URI",
        )
    raise TokenNotFoundError(
        f"no initialised token matches {uri} in {module.path}",
        candidates=[*(one.info.identity for one in ready), *problems],
        hint="hsm-token slots shows what is there",
    )
