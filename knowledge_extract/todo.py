"""What of a plan is still to be computed."""

from collections.abc import Set

from knowledge_extract.answers import AnswerIds
from knowledge_extract.job import Job
from knowledge_extract.units import Unit


def missing(job: Job, present: Set[str], answers: AnswerIds) -> list[tuple[str, list[Unit]]]:
    """The units to compute, by model load.

    A unit whose answers are committed but whose token ids are lost is done again before another
    model can read them.
    """
    lost = {
        (unit.task.source, unit.pieces)
        for _, units in job.passes
        for unit in units
        if unit.task.kind == "reread"
        and not job.keys(unit) <= present
        and any(job.key(unit.task.source, piece) not in answers for piece in unit.pieces)
    }
    todo = []
    for quantisation, units in job.passes:
        wanted = [
            unit
            for unit in units
            if not job.keys(unit) <= present
            or (unit.task.kind == "generate" and (unit.task.source, unit.pieces) in lost)
        ]
        if wanted:
            todo.append((quantisation, wanted))
    return todo
