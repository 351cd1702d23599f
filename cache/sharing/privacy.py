"""A lint for personal data in the names and texts of a cache.

It looks for forms, not for meaning: paths, e-mail addresses, dates, numbers of patients and
examinations, DICOM UIDs, names of users and hosts, telephone numbers, names of persons with a
title or label. A name without any such form is not found; nothing here replaces a person's look.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cache.plain import looks_like_place, strings_of
from cache.store import KnowledgeCache

FEW_CLASSES = 5  # fewer may be one patient's findings

_MONTH = (
    r"(?:jan(?:uary|uar)?|feb(?:ruary|ruar)?|mar(?:ch)?|märz|apr(?:il)?|may|mai|june?|juni|july?"
    r"|juli|aug(?:ust)?|sep(?:t(?:ember)?)?|o[ck]t(?:ober)?|nov(?:ember)?|de[cz](?:ember)?)"
)
_DAY, _NUMBER, _YEAR = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:0?[1-9]|1[0-2])", r"(?:19|20)\d\d"
_IMAGE = (
    r"(?:dcm|dicom|nii|nii\.gz|nrrd|mha|mhd|svs|ndpi|mrxs|scn|czi|png|jpe?g|tiff?|bmp|pdf|docx?)"
)
_FOLDER = (
    r"(?:home|users?|data|datasets?|scans?|images?|imgs?|patients?|pat|cases?|stud(?:y|ies)|series"
    r"|mnt|media|tmp|var|export|archive|dicom|raw|train|val|test|project|projects|scratch|work)"
)

# What is no personal data though it looks like it: digests, codes of public terminologies, and
# addresses on the web, whose hosts and paths are looked at by rules of their own.
_IGNORED = re.compile(
    r"""\b(?=\d*[a-f])[0-9a-f]{32,}\b
      | \b(?:SNOMED(?:[ -]?CT)?|SCTID|ICD(?:-\w+)*|OMIM|ORPHA(?:NET)?|UMLS|MeSH|LOINC|PMID|PMC|DOI
           |CUI|HP|MONDO|UBERON|CL|GO|NCIT|CHEBI|DOID|RadLex|RID|FMA|MedDRA)
        [ :#_-]{0,2}[CDMT]?\d[\d./-]*
      | \b10\.\d{4,9}/\S+ | \barXiv:\d{4}\.\d{4,5}\b""",
    re.VERBOSE,
)
_WEB = re.compile(r"\bhttps?://([^\s/?#]+)([^\s]*)", re.IGNORECASE)
_PUBLIC = re.compile(
    r"(?:^|\.)(?:doi\.org|nih\.gov|arxiv\.org|wikipedia\.org|zenodo\.org|github\.com|who\.int"
    r"|huggingface\.co|radiopaedia\.org|figshare\.com|kaggle\.com|snomed\.org|nature\.com)$"
)


def _rule(pattern: str, *, case: bool = False) -> re.Pattern[str]:
    return re.compile(pattern, re.VERBOSE | (0 if case else re.IGNORECASE))


RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "DICOM UID",
        _rule(r"(?<![\d.])[0-2]\.\d+(?:\.\d+){4,}|(?<![\d.])(?:1\.2\.840|2\.25)\.\d[\d.]{5,}"),
    ),
    ("e-mail address", _rule(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")),
    (
        "user and host",
        _rule(r"(?<![\w/])[a-z_][\w.-]*@[a-z][\w-]+(?![\w.-])|\b[A-Z][A-Z0-9-]+\\[a-z]\w+"),
    ),
    (
        "user name",
        _rule(r"\b(?:user(?:name)?|login|operator|uploaded\ by|created\ by)\s*[:=]\s*\S+"),
    ),
    (
        "host name",
        _rule(
            r"""\b(?:\d{1,3}\.){3}\d{1,3}\b | \b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b | \blocalhost\b
              | \b[\w-]+(?:\.[\w-]+)*\.(?:local|lan|intern|internal|localdomain|intranet|corp)\b
              | \b(?:[\w-]+\.)*[a-z-]+\d+\.(?:[a-z][\w-]*\.)+[a-z]{2,6}\b
              | \b(?:pacs|srv|server|desktop|laptop|workstation|host|nas|gpu)(?:[-_][\w-]*)?\d[\w-]*
              | \bws-[a-z]*-?\d+\b"""
        ),
    ),
    (
        "path",
        _rule(
            rf"""(?:^|[\s"'(=])\.{{1,2}}/\S | \S+\.{_IMAGE}\b
              | \b{_FOLDER}[/\\](?:[\w.-]*\d|[\w.-]+[/\\])[\w./\\-]* | \b[A-Z]:\\ | \\\\[\w.-]+\\"""
        ),
    ),
    (
        "date",
        _rule(
            rf"""(?<![\d.]){_YEAR}([-/._]){_NUMBER}\1{_DAY}(?![\d])
              | (?<![\d.]){_DAY}([-/.]){_NUMBER}\2(?:{_YEAR}|\d\d)(?![\d.])
              | (?<![\d.]){_NUMBER}([-/.]){_DAY}\3(?:{_YEAR}|\d\d)(?![\d.])
              | (?<!\d){_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)
              | \b{_DAY}(?:st|nd|rd|th|\.)?[\s-]?{_MONTH}[\s,.-]*(?:{_YEAR}|'?\d\d)\b
              | \b{_MONTH}[\s.-]+{_DAY}(?:st|nd|rd|th)?,?\s+{_YEAR}\b"""
        ),
    ),
    (
        "telephone number",
        _rule(
            r"""(?<![\d.])\+\d[\d\s()./-]{6,}\d | \(\d{2,5}\)[\s-]?\d{3,}[\s-]?\d{2,}
              | (?<![\d.-])\d{3}[-.\s]\d{3}[-.\s]\d{4}(?!\d) | (?<!\d)0\d{2,4}[\s/-]\d{3,}[\s-]?\d*
              | \b(?:tel|phone|telefon|fax|mobile|cell)(?:\.|\b)\s*(?:no\.?|number)?\s*[:=]?\s*
                [\d(+][\d\s()/-]{4,}\d"""
        ),
    ),
    (
        "number of a patient or examination",
        _rule(
            r"""\b(?:mrn|pid|pat(?:ient)?[\s_-]?(?:id|no\.?|nr\.?|number|\#)?|accession|acc
                 |stud(?:y|ie)[\s_-]?(?:id|no\.?|uid)|case[\s_-]?(?:id|no\.?|nr\.?|number|\#)
                 |record[\s_-]?(?:id|no\.?|number)|fall(?:nummer|-?nr\.?)|hospital[\s_-]?(?:id|no\.?)
                 |nhs|ssn|insurance[\s_-]?no\.?|specimen[\s_-]?(?:id|no\.?)|subject|sub|id)
                [\s.:=\#_-]{0,3}(?:no\.?|nr\.?|number|id)?[\s.:=\#_-]{0,3}[A-Z]{0,4}-?\d{3,}
              | \b\d{3}-\d{2}-\d{4}\b
              | \b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"""
        ),
    ),
    ("number of a specimen", _rule(r"\b[A-Z]{1,3}-?\d{2}-\d{3,}\b", case=True)),
    (
        "birth date",
        _rule(r"\b(?:dob|d\.o\.b\.|born|geb(?:oren|\.)|birth\s?date|date\ of\ birth)\s*[:=]?\s*\d"),
    ),
    (
        "name of a person",
        _rule(
            r"""[^\W\d_]{2,}\^[^\W\d_]
              | \b(?:[Pp]atient(?:'s)?(?:\ [Nn]ame)?|[Pp]t|[Ss]urname|[Pp]at(?:ient)?_?[Nn]ame)
                \s*[:=]\s*[A-Z]'?[^\W\d_]+
              | \b(?:Mr|Mrs|Ms|Mme|Dr|Prof|Pt)\.?\ [A-Z][^\W\d_]+
              | \b(?:Miss|Herrn?|Frau|Signora?|Señora?)\ [A-Z][^\W\d_]+
              | \b(?:reported|referred|signed|read)\ by:?\ [A-Z][^\W\d_]+""",
            case=True,
        ),
    ),
)
_DIGITS = re.compile(r"(?<![\d.,])\d{6,}(?![\d])")  # no word boundary: IMG_0012345, CXR1234567


@dataclass(frozen=True)
class Finding:
    """Something that looks like personal data.

    Args:
        where: the place, such as `class basophil, name`.
        what: of which form.
        found: the characters.
    """

    where: str
    what: str
    found: str

    def describe(self) -> str:
        """The finding as one line."""
        shown = self.found if len(self.found) <= 60 else self.found[:59] + "…"
        return f"{self.where}: looks like a {self.what}: {shown!r}"

    def to_json(self) -> dict[str, str]:
        """The finding as plain data."""
        return asdict(self)


def _web(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text without addresses on the web, and what is wrong with those."""
    found, left = [], text
    for match in _WEB.finditer(text):
        host, path = match[1], match[2]
        if "@" in host:
            found.append(("user and host", host))
        if not _PUBLIC.search(host.rpartition("@")[2].partition(":")[0].lower()):
            left = left.replace(match[0], f" {host} {path.replace('/', ' ')} ")
        else:
            left = left.replace(match[0], " ")
    return left, found


def lint(text: str) -> list[tuple[str, str]]:
    """What in `text` looks like personal data: pairs of the form and the characters.

    >>> lint("Ki-67 index, grade 2, 10-20 µm"), lint("scan of 2021-03-04")
    ([], [('date', '2021-03-04')])
    """
    text, found = _web(_IGNORED.sub(" ", text))
    if looks_like_place(text):
        found.append(("path", text.strip()))
    for what, pattern in RULES:
        found += [(what, match[0].strip()) for match in pattern.finditer(text)]
    for match in _DIGITS.finditer(text):
        if int(match[0]) % 1000:  # round numbers are counts and doses
            found.append(("number of a patient or examination", match[0]))
    return found


def lint_texts(texts: Iterator[tuple[str, str]]) -> Iterator[Finding]:
    """The findings in texts that come with their places."""
    for where, text in texts:
        for what, characters in lint(text):
            yield Finding(where, what, characters)


def _texts(opened: KnowledgeCache) -> Iterator[tuple[str, str]]:
    for record in opened.classes:
        for field, value in asdict(record).items():
            yield f"class {record.id}, {field}", str(value)
    yield from strings_of(opened.provenance, "provenance")
    yield from strings_of(opened.recipe, "recipe")
    for block in opened.blocks.values():
        if block.dtype is None:
            for entry in block.entries():
                where = f"block {block.name}, class {entry.class_id}, item {entry.item}"
                values: Mapping[str, Any] = entry.values
                yield from ((f"{where}, {k}", v) for k, v in values.items() if isinstance(v, str))


def lint_cache(opened: KnowledgeCache) -> list[Finding]:
    """What in the names and texts of a cache looks like personal data, each text once."""
    seen: dict[str, str] = {}
    for where, text in _texts(opened):
        seen.setdefault(text, where)
    return list(lint_texts((where, text) for text, where in seen.items()))


def few_classes(opened: KnowledgeCache) -> str | None:
    """A warning if there are so few classes that they may describe one person."""
    count = len(opened.classes)
    if count >= FEW_CLASSES:
        return None
    return f"only {count} classes: make sure that they do not describe one patient"


def describe_findings(findings: Sequence[Finding], most: int = 5) -> str:
    """The first findings in one line, and how many more there are."""
    shown = "; ".join(finding.describe() for finding in findings[:most])
    more = len(findings) - most
    return shown + (f"; and {more} more" if more > 0 else "")
