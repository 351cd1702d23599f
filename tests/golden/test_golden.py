import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).with_name("check_cilmp.py")
ERRORS = ["logits_max_abs", "loss_abs", "grad_worst_rel"]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def golden_file(shared: Path, name: str) -> Path:
    path = shared / "golden" / name
    if not path.is_file():
        pytest.skip(f"no {name} in ../shared/golden")
    return path


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("name", "masks"), [("equal", True), ("ragged", False)])
def test_the_script_reproduces_the_published_tensors(
    shared: Path, name: str, masks: bool, dtype: str
) -> None:
    file = golden_file(shared, f"cilmp_{name}.npz")
    command = [sys.executable, str(SCRIPT), str(file), "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert list(errors) == [*ERRORS, *([f"dropout_{e}" for e in ERRORS] if masks else [])]
    tight = 1e-6 if dtype == "float64" else 1e-4
    assert max(errors.values()) < tight
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        ("logits", "logits_max_abs"),
        ("loss", "loss_abs"),
        ("grad.stage.1.suffix.U2", "grad_worst_rel"),
    ],
)
def test_the_script_fails_beyond_the_tolerance(
    shared: Path,
    wrong: str,
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import numpy as np

    with np.load(golden_file(shared, "cilmp_ragged.npz")) as arrays:
        changed = dict(arrays)
    changed[wrong] = changed[wrong] * 1.01
    np.savez(tmp_path / "wrong.npz", **changed)
    script = load(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["check_cilmp.py", str(tmp_path / "wrong.npz")])
    assert script.main() == 1
    errors = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert errors[shown] > script.TOLERANCE["float64"][shown]
    assert sum(errors[e] > script.TOLERANCE["float64"][e] for e in ERRORS) == 1


@pytest.mark.parametrize(("name", "masks"), [("equal", True), ("ragged", False)])
def test_the_plain_computation_reproduces_the_published_tensors(
    root: Path, shared: Path, name: str, masks: bool
) -> None:
    import numpy as np
    import torch
    from open_clip.tokenizer import SimpleTokenizer

    plain = load(root / "tests" / "oracle" / "plain_cilmp.py")
    golden = load(SCRIPT).Golden(golden_file(shared, f"cilmp_{name}.npz"))
    clip, tokenizer = golden.under("clip."), SimpleTokenizer()
    names = [str(n) for n in golden.arrays["class_names"]]
    method = plain.PlainCilmp(
        text=plain.CausalText(clip, heads=len(clip["ln_final.weight"]) // 64),
        image=plain.ClipImage(clip, heads=len(clip["visual.ln_post.weight"]) // 64),
        parameters={
            n.replace(".ctx", ".context"): p.double() for n, p in golden.under("param.").items()
        },
        start=[tokenizer.sot_token_id],
        tails=[[*tokenizer.encode(n + "."), tokenizer.eot_token_id] for n in names],
        hidden=[golden.tensor(f"hidden.{i}") for i in range(len(names))],
        prefix=4,
        suffix=4,
        logit_scale=float(clip["logit_scale"].double().exp()),
    )
    steps = {"": None}
    if masks:
        bits = np.unpackbits(golden.arrays["dropout.mask_packed"], axis=-1)
        steps["dropout."] = torch.from_numpy(bits)
    for prefix, kept in steps.items():
        images, labels = golden.tensor("images"), golden.tensor("labels")
        logits, loss, grads = method.step(images, labels, kept)
        assert torch.allclose(logits, golden.tensor(prefix + "logits"), rtol=0, atol=1e-12)
        assert abs(float(loss) - float(golden.tensor(prefix + "loss"))) < 1e-12
        for parameter, grad in grads.items():
            key = f"{prefix}grad.{parameter.replace('.context', '.ctx')}"
            true = golden.tensor(key).double()
            assert (grad - true).norm() < 1e-7 * true.norm(), parameter
