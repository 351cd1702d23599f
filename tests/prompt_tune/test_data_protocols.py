"""Base-to-novel and transfer: which classes, which shots, one checkpoint, one harmonic mean."""

import csv
import io
import json
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from cache.errors import DataError, RunError, VademecumError
from cache.recipe import validate
from prompt_tune.base_novel_table import compare_base_to_novel
from prompt_tune.checkpoint import WEIGHTS
from prompt_tune.data import few_shot, load_data
from prompt_tune.data.protocols import base_to_novel, harmonic_mean, mean_harmonic
from prompt_tune.evaluation import evaluate, load_run
from prompt_tune.predictions import load_predictions
from prompt_tune.recipe import TuneRecipe
from prompt_tune.towers import PromptLayout, Stage
from prompt_tune.transfer import base_to_novel_of, chosen_classes, evaluate_on
from prompt_tune.tuning import tune

NAMES = ("eosinophil", "monocyte", "platelet", "basophil", "neutrophil")
COLOURS = ((220, 60, 60), (60, 200, 60), (60, 60, 220), (200, 200, 40), (40, 200, 200))
BASE, NOVEL = NAMES[:3], NAMES[3:]


# Which classes and which number.


def test_the_larger_half_is_base() -> None:
    for count, wanted in ((4, 2), (5, 3), (7, 4), (8, 4)):
        ids = [f"c{k}" for k in range(count)]
        base, novel = base_to_novel(ids)
        assert len(base) == wanted
        assert [*base, *novel] == ids
    with pytest.raises(DataError, match="two classes on either side; found 3 classes"):
        base_to_novel(["a", "b", "c"])


def test_halves_of_the_published_table() -> None:
    from prompt_tune.data.source import preset

    def halves(name: str) -> tuple[list[str], list[str]]:
        base, novel = base_to_novel([c.id for c in preset(name).classes])
        return list(base), list(novel)

    assert halves("retina") == (
        ["diabetic-retinopathy", "glaucoma"],
        ["cataract", "normal-retina"],
    )
    assert halves("lungcolon")[1] == ["lung-benign-tissue", "lung-squamous-cell-carcinoma"]
    assert halves("dermamnist-biomedcoop")[0][-1] == "dermatofibroma"


def test_the_harmonic_mean_is_of_each_seed() -> None:
    pairs = [(0.9, 0.5), (0.6, 0.8), (0.0, 0.0)]
    wanted = [statistics.harmonic_mean(pair) for pair in pairs]
    assert [harmonic_mean(*pair) for pair in pairs] == pytest.approx(wanted)
    assert mean_harmonic(pairs) == pytest.approx(statistics.mean(wanted))
    averages = [statistics.mean(column) for column in zip(*pairs)]
    assert mean_harmonic(pairs) < statistics.harmonic_mean(averages) - 0.01


def _images(folder: Path, seed: int, *, dataset: str, names: tuple[str, ...] = NAMES) -> str:
    random = np.random.default_rng(seed)
    for split, count in (("train", 6), ("val", 2), ("test", 4)):
        for name, colour in zip(names, COLOURS):
            place = folder / split / name
            place.mkdir(parents=True)
            for n in range(count):
                pixels = np.array(colour) + random.integers(-40, 40, (32, 32, 3))
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(place / f"{n}.png")
    declaration = folder.with_suffix(".yaml")
    classes = "".join(f"  - {{id: {n}, name: {n}}}\n" for n in names)
    declaration.write_text(
        f"dataset: {dataset}\npath: {folder.name}\nmodality: blood smear\nclasses:\n{classes}"
    )
    return str(declaration)


@pytest.fixture(scope="module")
def problem(
    tmp_path_factory: pytest.TempPathFactory, toy: ModuleType, tiny_models: ModuleType
) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("protocols")
    toy.cache(folder / "toy.h5", classes=NAMES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VADEMECUM_HOME", str(folder / "home"))
        yield SimpleNamespace(
            folder=folder,
            data=_images(folder / "own", 7, dataset=toy.DATASET),
            other=_images(folder / "other", 8, dataset="other-cells"),
            knowledge=folder / "toy.h5",
            backbone=tiny_models.tiny_assembled(folder / "backbone"),
        )


CILMP = {"name": "cilmp", "visual_depth": 0, "prefix": 2, "suffix": 2, "rank": 2}


def _recipe(problem: SimpleNamespace, method: dict, classes: tuple[str, ...] | None) -> TuneRecipe:
    plan = {
        "backbone": {"folder": str(problem.backbone)},
        "method": method,
        "classes": None if classes is None else list(classes),
        "samples": {"shots": 2, "val_shots": 1},
        "train": {"epochs": 3, "batch_size": 4, "lr": 0.05},
    }
    return validate(TuneRecipe, plan, where="test")


def _run(problem: SimpleNamespace, out: Path, name: str, classes: tuple[str, ...] | None) -> Path:
    method = CILMP if name == "cilmp" else {"name": name}
    recipe = _recipe(problem, method, classes)
    tune(recipe, data=problem.data, out=out, knowledge=problem.knowledge)
    return out


@pytest.fixture(scope="module")
def base_run(problem: SimpleNamespace) -> Path:
    return _run(problem, problem.folder / "base-run", "coop", BASE)


def test_shots_are_the_same_before_and_after_the_class_split(problem: SimpleNamespace) -> None:
    data = load_data(problem.data)
    half = data.select(BASE)
    for seed in (1, 2):
        before, after = few_shot(data["train"], 2, seed), few_shot(half["train"], 2, seed)
        kept = [d for d, k in zip(before.digests, before.labels) if k < len(BASE)]
        assert sorted(kept) == sorted(after.digests)


# One checkpoint on other classes.


def test_novel_logits_are_those_of_the_trained_context(
    problem: SimpleNamespace, base_run: Path
) -> None:
    """The oracle assembles CoOp's logits from the saved context and the novel names."""
    found = evaluate_on(base_run, classes="novel")
    assert found.folder == base_run / "eval" / "toy-cells-test-novel"
    predictions = load_predictions(found.folder / "predictions.csv")
    assert predictions.class_names == NOVEL
    backbone = load_run(base_run).backbone
    context = safetensors.torch.load_file(base_run / WEIGHTS)["context"]
    layout = PromptLayout.build(backbone.text, NOVEL, n_context=len(context))
    images = load_data(problem.data).select(NOVEL)["test"]
    with torch.no_grad():
        text = F.normalize(backbone.text.encode(layout, [Stage(context)])[0], dim=-1)
        pixels = [
            backbone.preprocess.view(images.image(i), 0, 1, images.digests[i])
            for i in range(len(images))
        ]
        image = F.normalize(backbone.image.encode(torch.stack(pixels)), dim=-1)
    wanted = backbone.logit_scale * image @ text.T
    assert predictions.labels.tolist() == images.labels.tolist() == [0] * 4 + [1] * 4
    np.testing.assert_allclose(predictions.logits, wanted.detach().numpy(), atol=1e-4)


def test_base_and_novel_make_one_harmonic_mean(problem: SimpleNamespace, base_run: Path) -> None:
    novel = evaluate_on(base_run, classes="novel").result
    with pytest.raises(RunError, match="not evaluated on 'test' with the weights it has now"):
        base_to_novel_of(base_run)
    own = evaluate(base_run).result
    again = evaluate_on(base_run, classes="base")
    assert again.folder.name == "toy-cells-test-base"
    assert again.result["metrics"] == own["metrics"], "the run's own classes, built anew"
    assert again.result["data"] == own["data"]
    found = base_to_novel_of(base_run)
    pair = (own["metrics"]["accuracy"], novel["metrics"]["accuracy"])
    assert (found.base, found.novel) == pair
    assert found.harmonic == harmonic_mean(*pair)
    facts = novel["on"]
    assert [c["id"] for c in facts["classes"]] == list(NOVEL)
    assert facts["tuned_on"] == {"dataset": "toy-cells", "classes": list(BASE)}
    assert novel["scaled"] is None, "nothing is fitted to labels of the new classes"
    run = json.loads((base_run / "run.json").read_text())
    assert run["metrics"]["toy-cells-test-novel"]["data"] == novel["data"]


def _seed_of(
    source: Path, target: Path, seed: int, base: float, novel: float, *, dataset: str = "toy-cells"
) -> Path:
    """A copy of an evaluated run that says it is of another seed, with other accuracies."""
    shutil.copytree(source, target)
    run = json.loads((target / "run.json").read_text())
    run["recipe"]["seed"] = run["recipe"]["samples"]["seed"] = seed
    run["bindings"]["dataset"] = dataset
    (target / "run.json").write_text(json.dumps(run))
    (target / "eval" / "toy-cells-test-novel").rename(target / "eval" / f"{dataset}-test-novel")
    for place, accuracy in (("test", base), (f"{dataset}-test-novel", novel)):
        file = target / "eval" / place / "metrics.json"
        result = json.loads(file.read_text())
        result["metrics"]["accuracy"] = accuracy
        file.write_text(json.dumps(result))
    return target


@pytest.fixture(scope="module")
def halves(
    base_run: Path, problem: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """CoOp under two seeds on two data sets, and zero-shot on one of them."""
    root = tmp_path_factory.mktemp("halves")
    zero = _run(problem, root / "zero-run", "zero-shot", BASE)
    for run in (base_run, zero):
        evaluate(run)
        evaluate_on(run, classes="novel")
    return [
        _seed_of(base_run, root / "1", 1, 0.9, 0.5),
        _seed_of(base_run, root / "2", 2, 0.6, 0.8),
        _seed_of(base_run, root / "3", 1, 0.4, 0.4, dataset="more_100%"),
        _seed_of(base_run, root / "4", 2, 0.8, 0.2, dataset="more_100%"),
        _seed_of(zero, root / "5", 1, 0.7, 0.7),
    ]


def test_the_table_has_the_harmonic_mean_of_each_seed(halves: list[Path], tmp_path: Path) -> None:
    found = compare_base_to_novel(halves, out=tmp_path)
    rows = {(row["dataset"], row["method"]): row for row in found.rows}
    assert list(rows) == [("toy-cells", "zero-shot"), ("toy-cells", "coop"), ("more_100%", "coop")]
    coop, more = rows["toy-cells", "coop"], rows["more_100%", "coop"]
    each = [statistics.harmonic_mean(pair) for pair in ((0.9, 0.5), (0.6, 0.8))]
    assert coop["base"] == pytest.approx([0.75, statistics.stdev((0.9, 0.6))])
    assert coop["novel"] == pytest.approx([0.65, statistics.stdev((0.5, 0.8))])
    assert coop["harmonic"] == pytest.approx([statistics.mean(each), statistics.stdev(each)])
    assert coop["harmonic"][0] < statistics.harmonic_mean((0.75, 0.65)) - 0.01
    (average,) = found.averages
    assert average["method"] == "coop"
    for name in ("base", "novel", "harmonic"):
        assert average[name][0] == pytest.approx((coop[name][0] + more[name][0]) / 2)
    assert found.left_out == ("zero-shot",)
    assert "in no average: zero-shot." in found.text()
    lines = list(csv.DictReader(io.StringIO((tmp_path / "base-to-novel.csv").read_text())))
    assert [float(line["harmonic"]) for line in lines[:3]] == [
        row["harmonic"][0] for row in found.rows
    ]
    assert lines[0]["base_std"] == "", "one seed deviates from nothing"
    assert lines[3]["dataset"] == "mean of 2 data sets"
    latex = (tmp_path / "base-to-novel.tex").read_text()
    assert r"more\_100\% & coop & 0.600 $\pm$" in latex
    assert not re.search(r"(?<!\\)[%_#]", latex)
    assert "| more_100% | coop | 0.600 ± 0.283 |" in (tmp_path / "base-to-novel.md").read_text()
    assert compare_base_to_novel(halves[:2]).averages == ()


def test_base_to_novel_on_the_command_line(halves: list[Path]) -> None:
    import cli

    command = ["compare", *map(str, halves), "--split", "test", "--base-to-novel"]
    plain = CliRunner().invoke(cli.app, [*command, "--style", "markdown"])
    assert "| data set | method | base | novel | harmonic | seeds |" in plain.stdout
    found = json.loads(
        CliRunner().invoke(cli.app, [*command, "--json"]).stdout, parse_constant=pytest.fail
    )
    assert found["averages"][0]["harmonic"][1] is None
    wrong = CliRunner().invoke(cli.app, [*command, "--metric", "ece"])
    assert "base-to-novel is of accuracies" in str(wrong.exception)


def test_base_to_novel_of_a_part(base_run: Path, halves: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"on 'toy-cells-test-novel-6'.*--classes novel"):
        base_to_novel_of(base_run, part=6)
    novel = evaluate_on(base_run, classes="novel", part=6).result
    assert novel["images"] == 6
    with pytest.raises(RunError, match="not evaluated on 'test-6'"):
        base_to_novel_of(base_run, part=6)
    half = evaluate(base_run, part=6).result
    found = base_to_novel_of(base_run, part=6)
    assert (found.base, found.novel) == tuple(r["metrics"]["accuracy"] for r in (half, novel))
    assert found.images == (half["data"], novel["data"])
    (row,) = compare_base_to_novel([base_run], split="test-6").rows
    assert row["harmonic"][0] == pytest.approx(found.harmonic)
    other = tmp_path / "other"
    shutil.copytree(halves[1], other)
    file = other / "eval" / "toy-cells-test-novel" / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": "0" * 64}))
    with pytest.raises(RunError, match="toy-cells: the runs were evaluated on different images"):
        compare_base_to_novel([halves[0], other])


def test_knowledge_of_novel_classes_comes_from_the_cache(
    problem: SimpleNamespace, tmp_path: Path, toy: ModuleType
) -> None:
    run = _run(problem, tmp_path / "run", "cilmp", BASE)
    novel = evaluate_on(run, classes="novel").result
    every = evaluate_on(run, classes="all").result
    assert novel["on"]["cache"]["block_id"] == every["on"]["cache"]["block_id"]
    assert len(every["metrics"]["classes"]) == 5
    with pytest.raises(VademecumError, match="toy-cells"):
        evaluate_on(run, data=problem.other, transfer=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "DATASET", "other-cells")
        toy.cache(tmp_path / "other.h5", classes=NAMES)
        toy.cache(tmp_path / "few.h5", classes=NAMES[:4])
        patch.setattr(toy, "LAYERS", toy.LAYERS - 1)
        toy.cache(tmp_path / "layers.h5", classes=NAMES)
    other = {"data": problem.other, "transfer": True}
    found = evaluate_on(run, knowledge=tmp_path / "other.h5", **other).result
    cache = found["on"]["cache"]
    assert cache["block_id"] != every["on"]["cache"]["block_id"]
    assert cache["block_made"] == every["on"]["cache"]["block_made"]
    with pytest.raises(RunError, match="the rows of knowledge were made in another way"):
        evaluate_on(run, knowledge=tmp_path / "layers.h5", **other)
    with pytest.raises(VademecumError, match="neutrophil"):
        evaluate_on(run, knowledge=tmp_path / "few.h5", **other)


# Other data.


def test_transfer_binds_the_other_data(
    problem: SimpleNamespace, base_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        RunError, match=r"another data set; found toy-cells, wanted other-cells\. P"
    ):
        evaluate_on(base_run, data=problem.other)
    found = evaluate_on(base_run, data=problem.other, transfer=True)
    assert found.folder.name == "other-cells-test-all"
    assert found.result["data"] == load_data(problem.other)["test"].digest
    assert found.result["on"]["dataset"] == "other-cells"
    assert found.result["images"] == 20
    changed = _images(tmp_path / "changed", 9, dataset="other-cells")
    with pytest.raises(RunError, match="evaluated on other images here"):
        evaluate_on(base_run, data=changed, transfer=True)
    listed = evaluate_on(base_run, data=problem.other, transfer=True, classes=NAMES[1:4])
    assert listed.folder.name.startswith("other-cells-test-3-")
    assert evaluate_on(
        base_run, data=problem.other, transfer=True, classes="platelet, monocyte,basophil"
    ).folder == (listed.folder)


def test_own_data_must_be_those_of_the_run(base_run: Path, tmp_path: Path) -> None:
    changed = _images(tmp_path / "changed", 9, dataset="toy-cells")
    with pytest.raises(DataError, match="not the image or label the sample list names"):
        evaluate_on(base_run, data=changed, classes="novel")


# What is refused.


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("linear-probe", "'linear-probe' has weights for each of its classes"),
        ("tip-adapter", "'tip-adapter' keeps something of its training images"),
    ],
)
def test_methods_whose_weights_belong_to_their_classes(
    problem: SimpleNamespace, tmp_path: Path, name: str, match: str
) -> None:
    run = _run(problem, tmp_path / "run", name, NAMES[:2])
    with pytest.raises(RunError, match=match):  # as many classes, so that every shape would fit
        evaluate_on(run, data=problem.other, transfer=True, classes=NAMES[3:])


def test_novel_means_never_seen(problem: SimpleNamespace, tmp_path: Path) -> None:
    run = _run(problem, tmp_path / "run", "zero-shot", None)
    with pytest.raises(
        RunError, match=r"would be novel; found basophil, neutrophil\. Tune with --s"
    ):
        evaluate_on(run, classes="novel")
    data = load_data(problem.data)
    with pytest.raises(DataError, match="at least two ids"):
        chosen_classes(data, "novle")
    with pytest.raises(DataError, match=r"no class 'novle'"):
        data.select(chosen_classes(data, "novle,monocyte"))


def test_another_backbone_or_other_weights(
    problem: SimpleNamespace, base_run: Path, tmp_path: Path, tiny_models: ModuleType
) -> None:
    run = tmp_path / "run"
    shutil.copytree(base_run, run)
    context = safetensors.torch.load_file(run / WEIGHTS)["context"]
    safetensors.torch.save_file({"context": context + 1}, run / WEIGHTS)
    with pytest.raises(RunError, match="not those that the run left"):
        evaluate_on(run, data=problem.other, transfer=True)
    shutil.copy(base_run / WEIGHTS, run / WEIGHTS)
    table = json.loads((run / "run.json").read_text())
    table["bindings"]["backbone"] = "0" * 64
    (run / "run.json").write_text(json.dumps(table))
    with pytest.raises(RunError, match="another backbone"):
        evaluate_on(run, data=problem.other, transfer=True)


def test_the_command(problem: SimpleNamespace, base_run: Path) -> None:
    import cli

    for more in (["--classes", "novel"], ["--data", problem.other, "--transfer"]):
        done = CliRunner().invoke(
            cli.app, ["eval", str(base_run), "--json", "--device", "cpu", *more]
        )
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["on"]["tuned_on"]["classes"] == list(BASE)
