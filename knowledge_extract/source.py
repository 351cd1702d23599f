"""Where a language model comes from, and what identifies it without saying where it lies."""

import hashlib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cache.assets import fetch
from cache.durable import refuse_full_disk
from cache.errors import ModelError
from cache.progress import track
from cache.recipe import digest_of
from cache.sharing.remote_errors import network_errors, quiet_hub
from cache.user_folder import user_cache
from knowledge_extract.gguf import Conversion
from knowledge_extract.quiet import quiet
from knowledge_extract.recipe_parts import ModelRecipe
from knowledge_extract.settings import RunSettings

TOKENIZER_FILES = frozenset({
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt",
    "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
})  # fmt: skip
CONFIG_FILES = frozenset({"config.json", "generation_config.json"})
SLOW_TO_HASH = 1 << 30


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: its identity, and how the libraries are pointed at it.

    Args:
        label: how messages call it.
        identity: what the cache records; no path.
        model_digest: SHA-256 that stands for weights and configuration.
        tokenizer_digest: SHA-256 that stands for the tokenizer's files.
        place: a folder or a hub id; None for a GGUF file.
        conversion: how a GGUF file is read; None otherwise.
        commit: of a hub model.
        offline: whether the network is out of bounds.
    """

    label: str
    identity: dict[str, Any]
    model_digest: str
    tokenizer_digest: str
    place: str | None = None
    conversion: Conversion | None = None
    commit: str | None = None
    offline: bool = False

    def texts(self) -> str:
        """Where configuration and tokenizer are; a GGUF file's are converted at the first call."""
        return self.place or str(self._conversion().tokenizer())

    def weights(self) -> str:
        """Where the weights are; fetched or converted if they are not here yet."""
        if self.commit is not None and not self.offline:
            _fetch_weights(self.label, self.commit)
        return self.place or str(self._conversion().weights())

    def hub_options(self) -> dict[str, Any]:
        """Arguments that pin every `from_pretrained` to the resolved commit."""
        if self.commit is None:
            return {"local_files_only": True}
        return {"revision": self.commit, "local_files_only": self.offline}

    def _conversion(self) -> Conversion:
        if self.conversion is None:
            what = "this model has neither a folder nor a GGUF file"
            raise ModelError(what, where=self.label)
        return self.conversion


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        what = f"the model file cannot be read ({error.__class__.__name__})"
        raise ModelError(what, where=path) from error


def _digests(paths: list[Path]) -> dict[str, str]:
    if sum(path.stat().st_size for path in paths) < SLOW_TO_HASH:
        return {path.name: file_digest(path) for path in paths}
    with track("hashing model files", len(paths)) as progress:
        found = {}
        for path in paths:
            found[path.name] = file_digest(path)
            progress.advance()
    return found


def from_folder(folder: Path) -> ModelSource:
    """A model in a local folder, identified by its base name and the digests of its files.

    Raises:
        ModelError: the folder, its configuration, weights or tokenizer are missing.
    """
    do = "Point model.folder at a folder written by save_pretrained."
    if not folder.is_dir():
        what = "no such model folder"
        raise ModelError(what, where=folder, do=do)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    weights = [p for p in files if p.suffix == ".safetensors"]
    weights = weights or [p for p in files if p.match("pytorch_model*.bin")]
    tokenizer = [p for p in files if p.name in TOKENIZER_FILES]
    wanted = {"config.json": (folder / "config.json").is_file()}
    wanted |= {"weights (*.safetensors)": bool(weights), "tokenizer": bool(tokenizer)}
    for part, present in wanted.items():
        if not present:
            what = f"the model folder has no {part}"
            raise ModelError(what, where=folder, do=do)
    rest = [p for p in files if p.name in CONFIG_FILES or p.name.endswith(".index.json")]
    model, words = _digests(weights + rest), _digests(tokenizer)
    name = folder.resolve().name
    return ModelSource(
        label=name,
        identity={"source": "folder", "name": name, "files": {**model, **words}},
        model_digest=digest_of(model),
        tokenizer_digest=digest_of(words),
        place=str(folder),
    )


def from_gguf(path: Path, models: Path | None, asset: str | None = None) -> ModelSource:
    """A model in a GGUF file, identified by its base name and digest.

    Raises:
        ModelError: no such file, or not a GGUF file.
    """
    if not path.is_file():
        what = "no such GGUF file"
        raise ModelError(what, where=path, do="Check model.gguf.")
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        what = "not a GGUF file"
        raise ModelError(what, where=path, found=repr(magic), wanted="it to start with b'GGUF'")
    digest = file_digest(path)
    root = (models or user_cache() / "models") / f"gguf-{digest[:32]}"
    conversion = Conversion(path, root)
    identity = {"source": "gguf", "name": path.name, "sha256": digest, "conversion": 1}
    if asset is not None:
        identity |= {"source": "asset", "name": asset}
    made = {"gguf": digest, "conversion": identity["conversion"]}
    return ModelSource(
        label=asset or path.name,
        identity=identity,
        model_digest=digest_of(made),
        tokenizer_digest=digest_of({**made, "part": "tokenizer"}),
        conversion=conversion,
    )


def from_hub(name: str, revision: str, *, offline: bool) -> ModelSource:
    """A hub model whose revision is resolved to a commit.

    Raises:
        ModelError: gated, missing, an unknown revision, or not here while offline.
    """
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        with quiet_hub():
            config = huggingface_hub.hf_hub_download(
                name, "config.json", revision=revision, local_files_only=offline
            )
    except hub.GatedRepoError as error:
        do = f"Accept its terms at https://huggingface.co/{name}, then run: hf auth login."
        what = "the model is gated"
        raise ModelError(what, where=name, do=do) from error
    except hub.RepositoryNotFoundError as error:
        do = "Check model.hub; a private model needs: hf auth login."
        what = "no such model on the hub"
        raise ModelError(what, where=name, do=do) from error
    except hub.RevisionNotFoundError as error:
        do = "Check model.revision."
        what = f"no revision {revision!r}"
        raise ModelError(what, where=name, do=do) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        what = f"revision {revision!r} is not on this machine and the hub was not reached"
        do = "Run once with a network, or give model.folder or model.gguf."
        do += " With HF_HUB_OFFLINE=1 only stored models are looked for, without waiting."
        raise ModelError(what, where=name, do=do) from error
    except hub.EntryNotFoundError as error:
        do = "Choose a repository in transformers format."
        what = "the repository has no config.json"
        raise ModelError(what, where=name, do=do) from error
    except (hub.HfHubHTTPError, hub.HFValidationError, OSError) as error:
        refuse_full_disk(error, name)
        what = "the hub refused"
        raise ModelError(what, where=name, found=str(error)[:200]) from error
    commit = Path(config).parent.name
    identity = {"source": "hub", "name": name, "commit": commit}
    return ModelSource(
        label=name,
        identity=identity,
        model_digest=digest_of(identity),
        tokenizer_digest=digest_of({**identity, "part": "tokenizer"}),
        place=name,
        commit=commit,
        offline=offline,
    )


def _fetch_weights(name: str, commit: str) -> None:
    """Downloads what is missing of a model's weights, with progress by file.

    Raises:
        ModelError: the hub refused.
    """
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        with quiet_hub():
            files = huggingface_hub.HfApi().list_repo_files(name, revision=commit)
        weights = [f for f in files if f.endswith(".safetensors") and "/" not in f]
        weights = weights or [f for f in files if fnmatch(f, "pytorch_model*.bin")]
        cached = huggingface_hub.try_to_load_from_cache
        left = [f for f in weights if not isinstance(cached(name, f, revision=commit), str)]
        if not left:
            return
        with quiet(), track(f"fetching {name}", len(left)) as progress:
            for file in left:
                huggingface_hub.hf_hub_download(name, file, revision=commit)
                progress.advance()
    except (hub.OfflineModeIsEnabled, ConnectionError, TimeoutError):
        return  # what is here may be enough; the loader says if it is not
    except (hub.HfHubHTTPError, OSError) as error:
        refuse_full_disk(error, name)
        what = "the weights cannot be fetched"
        raise ModelError(what, where=name, found=str(error)[:200]) from error
    except network_errors():
        return  # the HTTP library's own errors, of a hub that was not reached


def find(model: ModelRecipe, run: RunSettings) -> ModelSource:
    """The model a recipe names; downloads no weights.

    Raises:
        ModelError: it is not there, see `from_hub`, `from_folder`, `from_gguf`.
        UnknownNameError: no such asset.
    """
    if model.hub:
        return from_hub(model.hub, model.revision, offline=run.offline)
    if model.folder:
        return from_folder(Path(model.folder).expanduser())
    if model.gguf:
        return from_gguf(Path(model.gguf).expanduser(), run.models)
    name = str(model.asset)
    path = fetch(name)
    if path.is_dir():
        return from_folder(path)
    return from_gguf(path, run.models, asset=name)
