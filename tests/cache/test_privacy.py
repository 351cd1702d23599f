"""The lint for personal data: how much it finds, and how often it cries wolf."""

from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

from cache.sharing.privacy import RULES, few_classes, lint, lint_cache
from cache.store import KnowledgeCache

PLANTED = {
    "path": (
        "/home/jdoe/scans/case7.nii.gz", "/mnt/pacs/export/2021/ct", "C:\\Users\\meier\\Desktop",
        "\\\\fileserver\\radiology\\thorax", "~/data/oct", "../patients/p017", "scans/p0017/t1.nii",
        "patients/4711/series2", "data/train/drusen/0001.png", "file:///srv/images", "./raw/x1.dcm",
        "IM_0042.dcm", "thorax_left.svs", "images\\smear\\cell_12.bmp", "biopsy_scan_3.tiff",
        "seen on study/0042/img17",
    ),
    "e-mail": (
        "jane.doe@klinik-nord.de", "write to a.smith+ct@hospital.org.uk", "radiology@uni-x.edu",
        "mailto:doe@example.com", "dr_house@princeton-plainsboro.com",
    ),
    "date": (
        "2021-03-04", "2021/03/04", "04.03.2021", "4.3.2021", "03/04/2021", "3/4/21", "20210304",
        "4 March 2021", "March 4, 2021", "04-Mar-2021", "4th of scan: 12 Sept 2019", "2019.11.30",
        "acquired 31-12-1999", "12. Oktober 2020", "5 Dez 2018", "MAR-04-2021", "04.03.21",
        "Jan 5 1987", "born 1956", "DOB: 5.6.56", "date of birth 12 May 1961", "scan_20190817_a",
    ),
    "number": (
        "MRN 12345", "MRN: 00481516", "patient id 4711", "Patient-ID: A123456", "PID=998877",
        "pat. no. 23423", "00481516", "case no. 1234", "accession number 7654321", "ACC: CT-778899",
        "study id 20417", "CXR1234567", "IMG_0012345", "record number 55512", "Fallnummer 990123",
        "NHS 943 476 5919", "078-05-1120", "hospital no 887766", "subject 0017", "sub-0123",
        "S21-12345", "H19-004512", "SP-21-4711", "specimen id 90210", "Q4500123",
        "3f2504e0-4f89-11d3-9a0c-0305e82c3301", "nodule seen in 1837465", "insurance no. A99887766",
    ),
    "uid": (
        "1.2.840.113619.2.55.3.604688119.971.1268834063.467", "1.3.6.1.4.1.14519.5.2.1.6279.6001",
        "2.25.329800735698586629295641978511506172918", "1.2.276.0.7230010.3.1.4.8323329.5795",
        "instance 1.2.840.10008.5.1.4.1.1.2", "1.2.392.200036.9116.2.6.1.48",
    ),
    "user or host": (
        "jdoe@ws-rad-12", "root@pacs01", "pacs01.klinik.local", "srv-ct3", "DESKTOP-8F3K2L1",
        "node17.cluster.lan", "10.12.8.201", "KLINIK\\meier", "user: jdoe", "operator=mueller",
        "http://ris.hospital.intern/view", "workstation-4", "00:1b:44:11:3a:b7", "login: asmith",
    ),
    "telephone": (
        "+49 30 12345678", "(555) 123-4567", "555-123-4567", "tel. 040 123456", "0171 1234567",
        "phone: 555 0199 22", "+1-202-555-0143", "Fax 0221/987654",
    ),
    "person": (
        "Patient: Doe^John", "DOE^JANE^M", "Müller^Hans", "patient name: Anna Schmidt",
        "Mr. Smith, 67 years", "Mrs Jones", "Dr. Meyer reports", "Herr Schulze", "Frau Lehmann",
        "Patient's name: O'Neil", "referred by Prof. Weber", "Pt. Brown with cough",
        "signed by Karl Otto",
    ),
}  # fmt: skip

ORGANS = (
    "lung", "liver", "kidney", "colon", "breast", "retina", "skin", "bone marrow", "prostate",
    "left ventricle", "thyroid", "cervix", "lymph node", "pancreas", "oesophagus", "L4/L5 disc",
)  # fmt: skip
FINDINGS = (
    "adenocarcinoma", "squamous cell carcinoma grade 2", "benign cyst", "metastasis pT3 N1 M0",
    "fibrosis stage 3", "diffuse large B-cell lymphoma", "nodule 10-20 µm", "Gleason 3+4=7 tumour",
    "ductal carcinoma in situ, ER+/PR+/HER2-", "normal tissue", "inflammation (mild/moderate)",
    "BI-RADS 4 mass", "necrosis", "Duke's B lesion",
)  # fmt: skip
MODALITIES = (
    "T2-weighted MRI", "CT 512x512", "H&E 40x", "fundus photograph 45°", "OCT B-scan",
    "chest X-ray",
    "blood smear", "18F-FDG PET/CT", "CD3/CD4/CD8 staining", "dermoscopy",
)  # fmt: skip
DESCRIBED = (
    "{f} of the {o} with a nucleus to cytoplasm ratio of 2:1",
    "{o}: {f}, cells 12-15 µm across, about 150000 per microlitre",
    "In 2019 the WHO classification named it {f} of {o}; see https://doi.org/10.1002/path.5302",
    "{f} ({o}), ICD-O 8140/3, SNOMED CT 128462008, Ki-67 index above 20.5 %",
    "{o} {f} shows 1-2 lobes, p16 and p53 positive, 5 x 10^9/L, HU -1000 to 400",
    "Patients older than 65 with {f} of the {o}; 3 of 4 survive 5 years",
)
BLOOD = (
    "basophil", "eosinophil", "erythroblast", "immature granulocyte (metamyelocyte)", "platelet",
    "PC-3 cell line", "HPV16/18 positive cell", "CD34+ progenitor", "IL-2 receptor, type 1",
    "drusen", "choroidal neovascularization", "AMD stage 2/3", "HbA1c 6.5-7.0 %", "EGFR L858R",
    "COVID-19 pneumonia", "SARS-CoV-2", "10-year-old child", "24/7 monitoring",
    "V1-V6 leads, 12-lead ECG",
    "Q fever", "trisomy 21", "t(9;22)(q34;q11)", "G-CSF 300 µg", "grade 1/2/3",
    "1,25-dihydroxyvitamin D",
    "ISUP 1-5", "PI-RADS v2.1", "phase 2/3", "TNM 8th edition",
    "May-Grünwald-Giemsa",
    "March fracture", "Dr", "Hodgkin's disease", "10.5 to 12.3 mm",
    "1.5-T scanner, TR/TE 2000/30 ms",
    "b-values 0/500/1000 s/mm²", "ratio 1.2.1", "SUVmax 2.5",
)  # fmt: skip


def clean() -> list[str]:
    names = [f"{o} {f}, {m}" for o, f, m in product(ORGANS, FINDINGS, MODALITIES)]
    described = [d.format(f=f, o=o) for d, f, o in product(DESCRIBED, FINDINGS, ORGANS)]
    # every 4th name and every 3rd description: all parts, and an odd step through the product
    return [*BLOOD, *names[::4], *described[::3]][:1000]


def test_the_lint_finds_planted_identifiers_of_every_kind() -> None:
    planted = [(kind, text) for kind, texts in PLANTED.items() for text in texts]
    assert len(planted) >= 100
    missed = [(kind, text) for kind, text in planted if not lint(text)]
    assert len(missed) <= 0.02 * len(planted), missed


def test_identifiers_are_found_inside_a_description() -> None:
    texts = [text for texts in PLANTED.values() for text in texts]
    missed = [t for t in texts if not lint(f"A round nodule of the lung ({t}) with sharp borders.")]
    assert len(missed) <= 0.02 * len(texts), missed


def test_every_form_is_told_from_the_others() -> None:
    said = {text: {what for what, _ in lint(text)} for texts in PLANTED.values() for text in texts}
    assert all("DICOM UID" in said[text] for text in PLANTED["uid"])
    assert all("e-mail address" in said[text] for text in PLANTED["e-mail"])
    assert "user and host" in said["root@pacs01"] & said["KLINIK\\meier"]
    assert "birth date" in said["born 1956"]
    assert {what for whats in said.values() for what in whats} >= {what for what, _ in RULES}


def test_clean_medical_names_raise_few_alarms() -> None:
    texts = clean()
    assert len(texts) == len(set(texts)) == 1000
    alarms = [(text, found) for text in texts if (found := lint(text))]
    assert len(alarms) <= 10, alarms


@pytest.mark.parametrize(
    "text",
    ["ab" * 32, "sha256:" + "0123456789abcdef" * 4, "org/model-7B", "https://doi.org/10.1/x"],
)
def test_digests_hub_ids_and_dois_are_no_personal_data(text: str) -> None:
    assert lint(text) == []


def test_every_place_of_a_cache_is_looked_at(make: ModuleType, tmp_path: Path) -> None:
    named = (*make.CLASSES[:2], make.ClassRecord("a-b.c", "smear of Mrs. Jones", ""))
    path = tmp_path / "k.h5"
    recipe = {**make.RECIPE, "classes": [{"descriptions": ["seen on 2021-03-04"]}]}
    provenance = {"licence": "MIT", "notice": "asked jane.doe@klinik-nord.de"}
    make.cache_at(path, classes=named, recipe=recipe, provenance=provenance)
    with KnowledgeCache.open(path) as opened:
        found = {(finding.where, finding.what) for finding in lint_cache(opened)}
        warning = few_classes(opened)
    assert ("class a-b.c, name", "name of a person") in found
    assert ("provenance.notice", "e-mail address") in found
    assert ("recipe.classes[0].descriptions[0]", "date") in found
    assert warning is not None and "only 3 classes" in warning


def test_texts_of_a_block_are_looked_at(make: ModuleType, tmp_path: Path) -> None:
    blocks = {"answers": make.BLOCKS["answers"]}
    made = make.header(blocks=blocks, recipe={})
    folder = make.ShardFolder(tmp_path / "k.parts", header=made)
    entry = make.entry("answers", "ig")
    text = {**entry.values, "text": "as in case no. 12345 of this ward"}
    folder.commit([make.Entry("answers", "ig", 0, text, entry.source_digest)], batch_shape=(1,))
    make.seal(folder, tmp_path / "k.h5")
    with KnowledgeCache.open(tmp_path / "k.h5") as opened:
        places = [finding.where for finding in lint_cache(opened)]
    assert places == ["block answers, class ig, item 0, text"]
