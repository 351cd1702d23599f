"""Hostile run folders: weights, training state and run.json are refused in one clear line."""

import json
import os
import struct
import time

import pytest
import safetensors.torch
import torch
from torch import nn

from cache.errors import RunError
from prompt_tune import checkpoint
from prompt_tune.checkpoint import (
    RUN,
    STATE,
    WEIGHTS,
    TrainState,
    load_state,
    load_weights,
    read_json,
    read_run,
    save_state,
)
from prompt_tune.compare import compare_runs
from prompt_tune.evaluation import load_run

DIGEST = "ab" * 32


def parameters():
    return {"a": nn.Parameter(torch.ones(2, 3)), "b": nn.Parameter(torch.zeros(4))}


def good():
    return {"a": torch.full((2, 3), 5.0), "b": torch.full((4,), 6.0)}


def packed(header, data=b""):
    """Any bytes or table as the header of a safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start, stop, shape=(2, 3), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


A, B, DATA = tensor(0, 24), tensor(24, 40, (4,)), bytes(40)
HOSTILE_WEIGHTS = {
    "empty": (b"", "length of the header is impossible"),
    "pickle": (b"\x80\x04cos\nsystem\n.", "length of the header is impossible"),
    "zip": (b"PK\x03\x04" + bytes(100), "length of the header is impossible"),
    "header of 2^63": (struct.pack("<Q", 1 << 63), "length of the header is impossible"),
    "header of 100 MB": (struct.pack("<Q", 100_000_000), "length of the header is impossible"),
    "header cut": (packed({"a": A, "b": B})[:60], "its header is not JSON"),
    "header a list": (packed([1]), "not a table of tables"),
    "header of numbers": (packed({"a": 1, "b": 2}), "not a table of tables"),
    "header deep": (packed(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"), "inside each other"),
    "header not UTF-8": (packed(b'{"\xff": 1}'), "its header is not JSON"),
    "a name twice": (
        packed(b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(B).encode() + b"}", DATA),
        "a key stands twice",
    ),
    "notes of numbers": (packed({"a": A, "b": B, "__metadata__": {"x": 1}}, DATA), "not a table"),
    "60k tensors": (packed({f"t{n}": {} for n in range(60000)}), "is unexpected"),
    "extra tensor": (packed({"a": A, "b": B, "c": tensor(40, 44, (1,))}, bytes(44)), "unexpected"),
    "name of traversal": (
        packed({"a": A, "b": B, "../../x": tensor(40, 44, (1,))}, bytes(44)),
        "tensor '../../x' is unexpected",
    ),
    "missing tensor": (packed({"a": A}, bytes(24)), "tensor 'b' is missing"),
    "wrong shape": (packed({"a": tensor(0, 24, (3, 2)), "b": B}, DATA), "does not fit"),
    "shape of 2^62": (packed({"a": tensor(0, 24, (1 << 62,)), "b": B}, DATA), "does not fit"),
    "shape negative": (packed({"a": tensor(0, 24, (-2, -3)), "b": B}, DATA), "does not fit"),
    "shape text": (packed({"a": {**A, "shape": "x" * 500000}, "b": B}, DATA), "does not fit"),
    "wrong dtype": (packed({"a": {**A, "dtype": "I32"}, "b": B}, DATA), "does not fit"),
    "dtype list": (packed({"a": {**A, "dtype": ["F32"]}, "b": B}, DATA), "does not fit"),
    "cut": (packed({"a": A, "b": B}, DATA[:-1]), "another size than its header says"),
    "trailing": (packed({"a": A, "b": B}, DATA + b"#!/bin/sh"), "another size"),
    "overlapping": (packed({"a": A, "b": tensor(8, 24, (4,))}, DATA), "cannot be read"),
    "offsets past the end": (packed({"a": A, "b": tensor(80, 96, (4,))}, DATA), "cannot be read"),
    "offsets negative": (packed({"a": tensor(-24, 0), "b": B}, DATA), "cannot be read"),
    "offsets backwards": (packed({"a": tensor(24, 0), "b": B}, DATA), "cannot be read"),
    "offsets missing": (packed({"a": {"dtype": "F32", "shape": [2, 3]}, "b": B}, DATA), "read"),
    "NaN": (
        safetensors.torch.save(good() | {"b": torch.tensor([0, 0, float("nan"), 0])}),
        "tensor 'b' has non-finite values",
    ),
    "infinite": (
        safetensors.torch.save(good() | {"b": torch.tensor([0, 0, float("inf"), 0])}),
        "tensor 'b' has non-finite values",
    ),
}


def one_line(error, path):
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    assert len(text) < 500


@pytest.mark.parametrize("name", sorted(HOSTILE_WEIGHTS))
def test_hostile_weights_are_refused_and_change_nothing(tmp_path, name):
    raw, message = HOSTILE_WEIGHTS[name]
    path, into = tmp_path / WEIGHTS, parameters()
    path.write_bytes(raw)
    with pytest.raises(RunError, match=message) as error:
        load_weights(path, into)
    one_line(error, path)
    assert into["a"].eq(1).all()
    assert into["b"].eq(0).all()


def test_good_weights_are_loaded(tmp_path):
    into = parameters()
    (tmp_path / WEIGHTS).write_bytes(safetensors.torch.save(good()))
    load_weights(tmp_path / WEIGHTS, into)
    assert into["a"].eq(5).all()
    assert into["b"].eq(6).all()


def specials(folder, name):
    """A FIFO, a device, a folder and a symlink loop in place of a file; each once."""
    path = folder / name
    for how in ("fifo", "device", "folder", "loop", "dangling"):
        if how == "fifo":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()
        else:
            target = {"device": "/dev/zero", "loop": path, "dangling": folder / "no"}[how]
            path.symlink_to(target)
        yield how
        path.rmdir() if how == "folder" else path.unlink()


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_at_once(tmp_path):
    start = time.process_time()
    for _ in specials(tmp_path, WEIGHTS):
        with pytest.raises(RunError, match=r"not a regular file|cannot be read"):
            load_weights(tmp_path / WEIGHTS, parameters())
    for _ in specials(tmp_path, RUN):
        with pytest.raises(RunError, match=r"regular file|cannot be read|not a run folder"):
            read_run(tmp_path)
    for how in specials(tmp_path, STATE):
        if how == "dangling":
            assert state_of(tmp_path) is None
        else:
            with pytest.raises(RunError, match=r"regular file|cannot be read"):
                state_of(tmp_path)
    assert time.process_time() - start < 2


def test_a_huge_sparse_file_is_never_read(tmp_path):
    for name in (WEIGHTS, RUN):
        raw = packed({"a": A, "b": B}, DATA) if name == WEIGHTS else b"{}"
        (tmp_path / name).write_bytes(raw)
        os.truncate(tmp_path / name, 1 << 40)
    with pytest.raises(RunError, match="another size than its header says; found 1099511627776"):
        load_weights(tmp_path / WEIGHTS, parameters())
    with pytest.raises(RunError, match="at most 16 MiB"):
        read_run(tmp_path)


# ---- training state


LIKE = {
    "loss_sum": torch.zeros((), dtype=torch.float64),
    **{f"{group}/{n}": p for group in ("trainable", "momentum", "best") for n, p in good().items()},
}
REQUIRED = frozenset({"loss_sum", "trainable/a", "trainable/b"})


def state_of(folder):
    return load_state(folder, recipe_digest=DIGEST, like=LIKE, required=REQUIRED)


def tensors(**changes):
    return {"loss_sum": LIKE["loss_sum"], "trainable/a": LIKE["trainable/a"],
            "trainable/b": LIKE["trainable/b"]} | changes  # fmt: skip


NOTES = {
    "history": [{"epoch": 1, "loss": 0.5}],
    "best_epoch": 1,
    "best_score": 0.5,
    "seconds": 1.5,
}


def test_a_state_comes_back(tmp_path):
    save_state(tmp_path, TrainState(2, 3, tensors(), NOTES), recipe_digest=DIGEST)
    found = state_of(tmp_path)
    assert (found.epoch, found.step, found.notes) == (2, 3, NOTES)
    assert set(found.tensors) == set(tensors())


def test_a_state_without_seconds_goes_on_from_none(tmp_path):
    older = {k: v for k, v in NOTES.items() if k != "seconds"}
    save_state(tmp_path, TrainState(2, 3, tensors(), older), recipe_digest=DIGEST)
    assert state_of(tmp_path).notes == NOTES | {"seconds": 0.0}


HOSTILE_STATES = {
    "no notes": (tensors(), {}, "another recipe"),
    "another recipe": (tensors(), {"recipe": "cd" * 32}, "another recipe"),
    "epoch zero": (tensors(), {"epoch": "0"}, "its notes are damaged"),
    "epoch negative": (tensors(), {"epoch": "-1"}, "its notes are damaged"),
    "epoch of 5000 digits": (tensors(), {"epoch": "9" * 5000}, "its notes are damaged"),
    "epoch Arabic": (tensors(), {"epoch": "١"}, "its notes are damaged"),
    "step text": (tensors(), {"step": "x"}, "its notes are damaged"),
    "notes NaN": (tensors(), {"notes": '{"history":[NaN]}'}, "its notes are damaged"),
    "notes deep": (tensors(), {"notes": "[" * 100000}, "its notes are damaged"),
    "notes twice": (tensors(), {"notes": '{"history":[],"history":[]}'}, "its notes are damaged"),
    "notes other": (tensors(), {"notes": '{"a":1}'}, "its notes are damaged"),
    "notes list": (tensors(), {"notes": "[1]"}, "its notes are damaged"),
    "seconds text": (
        tensors(),
        {"notes": json.dumps({**NOTES, "seconds": "1.5"})},
        "its notes are damaged",
    ),
    "history text": (
        tensors(),
        {"notes": json.dumps({**NOTES, "history": "abc"})},
        "its notes are damaged",
    ),
    "best epoch true": (
        tensors(),
        {"notes": json.dumps({**NOTES, "best_epoch": True})},
        "its notes are damaged",
    ),
    "tensor unknown": (tensors(evil=torch.zeros(3)), {"epoch": "1"}, "'evil' is unexpected"),
    "loss NaN": (
        tensors(loss_sum=torch.tensor(float("nan"), dtype=torch.float64)),
        {"epoch": "1"},
        "non-finite",
    ),
    "loss of rank 1": (
        tensors(loss_sum=torch.zeros(1, dtype=torch.float64)),
        {"epoch": "1"},
        "'loss_sum' does not fit",
    ),
    "momentum of another shape": (
        tensors(**{"momentum/a": torch.zeros(3, 2)}),
        {"epoch": "1"},
        "'momentum/a' does not fit",
    ),
}


@pytest.mark.parametrize("name", sorted(HOSTILE_STATES))
def test_a_hostile_state_is_refused(tmp_path, name):
    saved, changes, message = HOSTILE_STATES[name]
    header = {"recipe": DIGEST, "epoch": "1", "step": "0", "notes": json.dumps(NOTES)}
    header = header | changes if changes else None
    (tmp_path / STATE).write_bytes(safetensors.torch.save(saved, metadata=header))
    with pytest.raises(RunError, match=message) as error:
        state_of(tmp_path)
    one_line(error, tmp_path)


def test_a_state_without_a_required_tensor_is_refused(tmp_path):
    some = {n: t for n, t in tensors().items() if n != "trainable/b"}
    save_state(tmp_path, TrainState(1, 0, some, NOTES), recipe_digest=DIGEST)
    with pytest.raises(RunError, match="tensor 'trainable/b' is missing"):
        state_of(tmp_path)


# ---- run.json


GOOD_RUN = {
    "format": 1,
    "status": "finished",
    "digest": DIGEST,
    "recipe": {},
    "bindings": {},
    "local": {"data": "x", "knowledge": None},
    "parameters": {"scalars": 1},
    "training": {},
}
HOSTILE_RUNS = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": json.dumps(GOOD_RUN).encode("utf-16"),
    "NaN": json.dumps(GOOD_RUN | {"training": {"loss": float("nan")}}).encode(),
    "Infinity": json.dumps(GOOD_RUN | {"training": {"loss": float("-inf")}}).encode(),
    "1e999": json.dumps(GOOD_RUN).encode().replace(b'"scalars": 1', b'"scalars": 1e999'),
    "5000 digits": json.dumps(GOOD_RUN).encode().replace(b": 1,", b": " + b"9" * 5000 + b","),
    "a key twice": json.dumps(GOOD_RUN).encode()[:-1] + b',"status":"finished"}',
    "100k deep": b'{"recipe":' + b"[" * 100000 + b"]" * 100000 + b"}",
    "500 deep": b'{"recipe":' + b"[" * 500 + b"]" * 500 + b"}",
    "newer": json.dumps(GOOD_RUN | {"format": 2}).encode(),
    "format true": json.dumps(GOOD_RUN | {"format": [1]}).encode(),
    "17 MiB": json.dumps(GOOD_RUN | {"x": "y" * (17 << 20)}).encode(),
    "no recipe": json.dumps({n: v for n, v in GOOD_RUN.items() if n != "recipe"}).encode(),
    **{
        f"{name} of another type": json.dumps(GOOD_RUN | {name: 3}).encode()
        for name in ("status", "digest", "recipe", "bindings", "local", "parameters", "training")
        if name != "status"
    },
    "status list": json.dumps(GOOD_RUN | {"status": ["finished"]}).encode(),
    "data a number": json.dumps(GOOD_RUN | {"local": {"data": 3}}).encode(),
    "knowledge a list": json.dumps(
        GOOD_RUN | {"local": {"data": "x", "knowledge": ["/etc/passwd"]}}
    ).encode(),
}


def test_a_good_run_is_read(tmp_path):
    (tmp_path / RUN).write_text(json.dumps(GOOD_RUN))
    assert read_run(tmp_path) == GOOD_RUN


@pytest.mark.parametrize("name", sorted(HOSTILE_RUNS))
def test_a_hostile_run_json_is_refused(tmp_path, name):
    (tmp_path / RUN).write_bytes(HOSTILE_RUNS[name])
    for reader in (read_run, load_run, lambda folder: compare_runs([folder], split="test")):
        with pytest.raises(RunError, match=r"run\.json") as error:
            reader(tmp_path)
        one_line(error, tmp_path)


@pytest.mark.parametrize(
    "result",
    ["{}", "[]", "NaN", '{"data":[],"intervals":[]}', '{"data":"x","intervals":{"metrics":3}}'],
)
def test_hostile_metrics_are_refused(tmp_path, result):
    place = tmp_path / "eval" / "test"
    place.mkdir(parents=True)
    (tmp_path / RUN).write_text(json.dumps(GOOD_RUN))
    (place / "metrics.json").write_text(result)
    with pytest.raises(RunError, match=r"metrics\.json") as error:
        compare_runs([tmp_path], split="test")
    one_line(error, tmp_path)


def test_the_limit_of_json_is_a_limit_of_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LARGEST_JSON", 10)
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}
    (tmp_path / "x.json").write_text('{"a": 1234}')
    with pytest.raises(RunError, match=r"damaged x\.json"):
        read_json(tmp_path / "x.json")
