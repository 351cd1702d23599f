"""Predicted memory against what autograd really keeps, and what follows from it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from torch import Tensor

from cache.recipe import validate
from prompt_tune.backbone import Backbone, BackboneSpec, load_backbone
from prompt_tune.evaluation import load_run
from prompt_tune.execution import Execution, executing
from prompt_tune.memory import ImageStep, TextStep, Tower, free_bytes, plan
from prompt_tune.method import Batch, KnowledgeRows, Problem
from prompt_tune.methods.cilmp import CILMP, CilmpConfig
from prompt_tune.methods.clip_adapter import ClipAdapter, ClipAdapterConfig
from prompt_tune.methods.cocoop import CoCoOp, CoCoopConfig
from prompt_tune.methods.coop import CoOp, CoopConfig
from prompt_tune.methods.maple import MaPLe, MapleConfig
from prompt_tune.preprocess import Preprocess
from prompt_tune.recipe import TuneRecipe
from prompt_tune.rehearsal import planned, rehearse
from prompt_tune.tuning import tune

NAMES = ("cell", "red cell", "small round nucleus", "lesion with irregular border")


def kept_bytes(forward: Callable[[], Tensor], method: Any) -> int:
    """Bytes of distinct storages kept for the backward, parameters and rows apart."""
    own = [*method.backbone.model.parameters(), *method.parameters(), *method.buffers()]
    known = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    total = sum(kept.values())
    del out
    return total


def cilmp(backbone: Backbone, counts: tuple[int, ...], source: int = 40, **options: Any) -> CILMP:
    torch.manual_seed(1)
    names = tuple(f"{NAMES[k % 4]} {k}" for k in range(len(counts)))
    rows = KnowledgeRows(tuple(torch.randn(n, source) for n in counts))
    return CILMP(CilmpConfig(**options), Problem(backbone, names, rows=rows)).train()


def ratios(method: Any, batch: int, precision: Any = "fp32") -> list[float]:
    """Predicted over measured, of the text side and of the image side where it keeps anything."""
    method.backbone = executing(method.backbone, Execution(precision))
    backbone = method.backbone
    images, (text,) = rehearse(method, batch)
    image = images[0] if images else None
    v = torch.nn.functional.normalize(torch.randn(batch, backbone.embed_dim), dim=-1)
    v.requires_grad_(image is not None)
    features = partial_text(method, v)
    found = [text.kept(precision) / kept_bytes(features, method)]
    if image is not None:
        size = backbone.image.image_size
        case = Batch(torch.zeros(batch).long(), images=torch.randn(batch, 3, size, size))
        measured = kept_bytes(lambda: method.image_features(case), method)
        found.append(image.kept(precision) / measured)
    return found


def partial_text(method: Any, v: Tensor) -> Callable[[], Tensor]:
    """The text side of a method."""
    return lambda: method.text_features(v) if isinstance(method, CILMP) else method.text_features()


@pytest.fixture(scope="module")
def backbones(
    tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Backbone]:
    folder = tmp_path_factory.mktemp("towers")
    places = {
        "clip": tiny_models.tiny_clip(folder / "clip", layers=4, width=128),
        "biomedclip": tiny_models.tiny_biomedclip(folder / "bert", text_layers=4, text_width=96),
        "assembled": tiny_models.tiny_assembled(folder / "mean", text_width=96),
    }
    return {k: load_backbone(BackboneSpec(folder=str(place))) for k, place in places.items()}


RAGGED = (9, 12, 8, 10, 9, 11)


@pytest.mark.parametrize(
    ("kind", "batch", "options", "precision"),
    [
        ("clip", 8, {}, "fp32"),
        ("clip", 3, {}, "bf16"),
        ("clip", 8, {"text_depth": 2, "visual_depth": 1}, "fp32"),
        ("clip", 8, {"dropout": 0.0, "visual_depth": 0}, "fp32"),
        ("clip", 8, {"dropout": 0.0, "condition": "none"}, "fp32"),
        ("biomedclip", 4, {"visual_depth": 3}, "fp32"),
        ("biomedclip", 4, {"text_depth": 1}, "fp32"),
        ("assembled", 8, {}, "fp32"),
        ("assembled", 8, {}, "bf16"),
    ],
)
def test_what_a_step_keeps_is_predicted(
    backbones: dict[str, Backbone], kind: str, batch: int, options: dict[str, Any], precision: str
) -> None:
    found = ratios(cilmp(backbones[kind], RAGGED, **options), batch, precision)
    assert all(0.85 < ratio < 1.15 for ratio in found), found


def test_what_coop_keeps_is_predicted(backbones: dict[str, Backbone]) -> None:
    names = tuple(f"{NAMES[k % 4]} {k}" for k in range(12))
    method = CoOp(CoopConfig(), Problem(backbones["clip"], names))
    found = ratios(method, 8)
    assert all(0.85 < ratio < 1.15 for ratio in found), found


def test_a_rehearsal_finds_what_a_method_asks_of_the_towers(backbones: dict[str, Backbone]) -> None:
    problem, batch = Problem(backbones["clip"], NAMES), 16
    maple = MaPLe(MapleConfig(depth=3, n_context=2), problem)
    images, texts = rehearse(maple, batch)
    assert [(i.stages, i.prompts, i.batch) for i in images] == [(3, 2, 16)]
    assert [(t.stages, t.context, t.batch) for t in texts] == [(3, 2, 1)]
    images, texts = rehearse(CoCoOp(CoCoopConfig(), problem), batch)
    assert (images, [t.batch for t in texts]) == ([], [16])
    state = torch.random.get_rng_state()
    dropped = cilmp(backbones["clip"], RAGGED, condition="none").eval()
    torch.random.set_rng_state(state)
    assert [t.batch for t in rehearse(dropped, batch)[1]] == [16]  # every image draws its own rows
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not dropped.training
    assert dropped.backbone is backbones["clip"]
    assert planned(ClipAdapter(ClipAdapterConfig(), problem), batch) is None


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_vit_b_16_is_predicted(precision: str) -> None:
    name = "ViT-B-16-quickgelu"
    model = open_clip.create_model(name, pretrained=None)
    backbone = Backbone.of(
        model,
        open_clip.get_tokenizer(name),
        name=name,
        config=open_clip.get_model_config(name),
        preprocess=Preprocess.from_open_clip(model.visual.preprocess_cfg),
        notes={},
    )
    found = ratios(cilmp(backbone, (32, 32, 30, 32), source=4096), 2, precision)
    assert all(0.85 < ratio < 1.15 for ratio in found), found


# ---- what follows from it -----------------------------------------------------------------------

TOWER = Tower(width=64, hidden=256, heads=4, depth=6)
IMAGE = ImageStep(TOWER, batch=8, tokens=50, prompts=4, stages=6)
TEXT = TextStep(TOWER, 8, (4,) * 12, (9,) * 12, context=4, stages=6, rank=4, source=40, groups=2)


def test_memory_that_is_ample_changes_nothing() -> None:
    usual = Execution("bf16")
    whole = IMAGE.kept("bf16") + TEXT.kept("bf16")
    assert plan([IMAGE], [TEXT], usual, whole).execution == usual
    assert plan([], [], usual, 0).execution == usual


def test_classes_are_chunked_before_image_blocks_are_computed_again() -> None:
    usual, image = Execution(), IMAGE.kept("fp32")
    chunked = plan([IMAGE], [TEXT], usual, image + TEXT.kept("fp32", classes=6))
    assert chunked.execution == Execution(class_chunk=6)
    assert chunked.kept <= chunked.budget < chunked.needed
    smaller = plan([IMAGE], [TEXT], usual, image + TEXT.kept("fp32", classes=6) - 1)
    assert smaller.execution == Execution(class_chunk=3)
    both = plan([IMAGE], [TEXT], usual, image)
    assert both.execution == Execution(class_chunk=6, checkpoint_image=True)
    least = plan([IMAGE], [TEXT], usual, 1)
    assert least.execution == Execution(class_chunk=1, checkpoint_image=True)
    assert "12 classes" not in chunked.describe()
    assert "6 classes at a time" in chunked.describe()
    assert least.describe().endswith("which may be too much")


def test_the_dearest_chunk_counts() -> None:
    uneven = replace(TEXT, names=(2, 2, 9, 9), rows=(3, 3, 9, 9))
    assert uneven.some(2).names == (9, 9)
    assert uneven.kept("fp32", classes=2) > 0.5 * uneven.kept("fp32")


def test_checkpoints_keep_about_the_inputs() -> None:
    plain = IMAGE.kept("fp32")
    again = IMAGE.kept("fp32", checkpoint=True)
    assert plain / 4 < again < plain / 2
    assert plain == ImageStep(TOWER, 16, 50, 4, 6).kept("fp32") // 2


def test_what_is_computed_again_is_not_kept(backbones: dict[str, Backbone]) -> None:
    method = cilmp(backbones["clip"], RAGGED)
    v = torch.nn.functional.normalize(torch.randn(8, 24), dim=-1).requires_grad_()
    size = backbones["clip"].image.image_size
    case = Batch(torch.zeros(8).long(), images=torch.randn(8, 3, size, size))

    def kept(execution: Execution) -> tuple[int, int]:
        method.backbone = executing(backbones["clip"], execution)
        text = kept_bytes(lambda: method.text_features(v), method)
        return text, kept_bytes(lambda: method.image_features(case), method)

    text, image = kept(Execution())
    less_text, less_image = kept(Execution(class_chunk=2, checkpoint_image=True))
    assert less_text < 0.3 * text
    assert less_image < 0.1 * image


def test_free_memory_is_some() -> None:
    assert 2**24 < free_bytes(torch.device("cpu")) < 2**50


def _tree(root: Path, files: dict[str, str]) -> Path:
    machine = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"}
    for name, text in (machine | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def _group(folder: str, limit: object, used: int, idle: int = 0) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {idle}\nactive_file 7\n"
    names = {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}
    return {f"sys/fs/cgroup/{folder}{name}": text for name, text in names.items()}


def _old_group(folder: str, limit: int, used: int, idle: int = 0) -> dict[str, str]:
    names = {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{used}\n",
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {idle}\n",
    }
    return {f"sys/fs/cgroup/memory/{folder}{name}": text for name, text in names.items()}


OURS, JOB = {"proc/self/cgroup": "0::/slurm/job/step\n"}, "slurm/job/step/"
OLD = {"proc/self/cgroup": "5:cpu,cpuacct:/else\n4:memory:/slurm/job\n1:name=systemd:/x\n0::/u\n"}
MACHINE = 8000 * 1024


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, MACHINE),
        (OURS, MACHINE),
        (OURS | _group(JOB, "max", 10), MACHINE),
        (OURS | _group(JOB, 5000, 2000), 3000),
        (OURS | _group(JOB, 5000, 4000, idle=1500), 2500),
        (OURS | _group(JOB, 5000, 6000), 0),
        (OURS | _group(JOB, "max", 10) | _group("slurm/", 7000, 100), 6900),
        (OURS | _group(JOB, 5000, 2000) | _group("slurm/job/", 4000, 2000), 2000),
        (OURS | _group(JOB, 10**15, 2000), MACHINE),
        ({"proc/self/cgroup": "0::/\n"} | _group("", 9000, 1000), 8000),
        (OLD | _old_group("slurm/job/", 5000, 2000, idle=500), 3500),
        (OLD | _old_group("slurm/", 5000, 3000), 2000),
        (OLD | _old_group("slurm/job/", 2**63 - 4096, 2000), MACHINE),
        (OLD | _old_group("", 5000, 1000), 4000),  # in a container: the group is mounted alone
    ],
)
def test_limits_of_control_groups_count(tmp_path: Path, files: dict[str, str], free: int) -> None:
    assert free_bytes(torch.device("cpu"), _tree(tmp_path, files)) == free


def recipe(problem: SimpleNamespace, **train: Any) -> TuneRecipe:
    method = {"name": "cilmp", "prefix": 2, "suffix": 2, "rank": 2, "visual_prompts": 2}
    data = {
        "backbone": {"folder": str(problem.backbone)},
        "method": method,
        "samples": {"shots": 2, "val_shots": 1},
        "train": {"epochs": 2, "batch_size": 4, "lr": 0.01, **train},
    }
    return validate(TuneRecipe, data, where="test")


def weights(folder: Path) -> Tensor:
    tensors = safetensors.torch.load_file(folder / "weights.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_a_run_in_little_memory_says_so_and_finds_the_same(
    problem: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = {"data": problem.data, "knowledge": problem.knowledge}
    ample = tune(recipe(problem), out=tmp_path / "ample", **where).run
    assert "memory: a step keeps 0.0" in capsys.readouterr().err
    assert ample["execution"] == Execution().to_json()
    small = tune(recipe(problem, max_gb=1e-6), out=tmp_path / "small", **where)
    assert "1 classes at a time and image blocks computed again" in capsys.readouterr().err
    chosen = Execution(class_chunk=1, checkpoint_image=True)
    assert small.run["execution"] == chosen.to_json()
    assert small.setup is not None
    assert small.setup.method.backbone.text.execution == Execution()  # to evaluate
    assert torch.allclose(weights(tmp_path / "ample"), weights(tmp_path / "small"), atol=1e-5)


def test_an_unfinished_run_goes_on_as_it_began(
    problem: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"data": problem.data, "knowledge": problem.knowledge, "out": tmp_path / "run"}

    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("prompt_tune.tuning.train", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(recipe(problem), **where)
    monkeypatch.setattr("prompt_tune.rehearsal.free_bytes", lambda device: 1000)
    assert tune(recipe(problem), **where).run["execution"]["class_chunk"] is None
    fresh = tune(recipe(problem), **where, overwrite=True)
    assert fresh.run["execution"]["class_chunk"] == 1


def test_a_run_in_bf16_is_evaluated_in_bf16(problem: SimpleNamespace, tmp_path: Path) -> None:
    where = {"data": problem.data, "knowledge": problem.knowledge}
    wanted = recipe(problem, precision="bf16", average="published")
    made = tune(wanted, out=tmp_path / "run", **where).setup
    again = load_run(tmp_path / "run")
    assert made is not None
    for setup in (made, again):
        assert setup.method.backbone.image.execution == Execution("bf16")
        assert setup.backbone.image.execution == Execution()
        assert setup.cases(setup.train).backbone.image.execution == Execution()
