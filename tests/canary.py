"""Look for secrets where they must not be: on an exception and on all that hangs on it."""

from collections.abc import Iterable, Iterator


def assert_no_trace(error: BaseException, canaries: Iterable[str]) -> None:
    """Walk causes, contexts, arguments and attributes, at any depth, and the variables of our own frames."""
    texts = list(_texts(error))
    for canary in canaries:
        assert canary, "an empty canary is found everywhere"
        for where, text in texts:
            assert canary not in text, f"{canary[:12]}… is in {where}"


def _texts(error: BaseException) -> Iterator[tuple[str, str]]:
    seen: set[int] = set()
    waiting: list[tuple[str, object]] = [("the exception", error)]
    while waiting:
        where, value = waiting.pop()
        if id(value) in seen or len(seen) > 20_000:
            continue
        seen.add(id(value))
        if isinstance(value, str | bytes | bytearray):
            yield where, value if isinstance(value, str) else value.decode("latin-1")
            continue
        if isinstance(value, BaseException):
            yield where, f"{value!s} {value!r}"
            waiting += [(f"{where}.{n}", getattr(value, n)) for n in ("args", "__cause__", "__context__")]
            waiting += [(f"{where}.__notes__", getattr(value, "__notes__", ()))]
            yield from _frames(where, value)
        if isinstance(value, dict):
            waiting += [(f"{where}[{k!r}]", part) for k, v in value.items() for part in (k, v)]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += [(f"{where}[…]", part) for part in value]
        elif not isinstance(value, type) and not callable(value):
            waiting += [(f"{where}.{n}", part) for n, part in getattr(value, "__dict__", {}).items()]


def _frames(where: str, error: BaseException) -> Iterator[tuple[str, str]]:
    """What an error reporter or a traceback with local variables would show of our frames."""
    step = error.__traceback__
    while step is not None:
        frame = step.tb_frame
        if str(frame.f_globals.get("__name__")).startswith("hsm_signer"):
            for name, value in frame.f_locals.items():
                yield f"{where}, {frame.f_code.co_qualname}, {name}", repr(value)
        step = step.tb_next
