"""Two laboratories extract overlapping classes, share, merge, and a third tunes on the result."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from safetensors.torch import load_file

CLASSES = (
    "basophil", "eosinophil", "erythroblast", "ig",
    "lymphocyte", "monocyte", "neutrophil", "platelet",
)  # fmt: skip


def vademecum(place: Path, *arguments: str, code: str = "import cli; cli.main()") -> str:
    """The command line in a process, home and working folder of its own."""
    place.mkdir(exist_ok=True)
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "VADEMECUM", "XDG", "PY"))
    } | {"HOME": str(place), "VADEMECUM_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, env=env, cwd=place, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def world(
    root: Path,
    load: Callable[[Path], ModuleType],
    tiny_models: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """A model everybody has, eight classes of images, a backbone, and a store both can reach."""
    folder = tmp_path_factory.mktemp("world")
    builders = load(root / "tests" / "knowledge_extract" / "conftest.py")
    toy = load(root / "tests" / "toy.py")
    toy.CLASSES = CLASSES
    toy.COLOURS = tuple((40 + 60 * (k % 4), 200 - 60 * (k // 2), 90 * (k % 3)) for k in range(8))
    builders.save_model(folder / "tiny-lm", "llama")
    (folder / "store").mkdir()
    return SimpleNamespace(
        folder=folder,
        data=str(toy.images(folder / "images", train=3, val=1, test=2)),
        backbone=tiny_models.tiny_assembled(folder / "backbone"),
        guard=load(root / "tests" / "architecture" / "test_no_llm.py").TUNE,
    )


def extract(world: SimpleNamespace, lab: str, classes: tuple[str, ...]) -> Path:
    """What one laboratory extracts, with a copy of the model of its own; its classes in any order.

    One text at a time: then an entry does not depend on which other classes were asked for.
    """
    place = world.folder / lab
    place.mkdir()
    shutil.copytree(world.folder / "tiny-lm", place / "tiny-lm")
    states = {"kind": "states"}
    recipe = {
        "dataset": "toy-cells",
        "model": {"folder": "tiny-lm", "licence": "Apache-2.0"},
        "templates": {"question": "What is {name}?"},
        "classes": [
            {
                "id": name, "name": name, "modality": "blood smear",
                "descriptions": [f"the {name} is seen" + " clearly" * (len(name) % 3)],
                "attributes": {"colour": ["red", "blue"]},
            }
            for name in classes
        ],
        "blocks": {
            "answers": {"kind": "answers", "max_new_tokens": 4},
            "layers": states | {"of": "answers", "pooling": "end_token", "layers": "all"},
            "texts": {"kind": "texts", "of": "descriptions"},
            "described": states | {"of": "descriptions", "pooling": "mean", "layers": [2]},
        },
    }  # fmt: skip
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    vademecum(place, "extract", "recipe.yaml", "--out", "k.h5", "--batch-size", "1")
    return place / "k.h5"


def tune(world: SimpleNamespace, lab: str, knowledge: Path) -> Path:
    """A run in a process in which the extraction extras look as if they were not installed."""
    recipe = world.folder / f"tune-{lab}.yaml"
    recipe.write_text(
        f"backbone: {{folder: '{world.backbone}'}}\n"
        "method: {name: cilmp, text_depth: 2, visual_depth: 0, prefix: 1, suffix: 1, rank: 2}\n"
        "samples: {shots: 2}\n"
        "train: {epochs: 2, batch_size: 4}\n"
    )
    run = world.folder / lab / "run"
    vademecum(
        world.folder / lab, "tune", str(recipe), "--data", world.data,
        "--knowledge", str(knowledge), "--out", str(run), "--device", "cpu", code=world.guard,
    )  # fmt: skip
    return run


def at_once(*work: Callable[[], Path]) -> list[Path]:
    """The results of several laboratories that work at the same time."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(one) for one in work]]


@pytest.mark.slow
def test_the_cross_lab_story(world: SimpleNamespace) -> None:
    store = (world.folder / "store").as_uri()
    made = at_once(
        lambda: extract(world, "lab-a", CLASSES[4::-1]),
        lambda: extract(world, "lab-b", CLASSES[3:]),
        lambda: extract(world, "lab-d", CLASSES),
    )
    ids = {}
    for lab, cache in zip(("lab-a", "lab-b"), made, strict=False):
        pushed = vademecum(
            cache.parent, "cache", "push", "k.h5", f"{store}/{lab}.h5", "--json",
            "--accept-privacy",
        )  # fmt: skip
        ids[lab] = json.loads(pushed)["content_id"]

    lab = world.folder / "lab-c"
    for name, identity in ids.items():
        vademecum(
            lab, "cache", "pull", f"{store}/{name}.h5", "--out", f"{name}.h5", "--expect", identity
        )
    merged = vademecum(lab, "cache", "merge", "lab-a.h5", "lab-b.h5", "--out", "k.h5", "--json")
    assert json.loads(merged)["deduplicated"] == 2 * 4  # classes 4 and 5, four blocks

    single = made[2]
    assert single.read_bytes() == (lab / "k.h5").read_bytes()
    runs = at_once(lambda: tune(world, "lab-c", lab / "k.h5"), lambda: tune(world, "lab-d", single))
    weights = [load_file(run / "weights.safetensors") for run in runs]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
