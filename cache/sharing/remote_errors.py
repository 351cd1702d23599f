"""What libraries raise about a remote file, as one clear line without passwords or signatures."""

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cache.durable import storage_errors
from cache.errors import StorageError

NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError"}  # of botocore
RESUME = "Run the same command again; it goes on where it stopped."


class BrokenConnectionError(StorageError):
    """The network or a server failed; trying again may help."""


def network_errors() -> tuple[type[Exception], ...]:
    """What the libraries in use raise when a server fails; only what is loaded can be raised."""
    found: list[type[Exception]] = [OSError, EOFError, ValueError]
    for module, name in (
        ("aiohttp", "ClientError"),
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("httpx2", "HTTPError"),
        ("huggingface_hub.errors", "HfHubHTTPError"),
        ("fsspec.exceptions", "FSTimeoutError"),
    ):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def plain_reason(error: BaseException) -> str:
    """What an error says, without addresses: those may hold passwords or signatures."""
    said = re.sub(r"\w+://\S+|\S*[?&]\S+=\S+", "an address", str(error))
    return f"{type(error).__name__}: {said}"[:200]


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silences the hub client's log, a line for every attempt: our error is one line of its own."""
    log = importlib.import_module("huggingface_hub.utils.logging")
    level = log.get_verbosity()
    log.set_verbosity(log.CRITICAL)
    try:
        yield
    finally:
        log.set_verbosity(level)


@contextmanager
def remote_errors(shown: str) -> Iterator[None]:
    """Turns what libraries raise into one line about `shown`; a missing file stays itself.

    Raises:
        FileNotFoundError: the file is not there.
        StorageError: anything else that a server or the network did.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except network_errors() as error:
        refused = getattr(error, "status", None) in {401, 403}
        refused = refused or type(error).__name__ in NO_CREDENTIALS
        if refused or (isinstance(error, PermissionError) and "://" in shown):
            do = "Set or check your credentials (aws configure, hf auth login) or the permissions "
            do += "there."
            what = "no permission"
            raise StorageError(what, where=shown, found=plain_reason(error), do=do) from error
        if "://" not in shown and isinstance(error, OSError):
            with storage_errors(shown):
                raise
        what, found = "the connection failed", plain_reason(error)
        raise BrokenConnectionError(what, where=shown, found=found, do=RESUME) from error
