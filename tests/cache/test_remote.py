"""Push and pull: folders, real HTTP and S3 servers on loopback, and a server like the hub."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cache.errors import (
    CacheFormatError,
    CacheMismatchError,
    MissingExtraError,
    RecipeError,
    StorageError,
    ValueRefusedError,
)
from cache.sharing import remote_file
from cache.sharing.remote import pull, push
from cache.sharing.remote_errors import BrokenConnectionError, remote_errors
from cache.sharing.remote_file import LocalFile, remote_at

ROOT = Path(__file__).parents[2]
needs_http = pytest.mark.skipif(
    importlib.util.find_spec("aiohttp") is None, reason="aiohttp is not installed"
)
PARTS = 100_000  # bytes


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


servers = _load("servers")


class Shared:
    """A cache of about a megabyte that may be shared, in memory."""

    def __init__(self, make: ModuleType, folder: Path, name: str, seed: int = 0) -> None:
        made = make.header(blocks={"embedded": make.BLOCKS["embedded"]}, recipe={})
        shards = make.ShardFolder(folder / f"{name}.parts", header=made)
        for record in make.CLASSES:
            entry = make.entry("embedded", record.id, seed=seed, rows=12_000)
            shards.commit([entry], batch_shape=(1,))
        self.content_id = make.seal(shards, folder / name)
        self.data = (folder / name).read_bytes()


@pytest.fixture(scope="module")
def shared(make: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(make, tmp_path_factory.mktemp("shared"), "k.h5")


@pytest.fixture(scope="module")
def other(make: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(make, tmp_path_factory.mktemp("other"), "k.h5", seed=1)


@pytest.fixture
def file(shared: Shared, tmp_path: Path) -> Path:
    path = tmp_path / "mine" / "k.h5"
    path.parent.mkdir()
    path.write_bytes(shared.data)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "k.h5"


@pytest.fixture
def web(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr("cache.sharing.pulling.PAUSE", 0.01)
    with servers.serving() as server:
        server.files["/a/k.h5"] = shared.data
        server.url = f"{server.address}/a/k.h5"
        yield server


def left(out: Path) -> list[str]:
    """Whatever is in the folder besides the file itself."""
    return sorted(p.name for p in out.parent.iterdir() if p != out)


# --- folders -----------------------------------------------------------------------------------


def test_a_cache_goes_to_a_folder_and_comes_back(shared: Shared, file: Path, out: Path) -> None:
    (file.parent / "k.h5.sig").write_bytes(b"-----BEGIN SSH SIGNATURE-----\n")
    there = file.parent.parent / "there"
    there.mkdir()
    pushed = push(file, f"{there}/")
    assert (there / "k.h5").read_bytes() == shared.data
    assert "licence Apache-2.0: permissive" in (there / "k.h5.NOTICE").read_text()
    assert not pushed.already and pushed.content_id == shared.content_id
    assert "gated: not stated" in pushed.describe() and "only 3 classes" in pushed.describe()
    assert json.loads(json.dumps(pushed.to_json()))["beside"] == ["k.h5.NOTICE", "k.h5.sig"]
    pulled = pull((there / "k.h5").as_uri(), out, expect=shared.content_id[:16])
    assert out.read_bytes() == shared.data
    assert left(out) == ["k.h5.sig"] and pulled.signature == out.with_name("k.h5.sig")
    assert not pulled.already and pulled.pinned and "pulled and verified" in pulled.describe()
    assert "not pinned" in pull(str(there / "k.h5"), out).describe()
    assert pull(str(there / "k.h5"), out).already


def test_the_folders_of_both_ends_are_made(shared: Shared, file: Path, out: Path) -> None:
    there = out.parent / "there" / "below"
    push(file, f"{there}/")
    pull(str(there / "k.h5"), out.parent / "here" / "below" / "mine.h5")
    assert (out.parent / "here" / "below" / "mine.h5").read_bytes() == shared.data


def test_the_same_content_twice_changes_nothing(file: Path, out: Path) -> None:
    push(file, str(out))
    before = out.stat()
    again = push(file, str(out))
    assert again.already and out.stat().st_mtime_ns == before.st_mtime_ns
    assert "was already there" in again.describe()


def test_another_content_never_replaces_what_is_there(file: Path, out: Path, other: Shared) -> None:
    for found, said in ((other.data, "another knowledge cache is there"), (b"x", "not a knowl")):
        out.write_bytes(found)
        with pytest.raises(CacheMismatchError, match=said):
            push(file, str(out))
        with pytest.raises(CacheMismatchError, match=r"another knowledge cache has|is not a know"):
            pull(str(file), out)
        assert out.read_bytes() == found and left(out) == []


def test_what_was_pushed_is_read_back(
    file: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(self: LocalFile, source: Path) -> None:
        raw = bytearray(source.read_bytes())
        raw[-1] ^= 1
        self.path.write_bytes(raw)

    monkeypatch.setattr(LocalFile, "_put", spoil)
    with pytest.raises(CacheFormatError, match="what is there now is not what was pushed"):
        push(file, str(out))
    assert push(file, str(out), read_back="header").already  # the header alone cannot tell


def test_a_damaged_cache_is_not_pushed(file: Path, out: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CacheFormatError, match="digest differs"):
        push(file, str(out))
    assert not out.exists()


# --- what must not leave -----------------------------------------------------------------------


@pytest.mark.parametrize("licence", ["cc-by-nc-4.0", "cc-by-nd-4.0", "other", None])
def test_a_strict_licence_needs_consent(
    make: ModuleType, tmp_path: Path, licence: str | None
) -> None:
    provenance = {"model_gated": "yes"} | ({"model_licence": licence} if licence else {})
    blocks = {"embedded": make.BLOCKS["embedded"]}
    make.cache_at(tmp_path / "k.h5", blocks=blocks, recipe={}, provenance=provenance)
    with pytest.raises(ValueRefusedError, match=r"licence of a source.*gated: yes.*accept-lic"):
        push(tmp_path / "k.h5", str(tmp_path / "there.h5"), accept_privacy=True)
    assert not (tmp_path / "there.h5").exists()
    report = push(tmp_path / "k.h5", str(tmp_path / "there.h5"), accept_licence=True)
    assert report.gated == "yes" and licence in (None, report.licences[0].split()[1].rstrip(":"))


def test_personal_data_needs_consent(make: ModuleType, tmp_path: Path) -> None:
    classes = (*make.CLASSES[:2], make.ClassRecord("c", "nodule of Mrs. Jones, 2021-03-04"))
    blocks = {"embedded": make.BLOCKS["embedded"]}
    header = make.header(blocks=blocks, recipe={}, classes=classes)
    folder = make.ShardFolder(tmp_path / "k.parts", header=header)
    folder.commit([make.entry("embedded", "c")], batch_shape=(1,))
    make.seal(folder, tmp_path / "k.h5")
    with pytest.raises(ValueRefusedError, match=r"personal data.*class c, name.*--accept-privacy"):
        push(tmp_path / "k.h5", str(tmp_path / "there.h5"), accept_licence=True)
    assert not (tmp_path / "there.h5").exists()
    report = push(tmp_path / "k.h5", str(tmp_path / "there.h5"), accept_privacy=True)
    assert {finding.what for finding in report.findings} == {"date", "name of a person"}


def _features(path: Path) -> None:
    metadata = {"__metadata__": {"patient_derived": "true", "format": "vademecum features 1"}}
    text = json.dumps(metadata).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def test_image_features_never_leave_the_machine(
    make: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VADEMECUM_HOME", str(tmp_path / "home"))
    marked = tmp_path / "marked.h5"
    blocks = {"embedded": make.BLOCKS["embedded"]}
    provenance = {**make.PROVENANCE, "patient_derived": "yes"}
    make.cache_at(marked, blocks=blocks, recipe={}, provenance=provenance)
    images = tmp_path / "images.h5"
    spec = make.BlockSpec("embeddings", {"source": "images"}, "f4", (), 7)
    made = make.header(blocks={"embedded": spec}, recipe={})
    folder = make.ShardFolder(tmp_path / "i.parts", header=made)
    folder.commit([make.entry("embedded", "ig")], batch_shape=(1,))
    make.seal(folder, images)
    stored = tmp_path / "home" / "features" / "tower" / "view-0" / "x.safetensors"
    stored.parent.mkdir(parents=True)
    stored.write_bytes(b"features without a mark")
    _features(tmp_path / "copied.h5")
    for path in (marked, images, stored, tmp_path / "copied.h5"):
        with pytest.raises(ValueRefusedError, match="made from patients' images"):
            push(path, str(tmp_path / "there.h5"), accept_licence=True, accept_privacy=True)
    assert not (tmp_path / "there.h5").exists()


def test_only_sealed_knowledge_caches_are_pushed(make: ModuleType, tmp_path: Path) -> None:
    folder = make.ShardFolder(tmp_path / "k.parts", header=make.header())
    folder.commit([make.entry("embedded", "ig")], batch_shape=(1,))
    (tmp_path / "k.parts" / "text").write_text("something else")
    for path in (tmp_path / "k.parts").iterdir():
        with pytest.raises(CacheFormatError, match="not a knowledge cache"):
            push(path, str(tmp_path / "there.h5"), accept_licence=True, accept_privacy=True)


# --- addresses ---------------------------------------------------------------------------------


def test_addresses_of_other_kinds_are_refused(file: Path, tmp_path: Path) -> None:
    for address in ("ftp://host/k.h5", "simplecache::s3://b/k.h5", "memory://k.h5"):
        with pytest.raises(RecipeError, match=r"an address of an unknown kind"):
            remote_at(address)
    with pytest.raises(RecipeError, match="names a folder"):
        pull(f"{tmp_path}/", tmp_path / "k.h5")
    with pytest.raises(StorageError, match=r"is a folder. Name a file"):
        pull(str(file), tmp_path)


@needs_http
def test_a_web_server_cannot_be_pushed_to(file: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot be written to.*Push to a folder"):
        push(file, "https://example.org/k.h5")


@pytest.mark.parametrize(
    ("address", "package"),
    [("s3://b/k.h5", "s3fs"), ("https://h/k.h5", "aiohttp"), ("hf://a/b/k.h5", "huggingface_hub")],
)
def test_a_missing_library_is_named(
    address: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> object:
        return None if name == package else object()

    monkeypatch.setattr(remote_file.importlib.util, "find_spec", find)
    with pytest.raises(
        MissingExtraError, match=rf"{package}.*pip install .* -e '.\[share\]' in the"
    ):
        remote_at(address)


# --- HTTP --------------------------------------------------------------------------------------


@needs_http
def test_a_pull_goes_on_after_dropped_connections(web: Any, shared: Shared, out: Path) -> None:
    web.cuts = [len(shared.data), PARTS, PARTS, PARTS]  # the first is for the header
    report = pull(web.url, out, expect=shared.content_id)
    assert out.read_bytes() == shared.data and left(out) == []
    assert report.size == len(shared.data) and not report.already
    starts = [start for path, start in web.asked if path == "/a/k.h5"]
    assert starts == sorted(starts) and len(set(starts[1:])) == 4 and len(starts) == 5


@needs_http
def test_a_failed_pull_keeps_what_arrived_and_the_next_one_uses_it(
    web: Any, shared: Shared, out: Path
) -> None:
    web.cuts = [len(shared.data), PARTS, 0, 0, 0]
    with pytest.raises(StorageError, match=r"the connection failed.*goes on where it stopped"):
        pull(web.url, out)
    assert not out.exists() and [n.startswith(".pull-") for n in left(out)] == [True]
    kept = (out.parent / left(out)[0]).stat().st_size
    web.asked.clear()
    report = pull(web.url, out)
    assert report.resumed == kept > 0 and "interrupted pull" in report.describe()
    assert out.read_bytes() == shared.data and left(out) == []
    assert web.asked[:2] == [("/a/k.h5", 0), ("/a/k.h5", kept)]


@needs_http
def test_a_pull_goes_on_after_kill_9(web: Any, shared: Shared, out: Path) -> None:
    web.cuts = [len(shared.data), PARTS]
    web.hold.clear()
    code = "import sys, pathlib; from cache.sharing.remote import pull; "
    code += "pull(sys.argv[1], pathlib.Path(sys.argv[2]))"
    child = subprocess.Popen([sys.executable, "-c", code, web.url, str(out)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size == PARTS for p in out.parent.iterdir()):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    web.hold.set()
    assert len(left(out)) == 1 and not out.exists()
    assert pull(web.url, out).resumed == PARTS
    assert out.read_bytes() == shared.data and left(out) == []


@needs_http
def test_a_damaged_partial_is_not_trusted(web: Any, shared: Shared, out: Path) -> None:
    web.cuts = [len(shared.data), PARTS, 0, 0, 0]
    with pytest.raises(StorageError):
        pull(web.url, out)
    partial = out.parent / left(out)[0]
    raw = bytearray(partial.read_bytes())
    raw[-1] ^= 1
    partial.write_bytes(raw)
    assert pull(web.url, out).resumed == 0
    assert out.read_bytes() == shared.data and left(out) == []
    out.unlink()
    partial.write_bytes(shared.data + b"more")  # longer than the file will be
    assert pull(web.url, out).resumed == 0
    assert out.read_bytes() == shared.data and left(out) == []


@needs_http
def test_a_server_that_ignores_ranges_is_read_from_the_start(
    web: Any, shared: Shared, out: Path
) -> None:
    web.ranges, web.cuts = False, [len(shared.data), PARTS]
    assert pull(web.url, out).size == len(shared.data)
    assert out.read_bytes() == shared.data
    assert [start > 0 for _, start in web.asked[:3]] == [False, False, True]


@needs_http
@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_server_that_lies_about_the_length(
    web: Any, shared: Shared, out: Path, off_by: int
) -> None:
    web.length_off_by = off_by
    if off_by > 0:  # more was promised: the file is whole, or there is none
        with suppress(BrokenConnectionError):
            assert pull(web.url, out).content_id == shared.content_id
        assert not out.exists() or out.read_bytes() == shared.data
        return
    web.files["/a/k.h5"] = shared.data[:-1]
    web.length_off_by = 0
    with pytest.raises(StorageError, match=f"it ended after {len(shared.data) - 1} of"):
        pull(web.url, out)
    assert not out.exists()


@needs_http
def test_other_bytes_than_the_header_says_are_refused_and_not_kept(
    web: Any, shared: Shared, out: Path
) -> None:
    for place in (len(shared.data) - 1, len(shared.data) // 2):
        raw = bytearray(shared.data)
        raw[place] ^= 1
        web.files["/a/k.h5"] = bytes(raw)
        with pytest.raises(CacheFormatError, match=r"what arrived is not what.*Nothing was kept"):
            pull(web.url, out, expect=shared.content_id)
        assert not out.exists() and left(out) == []


@needs_http
def test_another_content_is_refused_before_it_is_downloaded(
    web: Any, other: Shared, out: Path
) -> None:
    with pytest.raises(CacheMismatchError, match=r"another content id than expected"):
        pull(web.url, out, expect=other.content_id)
    assert len(web.asked) == 1 and left(out) == []


@needs_http
def test_what_is_no_cache_is_refused_before_it_is_downloaded(
    web: Any, make: ModuleType, out: Path, tmp_path: Path
) -> None:
    web.files["/page"] = b"<html>Sign in</html>"
    web.files["/short"] = web.files["/a/k.h5"][:100]
    make.ShardFolder(tmp_path / "k.parts", header=make.header())
    web.files["/part"] = (tmp_path / "k.parts" / "extraction.h5").read_bytes()
    huge = tmp_path / "huge.h5"
    huge.write_bytes(web.files["/a/k.h5"])
    make.reforge(huge, lambda body: {**body, "size": 1 << 50})
    web.files["/huge"] = huge.read_bytes()
    for name, error, said in (
        ("page", CacheFormatError, "not a knowledge cache"),
        ("short", CacheFormatError, "the header is damaged"),
        ("part", CacheFormatError, "unfinished extraction"),
        ("none", CacheFormatError, "there is no such file. Check the address"),
        ("huge", StorageError, "no space left"),
    ):
        web.asked.clear()
        with pytest.raises(error, match=said):
            pull(f"{web.address}/{name}", out)
        assert len(web.asked) <= 1 and not out.exists()


@needs_http
def test_passwords_and_signatures_of_an_address_are_not_shown(web: Any, out: Path) -> None:
    web.status = 403
    address = web.url.replace("http://", "http://me:secret@") + "?X-Amz-Signature=hidden"
    with pytest.raises(StorageError) as caught:
        pull(address, out)
    assert "403" in str(caught.value)
    assert "secret" not in str(caught.value) and "hidden" not in str(caught.value)
    web.status = 0
    assert pull(address, out).url == web.url


@needs_http
def test_what_got_the_name_meanwhile_is_not_replaced(
    web: Any, other: Shared, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*arguments: Any) -> None:
        out.write_bytes(other.data)

    monkeypatch.setattr("cache.sharing.pulling._check", late)
    with pytest.raises(CacheMismatchError, match="another knowledge cache has this name"):
        pull(web.url, out)
    assert out.read_bytes() == other.data and left(out) == []


@needs_http
def test_two_pulls_at_once_end_with_one_sound_file(web: Any, shared: Shared, out: Path) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            pull(web.url, out, expect=shared.content_id)
        except BaseException as error:  # noqa: BLE001 - whatever a thread raises is shown
            failed.append(error)

    web.cuts = [PARTS, PARTS, PARTS, PARTS, PARTS]
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert out.read_bytes() == shared.data and left(out) == []


# --- S3 ----------------------------------------------------------------------------------------


def test_absent_credentials_are_said() -> None:
    from botocore.exceptions import NoCredentialsError

    said = r"s3://lab/k.h5: no permission; found NoCredentials.*Set or check your credentials"
    with pytest.raises(StorageError, match=said), remote_errors("s3://lab/k.h5"):
        raise NoCredentialsError


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        store = importlib.import_module("s3fs").S3FileSystem(skip_instance_cache=True)
        store.mkdir("lab")
        yield store
    server.stop()


def test_a_cache_goes_to_s3_and_comes_back(
    bucket: Any, shared: Shared, other: Shared, file: Path, out: Path
) -> None:
    pushed = push(file, "s3://lab/caches/")
    assert pushed.url == "s3://lab/caches/k.h5" and not pushed.already
    assert bucket.cat("lab/caches/k.h5") == shared.data
    assert b"licence Apache-2.0" in bucket.cat("lab/caches/k.h5.NOTICE")
    assert push(file, "s3://lab/caches/k.h5").already
    assert pull("s3://lab/caches/k.h5", out, expect=shared.content_id).size == len(shared.data)
    assert out.read_bytes() == shared.data and left(out) == []
    bucket.pipe("lab/other.h5", other.data)
    with pytest.raises(CacheMismatchError, match=r"another knowledge cache is there"):
        push(file, "s3://lab/other.h5")
    assert bucket.cat("lab/other.h5") == other.data


def test_a_pull_from_s3_goes_on_where_it_stopped(
    bucket: Any, shared: Shared, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.sharing.pulling.PAUSE", 0.01)
    monkeypatch.setattr("cache.sharing.pulling.CHUNK", PARTS)
    bucket.pipe("lab/cut.h5", shared.data[: 3 * PARTS])
    with pytest.raises(StorageError, match=f"it ended after {3 * PARTS} of"):
        pull("s3://lab/cut.h5", out)
    bucket.pipe("lab/cut.h5", shared.data)
    assert pull("s3://lab/cut.h5", out).resumed == 3 * PARTS
    assert out.read_bytes() == shared.data and left(out) == []


def test_what_is_missing_on_s3_is_said(bucket: Any, file: Path, out: Path) -> None:
    with pytest.raises(CacheFormatError, match=r"s3://lab/none.h5: there is no such file"):
        pull("s3://lab/none.h5", out)
    with pytest.raises(StorageError, match=r"s3://nobody/k.h5: no such bucket.*Create it first"):
        push(file, "s3://nobody/k.h5")


# --- the hub -----------------------------------------------------------------------------------

HUB = """
import json, sys
from pathlib import Path
from cache.errors import VademecumError
from cache.sharing.remote import pull, push

file, out, content_id = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
url = "hf://lab/knowledge/caches/k.h5"
said = [push(file, "hf://lab/knowledge/caches/").to_json(), push(file, url).to_json()]
said.append({"resumed": pull(url, out, expect=content_id).resumed})
for address in ("hf://lab/knowledge/none.h5", "hf://lab/none/k.h5"):
    try:
        pull(address, out)
    except VademecumError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_a_cache_goes_to_a_hub_and_comes_back(shared: Shared, file: Path, out: Path) -> None:
    """Against our server only; the endpoint is read when the library is imported."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    with servers.serving(servers.hub()) as server:
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(out.parent / "home"),
            "HF_TOKEN": "hf_testing",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        environment.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-c", HUB, str(file), str(out), shared.content_id]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert server.files["caches/k.h5"] == shared.data
        assert b"licence Apache-2.0" in server.files["caches/k.h5.NOTICE"]
    first, again, pulled, *refused = json.loads(done.stdout)
    assert not first["already"] and again["already"] and pulled == {"resumed": 0}
    assert [text.split(": ")[1].split(".")[0] for text in refused] == ["there is no such file"] * 2
    assert out.read_bytes() == shared.data


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://KEY:SECRET@bucket/x.h5", "s3://bucket/x.h5"),
        ("s3://bucket/x.h5?X-Amz-Signature=abc", "s3://bucket/x.h5"),
        ("hf://org/name@main/x.h5", "hf://org/name@main/x.h5"),
        ("https://me:secret@host/x.h5?token=abc", "https://host/x.h5"),
    ],
)
def test_no_secret_of_an_address_is_shown(address, shown):
    assert remote_file.remote_at(address).shown == shown


def test_a_signature_of_ones_own_is_not_replaced(make, tmp_path):
    make.tiny_cache_at(tmp_path / "a.h5")
    start = "-----BEGIN SSH SIGNATURE-----\n"
    (tmp_path / "a.h5.sig").write_text(start + "theirs")
    (tmp_path / "b.h5").write_bytes((tmp_path / "a.h5").read_bytes())
    (tmp_path / "b.h5.sig").write_text("mine")
    pull(str(tmp_path / "a.h5"), tmp_path / "b.h5")
    assert (tmp_path / "b.h5.sig").read_text() == "mine"
    pull(str(tmp_path / "a.h5"), tmp_path / "c.h5")
    assert (tmp_path / "c.h5.sig").read_text().endswith("theirs")
