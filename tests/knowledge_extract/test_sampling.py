"""Seeded draws against exact probabilities, and rows that cannot change each other."""

import hashlib
import math
import random
from itertools import accumulate

import pytest
import torch
from transformers import AutoModelForCausalLM

from knowledge_extract import sampling
from knowledge_extract.generate import Decoding, generate
from knowledge_extract.model import as_language_model
from knowledge_extract.sampling import Sampler, draw_seed

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.5])


def exact(temperature, top_p):
    """Token by token, in plain Python."""
    weights = [math.exp(z / temperature) for z in LOGITS.tolist()]
    chances = {t: w / sum(weights) for t, w in enumerate(weights)}
    kept, total = {}, 0.0
    for token in sorted(chances, key=lambda t: -chances[t]):
        kept[token] = chances[token]
        total += chances[token]
        if total >= top_p:
            break
    return {t: p / total for t, p in kept.items()}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.6)])
@pytest.mark.parametrize("nucleus", [1024, 2])
def test_tokens_are_as_frequent_as_they_are_likely(temperature, top_p, nucleus, monkeypatch):
    monkeypatch.setattr(sampling, "NUCLEUS", nucleus)
    wanted, draws = exact(temperature, top_p), 3000
    sampler = Sampler(range(draws), temperature, top_p)
    found = sampler(LOGITS.expand(draws, -1), range(draws))
    assert set(found) <= set(wanted)
    for token, chance in wanted.items():
        error = 4 * math.sqrt(chance * (1 - chance) / draws)
        assert abs(found.count(token) / draws - chance) < error + 1e-9


def test_one_draw_by_hand():
    wanted, source = exact(0.7, 0.9), random.Random(5)
    sampler = Sampler([4, 5], 0.7, 0.9)
    for _ in range(20):
        left = source.random()
        sums = accumulate(wanted.values())
        token = next(t for t, total in zip(wanted, sums, strict=True) if total > left)
        assert sampler(LOGITS[None], [1]) == [token]


def test_every_answer_has_a_seed_of_its_own():
    seeds = {
        draw_seed(s, c, i, a)
        for s in range(3)
        for c in ("a", "b")
        for i in range(3)
        for a in range(3)
    }
    assert len(seeds) == 54
    text = b'{"attempt":2,"class":"b","item":3,"seed":1}'
    first = hashlib.sha256(text).digest()[:8]
    assert draw_seed(1, "b", 3, 2) == int.from_bytes(first, "big")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_answer_does_not_depend_on_its_batch(family, model_folder):
    language = as_language_model(
        AutoModelForCausalLM.from_pretrained(model_folder(family)), 2, "none"
    )
    prompts = [[1, 40, 50, 60, 70], [1, 90], [1, 30, 31, 32, 33, 34, 35, 36], [1, 90, 91]] * 3

    def answers(rows):
        made = generate(
            language,
            [prompts[n] for n in rows],
            end=2,
            stops=frozenset({2}),
            max_new_tokens=12,
            decoding=Decoding(
                Sampler([100 + n for n in rows], 1.5, 0.95),
                lambda row, ids: ids[-1:] == [rows[row] + 60],
            ),
        )
        return dict(zip(rows, made.answers, strict=True))

    together = answers(range(12))
    alone = {n: answers([n])[n] for n in range(12)}
    assert together == alone == answers(range(11, -1, -1))
    assert len({tuple(a) for a in together.values()}) == 12
