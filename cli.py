"""The command line: parses and calls, nothing more.

Nothing of the project is imported before `main` has seen that the project's own packages are the
ones that would be imported, and a stage only inside the command that needs it.
"""

import errno
import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

PACKAGES = ("cache", "knowledge_extract", "prompt_tune")
INTERRUPTED = 130
DIFFERENT = 1  # an audit or a comparison that found a difference, as diff does

app = typer.Typer(
    name="vademecum",
    help="An LLM's knowledge in a cache, and prompt tuning of vision-language models against it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
cache_app = typer.Typer(help="Look into sealed knowledge caches.", no_args_is_help=True)
assets_app = typer.Typer(help="The embedded models and images.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
app.add_typer(assets_app, name="assets")
data_app = typer.Typer(help="Look into image data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads it at run time
    typer.Option("--set", help="Override a recipe value: a.b=value. May be repeated."),
]
Expect = Annotated[str | None, typer.Option(help="The content id it must have.")]
Classes = Annotated[Path | None, typer.Option(help="YAML with a class name for each id.")]
Modality = Annotated[str, typer.Option(help="Of all classes.")]
Licence = Annotated[str | None, typer.Option(help="Of the model the values come from.")]
Model = Annotated[str | None, typer.Option(help="What the model is called.")]
NewBlock = Annotated[str, typer.Option("--block", help="Name of the block to make.")]
TextSource = Annotated[str, typer.Option("--source", help="Who or what made the texts.")]
TextLicence = Annotated[str, typer.Option("--licence", help="Of the texts; `unknown` if it is.")]
TextKind = Annotated[str, typer.Option("--kind", help="texts or attributes.")]
Replace = Annotated[bool, typer.Option(help="Replace a cache that has this name.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")]


def _shadowed() -> str | None:
    """What would be imported in place of a package of ours, or None."""
    here = Path(__file__).resolve().parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec is not None else None
        if origin is None or Path(origin).resolve().parent.parent != here:
            return f"{name}: found {origin or 'nothing'}, wanted {here / name}"
        text = Path(origin).read_text(encoding="utf-8")
        if 'DISTRIBUTION = "vademecum"' not in text:
            return f"{name}: {origin} belongs to another distribution"
    return None


def _refuse_together(option: str, wrong: bool, other: str, *, with_it: bool = False) -> None:
    if wrong:
        from cache.errors import RecipeError

        what = "cannot be used" + (" with " if with_it else " without ") + other
        do = "Remove the run folders instead." if with_it else "`vademecum eval` evaluates one run."
        raise RecipeError(what, where=option, do=do)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("vademecum")
        except PackageNotFoundError:  # run from a checkout
            number = "(not installed)"
        typer.echo(f"vademecum {number}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """What holds for every command."""


def _say(value: Any, as_json: bool, text: str) -> None:
    typer.echo(json.dumps(value, indent=2, sort_keys=True) if as_json else text)


@app.command()
def extract(
    recipes: Annotated[list[str], typer.Argument(help="Recipe files, or presets by name.")],
    out: Annotated[Path, typer.Option(help="The cache to make; of several recipes, their folder.")],
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done.")] = False,
    device: Device = "auto",
    device_map: Annotated[str | None, typer.Option(help="accelerate's device map.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward pass.")] = 32,
    processes: Annotated[int, typer.Option(min=1, help="Each with a model and a GPU.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each process.")] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a cache of another recipe; what stays the same is kept.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Stage one: reads a language model once into sealed knowledge caches."""
    from cache.durable import make_folder, storage_errors
    from knowledge_extract import RunSettings, extract_many, load_extract_recipe
    from knowledge_extract import plan as make_plan

    resolved = [load_extract_recipe(one, tuple(overrides or ())) for one in recipes]
    several = len(recipes) > 1
    outs = [out / f"{Path(one).stem}.h5" for one in recipes] if several else [out]
    settings = RunSettings(
        device=device,
        device_map=device_map,
        batch_size=batch_size,
        processes=processes,
        threads=threads,
    )
    wanted = list(zip(resolved, outs, strict=True))
    made: list[Any]
    if plan:
        made = [make_plan(recipe, file, settings, overwrite=overwrite) for recipe, file in wanted]
    else:
        if several:
            with storage_errors(out):
                make_folder(out)
        made = list(extract_many(wanted, settings, overwrite=overwrite))
    data = [one.to_json() for one in made]
    _say(data if several else data[0], as_json, "\n\n".join(one.describe() for one in made))


@cache_app.command("inspect")
def cache_inspect(file: Path, as_json: Json = False) -> None:
    """Says what a cache holds and what made it."""
    from cache.inspect import describe, inspect

    _say(inspect(file), as_json, describe(file))


@cache_app.command("verify")
def cache_verify(
    file: Path,
    expect: Expect = None,
    signers: Annotated[
        Path | None, typer.Option(help="Allowed signers: also check FILE.sig against them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Checks every byte and the structure of a cache, and who signed it."""
    from cache.inspect import verify
    from cache.sharing.signing import check_signature, signature_of

    report = verify(file, expect=expect)
    facts, text = report.to_json(), report.describe()
    if signers is not None:
        who = check_signature(report.content_id, signature_of(file), signers)
        facts, text = {**facts, "signed_by": who}, f"{text}\nsigned by {who}"
    _say(facts, as_json, text)


@cache_app.command("sign")
def cache_sign(
    file: Path, key: Annotated[Path, typer.Option(help="Your ssh key, or its public half.")]
) -> None:
    """Signs the content id with an ssh key; leaves FILE.sig."""
    from cache.sharing.signing import sign

    typer.echo(sign(file, key))


@cache_app.command("push")
def cache_push(
    file: Path,
    url: Annotated[str, typer.Argument(help="A path, file://, s3:// or hf:// address.")],
    accept_licence: Annotated[
        bool, typer.Option(help="Share although the licence forbids or is unknown.")
    ] = False,
    accept_privacy: Annotated[
        bool, typer.Option(help="Share although texts look like personal data.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Verifies, checks licence and texts, uploads, and reads every byte back."""
    from cache.sharing.remote import push

    report = push(file, url, accept_licence=accept_licence, accept_privacy=accept_privacy)
    _say(report.to_json(), as_json, report.describe())


@cache_app.command("pull")
def cache_pull(
    url: Annotated[str, typer.Argument(help="A path, file://, s3://, hf:// or https:// address.")],
    out: Annotated[Path, typer.Option(help="The file to make.")],
    expect: Expect = None,
    as_json: Json = False,
) -> None:
    """Fetches a cache; it gets its name only when every byte was checked. Resumable."""
    from cache.sharing.remote import pull

    report = pull(url, out, expect=expect)
    _say(report.to_json(), as_json, report.describe())


@cache_app.command("layers")
def cache_layers(file: Path, first: str, second: str, as_json: Json = False) -> None:
    """Compares two blocks of hidden states layer by layer (cosine, largest difference)."""
    from knowledge_extract.compare import compare_blocks, describe_comparison

    rows = compare_blocks(file, first, second)
    _say(rows, as_json, describe_comparison(rows))


@cache_app.command("merge")
def cache_merge(
    files: Annotated[list[Path], typer.Argument(help="Caches of one data set.")],
    out: Annotated[Path, typer.Option(help="The sealed cache to make.")],
    prefer: Annotated[
        Path | None, typer.Option(help="The file whose entry counts where two differ.")
    ] = None,
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Joins caches: any order gives the same bytes, and any differing bit is a conflict."""
    from cache.combining.merging import MergeConflictsError, merge

    try:
        report = merge(files, out, prefer=prefer, replace=replace)
    except MergeConflictsError as error:
        if as_json:
            typer.echo(json.dumps(error.to_json(), indent=2, sort_keys=True))
        raise
    _say(report.to_json(), as_json, report.describe())


@cache_app.command("diff")
def cache_diff(
    first: Path,
    second: Path,
    rtol: Annotated[
        float | None,
        typer.Option(min=0, help="Of a layer's largest magnitude: so much is no difference."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Says how two caches differ: recipe, entries, texts, and states by layer."""
    from cache.combining.difference import diff

    found = diff(first, second, rtol)
    _say(found.to_json(), as_json, found.describe())
    if not (found.same if rtol is None else found.within(rtol)):
        raise SystemExit(DIFFERENT)


@cache_app.command("slice")
def cache_slice(
    file: Path,
    classes: Annotated[str, typer.Option(help="Class ids, with commas between.")],
    out: Annotated[Path, typer.Option(help="The sealed cache to make.")],
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Makes a cache of some of the classes."""
    from cache.combining.slicing import slice_classes

    chosen = [name for one in classes.split(",") if (name := one.strip())]
    identity = slice_classes(file, chosen, out, replace=replace)
    _say({"content_id": identity, "path": str(out)}, as_json, f"{out}  {identity}")


@cache_app.command("card")
def cache_card(file: Path) -> None:
    """Prints a card in Markdown: what it is, from which model, under which licence."""
    from cache.sharing.card import card

    typer.echo(card(file))


@cache_app.command("export")
def cache_export(
    file: Path,
    safetensors: Annotated[Path, typer.Option(help="The safetensors file to make.")],
) -> None:
    """Writes every dataset of a cache as a tensor."""
    from cache.sharing.export import export_safetensors

    typer.echo(export_safetensors(file, safetensors))


@cache_app.command("import-cilmp")
def cache_import_cilmp(
    folder: Annotated[Path, typer.Argument(help="llm_representations/<data set> of CILMP.")],
    out: Annotated[Path, typer.Option(help="The sealed cache to make.")],
    dataset: Annotated[str, typer.Option(help="Id of the data set.")],
    block: Annotated[str, typer.Option(help="Name of the block.")] = "layers",
    first_layer: Annotated[int, typer.Option(help="Of the first row; 0 is the embedding.")] = 1,
    classes: Classes = None,
    modality: Modality = "",
    licence: Licence = None,
    model: Model = None,
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Makes a cache of the published code's <class>.pth files, without unpickling them."""
    from cache.foreign.import_cilmp import import_cilmp
    from cache.foreign.importing import Labels, read_class_table

    labels = Labels(dataset, block, "states", modality, licence, model, first_layer)
    table = None if classes is None else read_class_table(classes)
    report = import_cilmp(folder, out, labels, classes=table, replace=replace)
    _say(report.to_json(), as_json, report.describe())


@cache_app.command("export-cilmp")
def cache_export_cilmp(
    file: Path,
    folder: Annotated[Path, typer.Argument(help="Gets one <class>.pth per class.")],
    block: Annotated[str, typer.Option(help="A block of hidden states.")] = "layers",
    item: Annotated[int, typer.Option(min=0, help="Which entry of each class.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="f2 or f4; else as stored.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace files of the same name.")] = False,
    as_json: Json = False,
) -> None:
    """Writes the folder of <class>.pth files that the published CILMP code loads."""
    from cache.foreign.export_cilmp import export_cilmp

    report = export_cilmp(file, folder, block=block, item=item, dtype=dtype, overwrite=overwrite)
    _say(report.to_json(), as_json, report.describe())


@cache_app.command("import-hdf5")
def cache_import_hdf5(
    file: Annotated[Path, typer.Argument(help="HDF5 with one float dataset per class.")],
    out: Annotated[Path, typer.Option(help="The sealed cache to make.")],
    dataset: Annotated[str, typer.Option(help="Id of the data set.")],
    block: Annotated[str, typer.Option(help="Name of the block.")] = "layers",
    kind: Annotated[str, typer.Option(help="states or embeddings.")] = "states",
    first_layer: Annotated[int, typer.Option(help="Of the first row; 0 is the embedding.")] = 1,
    classes: Classes = None,
    modality: Modality = "",
    licence: Licence = None,
    model: Model = None,
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Makes a cache of a stranger's HDF5 file, read in a process without rights."""
    from cache.foreign.import_hdf5 import import_hdf5
    from cache.foreign.importing import Labels, read_class_table

    labels = Labels(dataset, block, kind, modality, licence, model, first_layer)
    table = None if classes is None else read_class_table(classes)
    report = import_hdf5(file, out, labels, classes=table, replace=replace)
    _say(report.to_json(), as_json, report.describe())


@cache_app.command("add-texts")
def cache_add_texts(
    file: Annotated[Path, typer.Argument(help="The sealed cache to start from.")],
    texts: Annotated[Path, typer.Argument(help="JSON, YAML or CSV: texts by class.")],
    block: NewBlock,
    source: TextSource,
    licence: TextLicence,
    out: Annotated[Path, typer.Option(help="The sealed cache to make.")],
    kind: TextKind = "texts",
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Adds texts or attributes made elsewhere as one more block."""
    from cache.foreign.add_texts import About, add_texts

    about = About(block, source, licence, kind)
    report = add_texts(file, texts, out, about, replace=replace)
    _say(report.to_json(), as_json, report.describe())


@cache_app.command("new-texts")
def cache_new_texts(
    texts: Annotated[Path, typer.Argument(help="JSON, YAML or CSV: texts by class.")],
    dataset: Annotated[str, typer.Option(help="Id of the data set.")],
    block: NewBlock,
    source: TextSource,
    licence: TextLicence,
    out: Annotated[Path, typer.Option(help="The sealed cache to make.")],
    kind: TextKind = "texts",
    classes: Classes = None,
    modality: Modality = "",
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Makes a cache of texts or attributes made elsewhere, without any model."""
    from cache.foreign.add_texts import About, new_texts
    from cache.foreign.importing import read_class_table

    about = About(block, source, licence, kind)
    table = None if classes is None else read_class_table(classes)
    report = new_texts(
        texts, out, about, dataset=dataset, classes=table, modality=modality, replace=replace
    )
    _say(report.to_json(), as_json, report.describe())


@cache_app.command("embed")
def cache_embed(
    file: Path,
    backbone: Annotated[str, typer.Option(help="A tuning recipe, a preset, or a backbone's YAML.")],
    block: Annotated[str, typer.Option(help="A block of texts.")] = "descriptions",
    name: Annotated[str | None, typer.Option(help="Of the new block.")] = None,
    licence: Annotated[str, typer.Option(help="Of the backbone.")] = "unknown",
    out: Annotated[Path | None, typer.Option(help="The cache to make; else FILE itself.")] = None,
    device: Device = "auto",
    replace: Replace = False,
    as_json: Json = False,
) -> None:
    """Adds what a backbone's text tower makes of every text of a block."""
    from prompt_tune.backbone import load_backbone
    from prompt_tune.embed import backbone_spec, embed
    from prompt_tune.setup import pick_device

    loaded = load_backbone(backbone_spec(backbone), device=pick_device(device))
    report = embed(file, loaded, block=block, name=name, licence=licence, out=out, replace=replace)
    _say(report.to_json(), as_json, report.describe())


@cache_app.command("audit")
def cache_audit(
    file: Path,
    k: Annotated[int, typer.Option("--k", min=1, help="Entries, drawn at random.")] = 30,
    model: Annotated[
        str | None, typer.Option(help="A folder or GGUF file, if the model was local.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Draw the same entries again.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Relative difference that agrees; else the recorded one."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Computes random entries again with the declared model and compares."""
    from knowledge_extract import RunSettings, audit

    report = audit(
        file, k=k, model=model, seed=seed, allowed=tolerance, run=RunSettings(device=device)
    )
    _say(report.to_json(), as_json, report.describe())
    if not report.passed:
        raise SystemExit(DIFFERENT)


@app.command()
def align(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a preset by name.")],
    data: Annotated[str, typer.Option(help="Images: a declaration, folder, CSV, JSON or npz.")],
    out: Annotated[Path, typer.Option(help="The backbone folder to make.")],
    overrides: Overrides = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Makes a backbone of an image tower and a sentence encoder by training a projection."""
    from prompt_tune.align_run import align_data, load_align_recipe

    result = align_data(
        load_align_recipe(recipe, tuple(overrides or ())), data=data, out=out, device=device
    )
    _say(result.to_json(), as_json, result.describe())


@app.command()
def tune(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a preset by name.")],
    data: Annotated[str, typer.Option(help="Images: a declaration, folder, CSV, JSON or npz.")],
    out: Annotated[Path, typer.Option(help="The run folder.")],
    knowledge: Annotated[Path | None, typer.Option(help="A sealed knowledge cache.")] = None,
    overrides: Overrides = None,
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option(help="Replace an earlier run, its sample lists and evaluations.")
    ] = False,
    seeds: Annotated[str | None, typer.Option(help="A run for each: 1-20,30.")] = None,
    grid: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A run for each value: a.b=x,y. May be repeated."),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--eval", help="With --seeds or --grid: evaluate on this split.")
    ] = None,
    part: Annotated[int | None, typer.Option(min=1, help="A stratified part: images.")] = None,
    as_json: Json = False,
) -> None:
    """Stage two: tunes prompts against a cache; an unfinished run goes on where it stopped.

    With --seeds or --grid every combination is run in one process, each into a folder in --out.
    """
    from prompt_tune.recipe import load_tune_recipe
    from prompt_tune.report import describe_run
    from prompt_tune.setup import pick_device
    from prompt_tune.tuning import tune as run_tune

    resolved = load_tune_recipe(recipe, tuple(overrides or ()))
    where = pick_device(device)
    many = seeds is not None or bool(grid)
    _refuse_together("--overwrite", overwrite and many, "--seeds or --grid", with_it=True)
    _refuse_together("--eval", split is not None and not many, "--seeds or --grid")
    _refuse_together("--part", part is not None and split is None, "--eval")
    if many:
        from prompt_tune.many import combinations, parse_grid, parse_seeds, tune_many

        runs = tune_many(
            resolved,
            combinations(parse_seeds(seeds) if seeds else (), parse_grid(grid or ())),
            data=data,
            out=out,
            knowledge=knowledge,
            device=where,
            split=split,
            part=part,
        )
        _say(runs.rows, as_json, runs.describe())
        return
    result = run_tune(
        resolved,
        data=data,
        out=out,
        knowledge=knowledge,
        device=where,
        overwrite=overwrite,
    )
    _say(result.run, as_json, describe_run(result.run, out))


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    part: Annotated[int | None, typer.Option(min=1, help="A stratified part: images.")] = None,
    data: Annotated[str | None, typer.Option(help="Where the images are now.")] = None,
    knowledge: Annotated[Path | None, typer.Option(help="Where the cache is now.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Other classes than the run's: novel, base, all, or ids.")
    ] = None,
    transfer: Annotated[bool, typer.Option(help="--data is another data set.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Metrics of a run with intervals, per-case predictions and figures.

    With --classes or --transfer on classes the run was not tuned on, by their names alone.
    """
    from prompt_tune.evaluation import evaluate as run_evaluate
    from prompt_tune.report import describe_evaluation
    from prompt_tune.setup import pick_device

    if transfer or classes is not None:
        from prompt_tune.transfer import evaluate_on

        there = evaluate_on(
            run,
            data=data,
            classes=classes or "all",
            split=split,
            part=part,
            knowledge=knowledge,
            device=pick_device(device),
            transfer=transfer,
        )
        _say(there.result, as_json, describe_evaluation(there.result, there.folder))
        return

    found = run_evaluate(
        run,
        split=split,
        part=part,
        data=data,
        knowledge=knowledge,
        device=pick_device(device),
    )
    _say(found.result, as_json, describe_evaluation(found.result, found.folder))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders that were evaluated.")],
    split: Annotated[str, typer.Option(help="The evaluated split, as its folder is named.")],
    out: Annotated[Path | None, typer.Option(help="A folder for table.md and figures.")] = None,
    as_json: Json = False,
) -> None:
    """One table of evaluated runs: metrics with intervals, parameters and step times."""
    from prompt_tune.compare import compare_runs

    table = compare_runs(runs, split=split, out=out)
    _say(table.rows, as_json, table.text)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Evaluated runs, or folders of runs.")],
    split: Annotated[str, typer.Option(help="The evaluated split, as its folder is named.")],
    metric: Annotated[str, typer.Option(help="What methods are ranked by.")] = "accuracy",
    style: Annotated[str, typer.Option(help="text, markdown, latex or csv.")] = "text",
    base_to_novel: Annotated[
        bool, typer.Option("--base-to-novel", help="Accuracy on both halves of the classes.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the tables and the figure of ranks.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Methods over seeds and data sets: intervals, paired tests, budgets and average ranks.

    With --base-to-novel base, novel and harmonic accuracy instead.
    """
    from cache.errors import RecipeError
    from prompt_tune.method_table import compare_methods
    from prompt_tune.tables import STYLES

    chosen = next((known for known in STYLES if known == style), None)
    if chosen is None:
        what, wanted = "no such style of table", ", ".join(STYLES)
        raise RecipeError(what, where="--style", found=style, wanted=wanted)
    if base_to_novel:
        from prompt_tune.base_novel_table import compare_base_to_novel

        if metric != "accuracy":
            what = "base-to-novel is of accuracies"
            raise RecipeError(what, where="--metric", found=metric, wanted="accuracy")
        halves = compare_base_to_novel(runs, split=split, out=out)
        _say(halves.to_json(), as_json, halves.text(chosen))
        return
    found = compare_methods(runs, split=split, metric=metric, out=out)
    _say(found.to_json(), as_json, found.text(chosen))


@app.command()
def ablate(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a preset by name.")],
    data: Annotated[str, typer.Option(help="Images: a declaration, folder, CSV, JSON or npz.")],
    knowledge: Annotated[Path, typer.Option(help="A sealed knowledge cache.")],
    out: Annotated[Path, typer.Option(help="A folder for all runs, table and figure.")],
    seeds: Annotated[str, typer.Option(help="A run of every variant for each: 1-3.")] = "1-3",
    split: Annotated[str, typer.Option(help="To evaluate on.")] = "test",
    part: Annotated[int | None, typer.Option(min=1, help="A stratified part: images.")] = None,
    metric: Annotated[str, typer.Option(help="What is compared.")] = "accuracy",
    only: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="knowledge, 'image condition', rank, rows, texts or source. Repeatable."),
    ] = None,
    source: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="The cache of another language model: NAME=FILE. May be repeated."),
    ] = None,
    overrides: Overrides = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Does the knowledge help? A recipe against itself with other knowledge, or none."""
    from cache.errors import RecipeError
    from prompt_tune.ablation import ablate as run_ablate
    from prompt_tune.many import parse_seeds
    from prompt_tune.recipe import load_tune_recipe
    from prompt_tune.setup import pick_device

    named = [(name, Path(file)) for name, _, file in (s.partition("=") for s in source or ())]
    if any(not name or file == Path() for name, file in named):
        what = "a source has the form NAME=FILE"
        raise RecipeError(what, where="--source", found=" ".join(source or ()))
    found = run_ablate(
        load_tune_recipe(recipe, tuple(overrides or ())),
        data=data,
        knowledge=knowledge,
        out=out,
        seeds=parse_seeds(seeds),
        split=split,
        part=part,
        metric=metric,
        only=only,
        sources=dict(named),
        device=pick_device(device),
    )
    _say(found.to_json(), as_json, found.text())
    for error in found.refused.values():
        raise error


@data_app.command("check")
def data_check(
    data: Annotated[str, typer.Argument(help="A declaration, folder, CSV, JSON, npz or preset.")],
    as_json: Json = False,
) -> None:
    """Counts, balance, broken files, duplicates, patients in two splits; exit code 1 on a fault.

    A fault is a missing or unreadable file, a label that is no class, a split or class without
    images, a file listed twice, equal pixels or one patient in two splits (unless the declaration
    allows it), equal pixels under two classes, or, where the declaration is strict, other counts
    or another file than expected. Everything else is a warning.
    """
    from prompt_tune.data.check import check_data

    found = check_data(data)
    _say(found.to_json(), as_json, found.describe())
    if not found.passed:
        raise SystemExit(DIFFERENT)


@assets_app.command("list")
def assets_list(as_json: Json = False) -> None:
    """The embedded assets: what they are, their licence, whether they are here."""
    from cache.assets import describe, listing

    states = listing()
    _say([s.to_json() for s in states], as_json, describe(states))


@assets_app.command("fetch")
def assets_fetch(
    names: Annotated[Optional[list[str]], typer.Argument(help="All where none is named.")] = None,  # noqa: UP045
) -> None:
    """Fetches assets from the package index and checks their digests."""
    from cache.assets import fetch, table

    for name in names or list(table()):
        typer.echo(f"{name}: {fetch(name)}")


@assets_app.command("verify")
def assets_verify(
    names: Annotated[Optional[list[str]], typer.Argument(help="All where none is named.")] = None,  # noqa: UP045
) -> None:
    """Reads every byte of fetched assets again and compares digests."""
    from cache.assets import describe, table, verify

    states = verify(names or list(table()))
    typer.echo(describe(states))
    if any(row.state != "present" for row in states):
        raise SystemExit(3)


@app.command("list")
def list_names(
    kind: Annotated[
        str | None,
        typer.Argument(help="methods, recipes, alignment, extraction or data; else all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What comes with the package, by name: methods, recipes and data sets."""
    from knowledge_extract.presets import FOLDER
    from prompt_tune.listing import describe, listing

    found = listing(kind, others={"extraction": FOLDER})
    _say(found, as_json, describe(found))


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="A folder for everything: runs/demo or runs/demo-full.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All splits, published budgets.")] = False,
) -> None:
    """The main job on real parts: the same commands a user would type, one after another."""
    from prompt_tune.demo import commands, describe_prediction, predicted_seconds

    out = out or Path("runs/demo-full" if full else "runs/demo")
    steps = commands(out, full=full)
    if full:
        typer.echo(describe_prediction(predicted_seconds(steps)))
    for step in steps:
        typer.echo(f"\n$ vademecum {step.line}")
        if code := app(step.arguments, standalone_mode=False):  # an interrupt comes back as 130
            raise SystemExit(code)


def _extra(arguments: list[str]) -> str:
    """The extra of the distribution that a command needs."""
    if {"push", "pull", "export"} & set(arguments[1:2]):
        return "share"
    return "extract" if {"extract", "audit", "layers"} & set(arguments[:2]) else "tune"


def main() -> None:
    """Entry point: refuses to run shadowed, and turns errors into one line and an exit code."""
    if (wrong := _shadowed()) is not None:
        typer.echo(
            f"error: another package stands in the way: {wrong}. Remove it, or use a fresh venv.",
            err=True,
        )
        raise SystemExit(7)
    from cache.errors import VademecumError
    from cache.signals import unwind_on_signals

    unwind_on_signals()
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        app(arguments)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("The same command goes on where this one stopped.", err=True)
        raise
    except VademecumError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    except ModuleNotFoundError as error:
        if debug or (error.name or "").partition(".")[0] in {*PACKAGES, "cli", ""}:
            raise
        from cache.extras import missing

        absent = missing("this command", str(error.name), _extra(arguments))
        typer.echo(f"error: {absent}", err=True)
        raise SystemExit(absent.exit_code) from None
    except OSError as error:
        if debug or error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}:
            raise
        typer.echo(f"error: {error.filename or 'disk'}: {error.strerror}", err=True)
        raise SystemExit(7) from None


if __name__ == "__main__":
    main()
