# ruff: noqa: SIM905 - one name a line would be long
"""Stage one against the straightforward loop, same prompts and same tokens.

    python bench/extract.py [--questions 200] [--new-tokens 64] [--json extract-bench.json]

The loop takes one class at a time: the library's own greedy `generate`, then a second pass over
prompt and answer with all hidden states, of which the last token's are kept. Contenders take turns,
in an order that alternates. Seconds are wall clock; the ratio of processor times is printed too,
because it does not see what else the machine does, and the share of peak on a CPU is of processor
time for the same reason. Memory is the highest resident set while a contender works. Rows that need
a GPU say "not measured" without one.
"""

import argparse
import ctypes
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # beside this lies a `cache.py`

import torch

from cache.recipe import validate
from knowledge_extract.answers import AnswerIds
from knowledge_extract.batches import Batches
from knowledge_extract.engine import Engine
from knowledge_extract.generate import generate
from knowledge_extract.job import Job, prepare
from knowledge_extract.model import LanguageModel, load_model
from knowledge_extract.quiet import quiet
from knowledge_extract.recipe import ExtractRecipe
from knowledge_extract.settings import RunSettings

FINDINGS = (
    "adenocarcinoma|an abscess|atrophy|a benign cyst|calcification|chronic inflammation|"
    "a diffuse lymphoma|fibrosis|a haematoma|infarction|a metastasis|necrosis|oedema|a polyp|"
    "a rupture|squamous cell carcinoma|stenosis|a stromal tumour|an ulcer|normal tissue"
).split("|")
ORGANS = "lung|liver|kidney|skin|retina|colon|brain|breast|spleen|heart".split("|")


def recipe_of(options: argparse.Namespace, numbers: Sequence[int]) -> ExtractRecipe:
    """Questions and descriptions of these numbers."""
    classes = []
    for number in numbers:
        name = f"{FINDINGS[number // 10 % 20]} of the {ORGANS[number % 10]}"
        seen = (
            f"{name[0].upper()}{name[1:]} alters the colour, outline and texture of what lies near"
        )
        text = (
            f"{seen}, and is told from what resembles it by its border, its density and its size."
        )
        classes.append({"id": f"q{number:04}", "name": name, "descriptions": [text]})
    kind, _, place = options.model.partition(":")
    data = {
        "dataset": "bench",
        "model": {kind: place},
        "compute_dtype": options.dtype,
        "classes": classes,
        "blocks": {
            "answers": {"kind": "answers", "max_new_tokens": options.new_tokens},
            "layers": {"kind": "states", "of": "answers", "pooling": "end_token"},
            "described": {"kind": "states", "of": "descriptions", "pooling": "last_token"},
        },
    }
    return validate(ExtractRecipe, data, where="bench")


def loop_generate(language: LanguageModel, job: Job) -> list[list[int]]:
    """One class at a time, two passes."""
    from transformers import GenerationConfig

    most = job.recipe.blocks["answers"].max_new_tokens  # type: ignore[union-attr]
    settings = GenerationConfig(
        max_new_tokens=most, do_sample=False, eos_token_id=sorted(job.stops), pad_token_id=job.end
    )
    answers = []
    for piece in job.pieces["answers"]:
        prompt = torch.tensor([piece.reading.ids], device=language.device)
        with torch.inference_mode():
            made = language.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )[0].tolist()
            while made[-1] in job.stops:
                made.pop()
            ids = torch.tensor([[*made, job.end]], device=language.device)
            hidden = language.model(ids, output_hidden_states=True).hidden_states
        torch.stack([h[0, -1] for h in hidden[1:]]).float().cpu()
        answers.append(made[len(piece.reading.ids) :])
    return answers


def loop_read(language: LanguageModel, job: Job) -> None:
    """One text at a time, every state of every layer, the last token's kept."""
    for piece in job.pieces["descriptions"]:
        ids = torch.tensor([piece.reading.ids], device=language.device)
        with torch.inference_mode():
            hidden = language.model(ids, output_hidden_states=True).hidden_states
        torch.stack([h[0, -1] for h in hidden[1:]]).float().cpu()


def ours(language: LanguageModel, job: Job, kind: str, batch: int, folder: Path) -> Any:
    """The units of one kind of task, as an extraction computes them."""
    answers = AnswerIds(folder)
    with Engine(job, language, answers, Batches(batch)) as engine:
        for unit in job.units:
            if unit.task.kind == kind:
                engine.entries(unit)
    if kind == "read":
        return None
    return [list(answers[job.key("answers", piece)]) for piece in job.pieces["answers"]]


def resident(field: str) -> float:
    """A line of /proc/self/status, in GB; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((int(x.split()[1]) * 1024 / 1e9 for x in lines if x.startswith(field)), 0.0)


class Peak:
    """The highest memory while it is entered, GB: of the device, or resident (sampled)."""

    def __enter__(self) -> "Peak":
        self.gb, self._on_gpu, self._over = 0.0, torch.cuda.is_available(), threading.Event()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.gb = max(self.gb, resident("VmRSS"))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._on_gpu:
            self.gb = torch.cuda.max_memory_allocated() / 1e9


@contextmanager
def measured(found: dict[str, float]) -> Any:
    """Adds seconds, processor seconds and peak memory to what was found before."""
    with Peak() as peak:
        wall, processor = time.perf_counter(), time.process_time()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found["seconds"] = found.get("seconds", 0.0) + time.perf_counter() - wall
        found["processor"] = found.get("processor", 0.0) + time.process_time() - processor
    found["peak_gb"] = max(found.get("peak_gb", 0.0), peak.gb)


def peak_gemm(dtype: torch.dtype, device: str) -> float:
    """The best matrix product of a few sizes, operations per second; on a CPU of the processor."""
    best, clock = 0.0, time.process_time if device == "cpu" else time.perf_counter
    for size in (1024, 2048):
        a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        for _ in range(5):
            began = clock()
            torch.mm(a, b)
            if device != "cpu":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (clock() - began))
    return best


def compare(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Both contenders over both tasks, in turns."""
    run = RunSettings(device=device, batch_size=options.batch_size)
    names = [(way, task) for way in ("ours", "loop") for task in ("generate", "read")]
    found: dict[Any, dict[str, float]] = {name: {} for name in names}
    tokens = texts = same = 0
    parts = [range(n, options.questions, options.rounds) for n in range(options.rounds)]
    jobs = [prepare(recipe_of(options, numbers), run) for numbers in parts if numbers]
    language = load_model(jobs[0].source, "none", options.dtype, jobs[0].end, run)
    rate = peak_gemm(getattr(torch, options.dtype), device)
    matrices = sum(m.weight.numel() for m in language.layers.modules() if hasattr(m, "in_features"))
    with quiet(), tempfile.TemporaryDirectory() as name:
        warm = prepare(recipe_of(options, [0]), run)
        loop_read(language, warm)
        for turn, job in enumerate(jobs):
            folder = Path(name) / str(turn)
            folder.mkdir()
            made: dict[str, Any] = {}
            for way, task in names if turn % 2 == 0 else [*names[2:], *names[:2]]:
                with measured(found[way, task]):
                    if way == "ours":
                        made[way, task] = ours(language, job, task, options.batch_size, folder)
                    else:
                        made[way, task] = (loop_generate if task == "generate" else loop_read)(
                            language, job
                        )
            both = zip(made["ours", "generate"], made["loop", "generate"], strict=True)
            same += sum(a == b for a, b in both)
            tokens += sum(map(len, made["ours", "generate"]))
            texts += sum(len(p.reading.ids) for p in job.pieces["descriptions"])
            rate = max(rate, peak_gemm(getattr(torch, options.dtype), device))
    for (_, task), row in found.items():
        row["entries_per_second"] = options.questions / row["seconds"]
        row["tokens_per_second"] = (tokens if task == "generate" else texts) / row["seconds"]
        if task == "read":
            seconds = row["processor" if device == "cpu" else "seconds"]
            row["share_of_peak"] = 2 * matrices * texts / seconds / rate
    rows = [{"way": way, "task": task, **found[way, task]} for way, task in names]
    return {"rows": rows, "same_answers": same, "answer_tokens": tokens, "peak_gemm": rate}


def bandwidth() -> float:
    """Bytes per second of a copy on the GPU, read and written."""
    a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    b, best = torch.empty_like(a), 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        b.copy_(a)
        torch.cuda.synchronize()
        best = max(best, 2 * a.numel() / (time.perf_counter() - began))
    return best


def gpu_rows(batches: Sequence[int]) -> list[dict[str, Any]]:
    """Decoding with a random model of 8B shape, against what the memory bandwidth allows."""
    kinds = ("nf4", "none")
    if not torch.cuda.is_available():
        return [{"quantisation": kind, "batch": None} for kind in kinds]
    from bench.gpu_test import random_language_model
    from bench.gpu_test import recipe_for as random_recipe

    rows, limit, run = [], bandwidth(), RunSettings(device="cuda")
    with tempfile.TemporaryDirectory() as name, quiet():
        folder = random_language_model(Path(name), layers=32, width=4096, device="cuda")
        for kind in kinds:
            job = prepare(random_recipe(folder, kind), run)
            language = load_model(job.source, kind, "bfloat16", job.end, run)
            parts = [*language.model.parameters(), *language.model.buffers()]
            weights = sum(p.numel() * p.element_size() for p in parts)
            embeddings = language.model.get_input_embeddings().weight
            weights -= embeddings.numel() * embeddings.element_size()  # a row of it per token
            config = language.model.config
            heads, size = config.num_key_value_heads, config.head_dim
            for batch in batches:
                prompts = [[0, *torch.randint(2, 250, (47,)).tolist()] for _ in range(batch)]

                def timed(new: int, model: Any = language, prompts: Any = prompts) -> float:
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    generate(model, prompts, end=1, stops=frozenset(), max_new_tokens=new)
                    torch.cuda.synchronize()
                    return time.perf_counter() - began

                timed(4)
                step = (timed(72) - timed(8)) / 64
                states = 2 * 2 * language.depth * heads * size * batch * (48 + 40)
                bound = (weights + states) / limit
                rows.append(
                    {"quantisation": kind, "batch": batch, "tokens_per_second": batch / step,
                     "bound": batch / bound, "share": bound / step}
                )  # fmt: skip
            del language, parts, embeddings
            torch.cuda.empty_cache()
    return rows


def table(facts: dict[str, Any]) -> str:
    """Everything as Markdown."""
    titles = "task|way|tokens/s|entries/s|peak GB|share of peak GEMM|ratio|of processor time"
    lines = [f"| {titles.replace('|', ' | ')} |", "|---" * 8 + "|"]
    by = {(row["way"], row["task"]): row for row in facts["rows"]}
    for task in ("generate", "read"):
        for way in ("loop", "ours"):
            row, loop = by[way, task], by["loop", task]
            share = f"{row['share_of_peak']:.0%}" if "share_of_peak" in row else ""
            ratios = [f"{loop[k] / row[k]:.1f}x" for k in ("seconds", "processor")]
            speed = f"{row['tokens_per_second']:.1f} | {row['entries_per_second']:.2f}"
            cells = [f"{row['peak_gb']:.2f}", share, *ratios]
            lines.append(f"| {task} | {way} | {speed} | {' | '.join(cells)} |")
    lines += ["", "| 8B shape on a GPU | batch | tokens/s | allowed by bandwidth | share |"]
    lines.append("|---" * 5 + "|")
    for row in facts["gpu"]:
        label = {"nf4": "nf4", "none": "bf16"}[row["quantisation"]]
        cells = ["", "not measured", "", ""]
        if row["batch"] is not None:
            speeds = [f"{row[k]:.0f}" for k in ("tokens_per_second", "bound")]
            cells = [str(row["batch"]), *speeds, f"{row['share']:.0%}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=RunSettings.batch_size)
    parser.add_argument("--rounds", type=int, default=2, help="turns the questions are dealt into")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--model", default="asset:smollm2-135m-instruct", help="asset:NAME or folder:PATH"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpu-batches", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    parser.add_argument("--json", type=Path, default=Path("extract-bench.json"))
    options = parser.parse_args()
    import transformers

    facts = {
        **compare(options, options.device),
        "gpu": gpu_rows(options.gpu_batches),
        "options": {k: str(v) for k, v in vars(options).items()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }
    print(table(facts))
    print(
        f"\n{options.questions} questions, {facts['answer_tokens']} answer tokens, "
        f"{facts['same_answers']} answers the same token by token; {facts['threads']} threads, "
        f"load {facts['load']:.1f}, {facts['peak_gemm'] / 1e9:.0f} GFLOP/s in a matrix product"
    )
    options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
