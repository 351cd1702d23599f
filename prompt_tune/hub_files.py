"""Files of a model on the Hugging Face hub, and one clear line for whatever goes wrong there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cache.durable import refuse_full_disk
from cache.errors import ModelError
from cache.sharing.remote_errors import quiet_hub

PREFETCH = (
    "Fetch it once while online (`hf download {}`); later runs work offline, and with "
    "HF_HUB_OFFLINE=1 without waiting for the hub."
)


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turns what the hub client and transformers raise into one line.

    Raises:
        ModelError: gated, unknown, or absent while offline.
        StorageError: no space left.
    """
    from huggingface_hub import errors

    try:
        with quiet_hub():
            yield
    except errors.GatedRepoError as error:
        do = "Accept its terms on its page, log in with `hf auth login`, and try again."
        what = "the model is gated"
        raise ModelError(what, where=repo, do=do) from error
    except errors.RevisionNotFoundError as error:
        what = "the hub model has no such revision"
        raise ModelError(what, where=repo) from error
    except errors.RepositoryNotFoundError as error:
        do = "Check the name; a private model needs `hf auth login`."
        what = "the hub has no such model, or it is private"
        raise ModelError(what, where=repo, do=do) from error
    except errors.HFValidationError as error:
        wanted = "organisation/name"
        what = "not the name of a hub model"
        raise ModelError(what, where=repo, wanted=wanted) from error
    except (errors.HfHubHTTPError, OSError) as error:
        refuse_full_disk(error, repo)
        what = "the model is not here and cannot be fetched (offline?)"
        raise ModelError(what, where=repo, do=PREFETCH.format(repo)) from error


def hub_folder(
    repo: str, revision: str | None, *, first: str, one_of: Sequence[str], others: Sequence[str]
) -> Path:
    """The local copy of a hub model: `first`, one of `one_of`, and whatever exists of `others`.

    The folder is named after the commit.

    Raises:
        ModelError: gated, unknown, lacking a file, or absent while offline.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    away = False

    def get(name: str) -> Path | None:
        nonlocal away
        try:
            return Path(hf_hub_download(repo, name, revision=revision, local_files_only=away))
        except LocalEntryNotFoundError:
            away = True  # the client tried long enough for all files
            return None
        except EntryNotFoundError:
            return None

    with hub_errors(repo):
        file = get(first)
        if file is None or not any(get(name) for name in one_of):
            what = f"the hub model has no {first if file is None else 'weights'} here"
            do = f"Not an open_clip model, or offline. {PREFETCH.format(repo)}"
            raise ModelError(what, where=repo, do=do)
        for name in others:
            get(name)
    return file.parent
