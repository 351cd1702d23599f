"""One of several extraction processes: reads requests, commits units, replies; see `processes`."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from cache.errors import VademecumError
from cache.torchvision_schemas import install
from knowledge_extract.crew import OneProcess, Workplace
from knowledge_extract.engine import Fp16OverflowError
from knowledge_extract.job import prepare
from knowledge_extract.recipe import ExtractRecipe
from knowledge_extract.settings import RunSettings
from knowledge_extract.source import ModelSource


class _Worker:
    """The workplace that was opened last, and the model it needs."""

    def __init__(self, run: RunSettings) -> None:
        self._run, self._crew = run, OneProcess(run)
        self._place: Workplace
        self._quantisation = ""
        self._limit = 1

    def _open(self, request: dict[str, Any]) -> None:
        recipe = ExtractRecipe.model_validate_json(json.dumps(request["recipe"]))
        source = ModelSource(**request["source"]) if request["source"] else None
        job = prepare(recipe, self._run, wide=request["wide"], source=source)
        self._place = Workplace(job, Path(request["folder"]), wide=request["wide"])
        self._quantisation, self._limit = request["quantisation"], request["limit"]

    def serve(self, request: dict[str, Any]) -> dict[str, Any]:
        """Computes and commits one unit of the plan, in another workplace if one is named."""
        if "open" in request:
            self._open(request["open"])
        units = [self._place.job.units[request["unit"]]]
        (done,) = self._crew.work(self._place, self._quantisation, units, self._limit)
        self._limit = done.limit
        return vars(done)


def main() -> None:
    """Serves until there are no more requests, or one fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    replies = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    os.dup2(2, 1)  # what a library prints is no reply
    settings = json.loads(sys.argv[1])
    models = Path(settings["models"]) if settings["models"] else None
    run = RunSettings(**settings | {"models": models})
    install()
    if run.threads:
        torch.set_num_threads(run.threads)
    worker = _Worker(run)
    for line in sys.stdin:
        try:
            reply = worker.serve(json.loads(line))
        except (VademecumError, Fp16OverflowError) as error:
            reply = {"error": type(error).__name__, "message": str(error)}
        except Exception as error:  # noqa: BLE001 - the parent says it in one line
            reply = {"error": type(error).__name__, "message": str(error)[:300]}
        replies.write(json.dumps(reply) + "\n")
        if "error" in reply:
            return


if __name__ == "__main__":
    main()
