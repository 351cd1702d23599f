"""What runs in one process share, loaded once: data, backbones, caches, image features."""

from pathlib import Path

from cache.store import KnowledgeCache
from prompt_tune.backbone import Backbone, BackboneSpec, load_backbone
from prompt_tune.data.source import DataSource, load_data
from prompt_tune.features import FeatureStore, store_of, view_name


class Shelf:
    """Keeps what it loads. Nothing on it is changed by a run, so runs that share it stay alone."""

    def __init__(self) -> None:
        self._data: dict[tuple[str, tuple[str, ...] | None], DataSource] = {}
        self._backbones: dict[tuple[str, str], Backbone] = {}
        self._caches: dict[tuple[Path, str | None], KnowledgeCache] = {}
        self._stores: dict[tuple[str, str, str], FeatureStore] = {}

    def data(self, declared: str, classes: tuple[str, ...] | None = None) -> DataSource:
        """The images of a declaration or path, of all classes or of some; see `load_data`.

        Raises:
            DataError: an unknown class; the nearest is named.
        """
        key = (declared, classes)
        if key not in self._data:
            if classes is None:
                self._data[key] = load_data(declared)
            else:
                whole = self.data(declared)
                self._data[key] = whole.select(whole.ordered(classes))
        return self._data[key]

    def backbone(self, spec: BackboneSpec, device: str) -> Backbone:
        """A frozen backbone; see `load_backbone`."""
        key = (spec.model_dump_json(), device)
        if key not in self._backbones:
            self._backbones[key] = load_backbone(spec, device=device)
        return self._backbones[key]

    def cache(self, path: Path, expect: str | None) -> KnowledgeCache:
        """An open cache, whose datasets are digested when they are first touched."""
        key = (path.absolute(), expect)
        if key not in self._caches:
            self._caches[key] = KnowledgeCache.open(path, expect=expect)
        return self._caches[key]

    def features(self, backbone: Backbone, view: int, seed: int) -> FeatureStore:
        """The image features of one tower under one view; see `store_of`."""
        name = view_name(view, seed, flip=backbone.preprocess.flip)
        key = (backbone.image_fingerprint, backbone.preprocess.digest, name)
        if key not in self._stores:
            self._stores[key] = store_of(backbone, view, seed)
        return self._stores[key]
