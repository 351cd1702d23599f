"""`vademecum align`: from a recipe and data to an aligned backbone folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import RecipeError
from cache.recipe import load_recipe
from cache.registry import suggest
from prompt_tune.align import AlignInputs, AlignSpec, align, check_templates
from prompt_tune.alignment_record import AlignmentRecord, alignment_record
from prompt_tune.data.few_shot import few_shot
from prompt_tune.data.source import load_data
from prompt_tune.setup import pick_device

PRESETS = Path(__file__).parent / "presets" / "align"
TRAIN = "train"  # the only split alignment reads


@dataclass(frozen=True)
class AlignResult:
    """An aligned folder, its record, and whether it was there before."""

    folder: Path
    record: AlignmentRecord
    made: bool

    def to_json(self) -> dict[str, Any]:
        """The record without its lists, for scripts."""
        record = self.record.model_dump(mode="json", exclude={"samples", "ids"})
        images = {"images": len(self.record.samples), "samples": self.record.samples.digest}
        return {"folder": str(self.folder), "made": self.made, **images, **record}

    def describe(self) -> str:
        """What a person reads."""
        record = self.record
        state = "aligned" if self.made else "was already aligned"
        return (
            f"{self.folder}: {state}; {record.describe()}; accuracy on the images it saw "
            f"{record.train_accuracy:.1%}"
        )


def load_align_recipe(name: str, overrides: tuple[str, ...] = ()) -> AlignSpec:
    """An alignment recipe from a file or preset, with `a.b=value` overrides.

    Raises:
        RecipeError: neither a file nor a preset, an unknown key, a wrong value.
    """
    path = Path(name)
    if not path.is_file():
        known = sorted(p.stem for p in PRESETS.glob("*.yaml"))
        if name not in known:
            what = "no such alignment recipe file or preset"
            raise RecipeError(what, where=name, do=suggest(name, known))
        path = PRESETS / f"{name}.yaml"
    return load_recipe(AlignSpec, path, overrides)


def align_data(spec: AlignSpec, *, data: str, out: Path, device: str = "auto") -> AlignResult:
    """Aligns on a few-shot sample of the training split of `data`, and of nothing else.

    The sample is the one a tuning run with equal shots and seed takes.

    Raises:
        VademecumError: see `load_data`, `few_shot` and `align`.
    """
    source = load_data(data)
    check_templates(spec.templates, held_out=source.template)
    if spec.classes is not None:
        source = source.select(spec.classes)
    train = source[TRAIN]
    samples = few_shot(train, spec.samples.shots, spec.samples.seed)
    inputs = AlignInputs(source.dataset, samples, samples.apply(train))
    made = not out.exists()
    folder = align(spec, inputs, out, device=pick_device(device))
    return AlignResult(folder, alignment_record(folder), made)
