"""Texts and attributes a model makes up: counted, refused, recorded, repeatable, resumable."""

import json

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from cache import KnowledgeCache, verify
from cache.errors import CacheMismatchError, ModelError, RecipeError
from cache.foreign.add_texts import About, add_texts, new_texts
from cache.recipe import read_yaml
from cache.sharing.licences import licences_of
from knowledge_extract import extract, extraction, load_extract_recipe, plan
from knowledge_extract.auditing import audit
from knowledge_extract.phrasing import Rules, fault, kept
from knowledge_extract.settings import RunSettings

CPU = RunSettings(device="cpu", batch_size=3)
TEXTS = {
    "kind": "generated",
    "prompt": "Describe {name}.",
    "form": "phrase",
    "count": 3,
    "max_new_tokens": 30,
    "temperature": 2.5,
    "top_p": 0.999,
    "attempts": 400,
}
VALUES = {
    "kind": "attributes",
    "by": "model",
    "prompt": "What {attribute} has {name}?",
    "begin": "It is",
    "names": ["size", "colour"],
    "values": 2,
    "samples": 3,
    "max_new_tokens": 30,
    "temperature": 2.5,
    "top_p": 0.999,
    "attempts": 400,
}
BLOCKS = {"descriptions": TEXTS, "attributes": VALUES}


@pytest.fixture
def recipe(make_recipe):
    def made(**blocks):
        return make_recipe(blocks=blocks or BLOCKS)

    return made


def rows(path, block):
    with KnowledgeCache.open(path) as found:
        return {(e.class_id, e.item): dict(e.values) for e in found.blocks[block].entries()}


def test_as_many_texts_as_asked_and_every_refused_answer(recipe, tmp_path):
    extract(recipe(), tmp_path / "k.h5", CPU)
    texts, draws = (
        rows(tmp_path / "k.h5", name) for name in ("descriptions", "descriptions_draws")
    )
    places = {(c, n) for c in ("basophil", "monocyte", "platelet") for n in range(3)}
    assert set(texts) == set(draws) == places
    rules, reasons = Rules("phrase", 60, avoid_name=False), set()
    names = {"basophil": "basophil", "monocyte": "monocyte of the blood", "platelet": "platelet"}
    for place, row in texts.items():
        name = names[place[0]]
        asked = f"Describe {name}."
        assert row["text"]
        assert fault(row["text"], name, asked, rules, cut_off=False) == ""
        assert row["prompt"] == asked
        record = json.loads(draws[place]["text"])
        assert [attempt for attempt, _, _ in record] == list(range(len(record)))
        for _, reason, answer in record:
            again = fault(kept(answer, rules), name, asked, rules, cut_off=False)
            assert reason and reason in {again, "cut off"}
            reasons.add(reason)
        assert draws[place]["text_tokens"] >= row["text_tokens"]
    assert len(reasons) >= 2
    with KnowledgeCache.open(tmp_path / "k.h5") as found:
        spec = found.blocks["descriptions"].spec
        assert spec["decoding"] == {
            "temperature": "2.5", "top_p": "0.999", "seed": 1, "revision": 1
        }  # fmt: skip
        assert found.recipe["blocks"]["descriptions"]["prompt"] == "Describe {name}."
        assert found.blocks["descriptions_draws"].spec["source"] == "draws"


def test_values_are_ranked_by_how_often_they_were_drawn(recipe, tmp_path):
    extract(recipe(), tmp_path / "k.h5", CPU)
    values, draws = (rows(tmp_path / "k.h5", name) for name in ("attributes", "attributes_draws"))
    rules = Rules("phrase", 5, avoid_name=True)
    for (class_id, question), row in draws.items():
        taken = [kept(a, rules).lower() for _, reason, a in json.loads(row["text"]) if not reason]
        assert len(taken) >= 3
        own = [values[class_id, 2 * question + rank] for rank in range(2)]
        assert {one["attribute"] for one in own} == {("colour", "size")[question]}
        assert [one["rank"] for one in own] == [0, 1]
        order = sorted(set(taken), key=lambda v: (-taken.count(v), taken.index(v)))
        assert [one["value"] for one in own] == order[:2]
        assert row["prompt"].endswith(" It is")


def test_neither_batch_nor_interruption_changes_a_text(
    recipe, tmp_path, interrupt_after, no_model_later
):
    whole = extract(recipe(), tmp_path / "a.h5", CPU)
    resume = interrupt_after(2)
    with pytest.raises(KeyboardInterrupt):
        extract(recipe(), tmp_path / "b.h5", CPU)
    resume()
    planned = plan(recipe(), tmp_path / "b.h5", CPU)
    assert 0 < planned.cached < planned.entries == 9 + 9 + 12 + 6
    assert {step.task for step in planned.steps} == {"sample"}
    assert extract(recipe(), tmp_path / "b.h5", CPU).reused == planned.cached
    extract(recipe(), tmp_path / "c.h5", RunSettings(device="cpu", batch_size=50))
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "c.h5").read_bytes()
    no_model_later()
    assert extract(recipe(), tmp_path / "a.h5", CPU).content_id == whole.content_id


@pytest.fixture
def no_model_later(request):
    return lambda: request.getfixturevalue("no_model")


def test_more_texts_keep_those_that_are_there(recipe, tmp_path):
    extract(recipe(described=TEXTS), tmp_path / "k.h5", CPU)
    before = rows(tmp_path / "k.h5", "described")
    more = recipe(described=TEXTS | {"count": 5})
    assert extract(more, tmp_path / "k.h5", CPU, overwrite=True).reused == 18
    after = rows(tmp_path / "k.h5", "described")
    assert len(after) == 15 and {k: after[k] for k in before} == before
    extract(recipe(described=TEXTS | {"seed": 2}), tmp_path / "s.h5", CPU)
    other = rows(tmp_path / "s.h5", "described")
    assert not {r["text"] for r in other.values()} & {r["text"] for r in before.values()}


def test_a_question_without_a_sound_answer_is_refused(recipe, tmp_path):
    hopeless = recipe(x=TEXTS | {"max_words": 1, "attempts": 3, "form": "sentence"})
    match = r"class \w+, item \d: the model gave no sound answer in 3 attempts; found \d times"
    with pytest.raises(ModelError, match=match):
        extract(hopeless, tmp_path / "k.h5", CPU)
    same = recipe(x=VALUES | {"samples": 1, "values": 3, "attempts": 3, "top_p": 1e-9})
    with pytest.raises(ModelError, match="no sound answer in"):
        extract(same, tmp_path / "v.h5", CPU)


@pytest.mark.parametrize(
    ("blocks", "match"),
    [
        ({"x": TEXTS | {"prompt": "What?"}}, "the prompt template must use {name}"),
        ({"x": TEXTS | {"begin": "{attribute}"}}, "unknown placeholder {attribute}"),
        ({"x": TEXTS | {"count": 0}}, "blocks.x.count"),
        ({"x": TEXTS | {"top_p": 1.5}}, "blocks.x.top_p"),
        ({"x": VALUES | {"names": ["a", "a"]}}, "names of attributes are distinct"),
        ({"x": VALUES | {"prompt": "{name}"}}, "must use {attribute}"),
        ({"x": VALUES | {"bye": 1}}, "unknown key"),
        ({"x": {"kind": "draws", "of": "y"}}, "draws of 'y': give one for a block of generated"),
        ({"x": TEXTS, "x_draws": TEXTS | {"seed": 2}}, "the name 'x_draws' is needed for draws"),
        (
            {"descriptions": TEXTS, "given": {"kind": "texts", "of": "descriptions"}},
            "'given' reads given descriptions; call the generated ones otherwise",
        ),
    ],
)
def test_recipes_that_are_refused(recipe, blocks, match):
    with pytest.raises(RecipeError, match=match):
        recipe(**blocks)


@pytest.fixture(scope="session")
def filler(tiny_models, tmp_path_factory):
    """A random BERT that fills gaps."""
    folder = tmp_path_factory.mktemp("filler") / "tiny-bert"
    folder.mkdir()
    size = tiny_models.save_tokenizer(folder)
    tiny_models.save_bert_config(folder, size, width=24, layers=2, heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        BertForMaskedLM(BertConfig.from_pretrained(folder, initializer_range=0.5)).save_pretrained(
            folder
        )
    return folder


def cloze(folder, **more):
    model = {"folder": str(folder), "licence": "MIT"}
    return {
        "kind": "attributes",
        "by": "cloze",
        "model": model,
        "names": ["colour", "location"],
    } | more


def test_a_gap_is_filled_with_the_most_likely_words(recipe, filler, tmp_path):
    result = extract(recipe(seen=cloze(filler)), tmp_path / "k.h5", CPU)
    assert result.computed == 3 * (2 * 3 + 2)
    values, draws = rows(tmp_path / "k.h5", "seen"), rows(tmp_path / "k.h5", "seen_draws")
    tokenizer = AutoTokenizer.from_pretrained(filler)
    model = BertForMaskedLM.from_pretrained(filler).double().eval()
    names = {"basophil": "basophil", "monocyte": "monocyte of the blood", "platelet": "platelet"}
    asked = {
        0: "The typical colour of {} is [MASK].",
        1: "The typical location of {} is at [MASK].",
    }
    words = {t: i for t, i in tokenizer.get_vocab().items() if t.isalpha()}
    for class_id, name in names.items():
        for question, template in asked.items():
            ids = tokenizer(template.format(name), return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(ids).logits[0, ids[0] == tokenizer.mask_token_id][0]
            named = {w for w in words if any(n in w for n in name.split() if len(n) > 3)}
            left = set(words) - named - {("colour", "location")[question]}
            best = sorted(left, key=lambda w: -float(logits[words[w]]))[:3]
            own = [values[class_id, 3 * question + rank] for rank in range(3)]
            assert [one["value"] for one in own] == best
            record = json.loads(draws[class_id, question]["text"])
            assert [word for _, reason, word, _ in record if not reason] == best
            assert {reason for _, reason, _, _ in record} <= {
                "", "no word", "part of a word", "names what was asked"
            }  # fmt: skip
            chances = [float(p) for *_, p in record]
            assert chances == sorted(chances, reverse=True)
    assert {r for row in draws.values() for _, r, *_ in json.loads(row["text"])} >= {
        "part of a word"
    }


def test_a_filler_is_resumed_recorded_and_refused(
    recipe, filler, model_folder, tmp_path, monkeypatch
):
    both = {"described": TEXTS, "seen": cloze(filler, names=["colour"], values=2)}
    whole = extract(recipe(**both), tmp_path / "a.h5", CPU)
    real, done = extraction.Filler.entries, []

    def entries(self, gap):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(gap)
        return real(self, gap)

    with monkeypatch.context() as patched:
        patched.setattr(extraction.Filler, "entries", entries)
        with pytest.raises(KeyboardInterrupt):
            extract(recipe(**both), tmp_path / "b.h5", CPU)
    assert plan(recipe(**both), tmp_path / "b.h5", CPU).cached == 6
    assert extract(recipe(**both), tmp_path / "b.h5", CPU).content_id == whole.content_id
    with KnowledgeCache.open(tmp_path / "a.h5") as found:
        assert str(filler.parent) not in json.dumps(found.recipe)
        assert found.recipe["blocks"]["seen"]["model"]["name"] == "tiny-bert"
        assert found.provenance["seen_licence"] == "MIT"
        assert [one.kind for one in licences_of(found.provenance)] == ["unknown", "permissive"]
    extract(recipe(described=TEXTS), tmp_path / "c.h5", CPU)  # no filler is asked for
    with pytest.raises(ModelError, match=r"the fill-mask model cannot be loaded|no mask token"):
        extract(recipe(seen=cloze(model_folder("llama"))), tmp_path / "d.h5", CPU)
    for wrong, match in (
        ({"template": "{name} is {mask} {mask}"}, "the cloze template has one gap"),
        ({"templates": {"colour": "{name}"}}, "the colour template must use {mask}"),
        ({"model": {"gguf": "x.gguf"}}, "a fill-mask model comes from hub, folder or asset"),
    ):
        with pytest.raises(RecipeError, match=match):
            recipe(seen=cloze(filler, **wrong))


def test_any_value_is_audited_alone(recipe, model_folder, tmp_path):
    extract(recipe(x=VALUES), tmp_path / "k.h5", CPU)
    audited = set()
    for seed in range(6):
        report = audit(tmp_path / "k.h5", k=2, seed=seed, model=str(model_folder("llama")), run=CPU)
        assert report.passed
        audited |= {(one.block, one.item) for one in report.findings}
    assert {item for block, item in audited if block == "x"} & {2, 3}


def test_an_audit_repeats_what_the_model_said(recipe, filler, model_folder, tmp_path):
    extract(recipe(**BLOCKS, seen=cloze(filler)), tmp_path / "k.h5", CPU)
    (tmp_path / "t.json").write_text(
        json.dumps({c: [c] for c in ("basophil", "monocyte", "platelet")})
    )
    about = About("more", "a colleague", "MIT")
    add_texts(tmp_path / "k.h5", tmp_path / "t.json", tmp_path / "m.h5", about)
    report = audit(tmp_path / "m.h5", k=1000, model=str(model_folder("llama")), run=CPU)
    assert report.passed and report.entries == len(report.findings) == 36
    assert report.left_out == ("more", "seen", "seen_draws")
    assert "made otherwise, not looked at: more, seen, seen_draws" in report.describe()
    assert verify(tmp_path / "m.h5").entries == 36 + 24 + 3
    new_texts(tmp_path / "t.json", tmp_path / "n.h5", about, dataset="tiny")
    with pytest.raises(CacheMismatchError, match="nothing in this cache was made by"):
        audit(tmp_path / "n.h5", run=CPU)


@pytest.mark.parametrize("dataset", ["bloodmnist", "organamnist"])
def test_the_presets_name_the_classes_of_the_data(dataset, root):
    declared = read_yaml(root / "prompt_tune" / "data" / "presets" / f"{dataset}.yaml")
    recipe = load_extract_recipe(f"{dataset}-texts")
    assert recipe.dataset == declared["dataset"]
    found = [{"id": one.id, "name": one.name} for one in recipe.classes]
    assert found == sorted(declared["classes"], key=lambda one: one["id"])
    assert {one.modality for one in recipe.classes} == {declared["modality"]}
    blocks = recipe.blocks
    assert (blocks["descriptions"].count, blocks["symptoms"].count) == (50, 4)
    assert blocks["symptoms"].avoid_name and blocks["attributes"].values == 3
