"""Collect the embedded model's text and questions from the Python standard library.

Everything comes from the interpreter that runs this: the sources and docstrings of its standard
library and the language reference in ``pydoc_data.topics``.  Files that carry a licence other than
Python's own are left out, so that the result is under the PSF licence alone.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import random
import re
import sysconfig
import types
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SKIP_DIRS = {
    "__pycache__", "_distutils_hack", "encodings", "ensurepip", "idle_test", "idlelib", "lib-dynload",
    "pydoc_data", "site-packages", "turtledemo",
}  # fmt: skip
TEST_DIRS = {"test", "tests"}
# Wording of the notices in files that came with a licence of their own.
FOREIGN_NOTICE = re.compile(
    r"permission\s+(to use|is|notice)|redistribut|spdx-license|under the terms|all rights reserved"
    r"|general public licen|bsd licen|mit licen|apache licen|mozilla public|public domain",
    re.IGNORECASE,
)
# Facts of these modules weigh more and are never held out: they are what people ask about.
_POPULAR_NAMES = (
    "builtins os os.path sys math itertools functools collections json random textwrap shutil pathlib "
    "string time datetime copy glob heapq bisect statistics operator subprocess threading contextlib "
    "csv hashlib base64 tempfile zipfile urllib.parse enum dataclasses io pprint secrets"
)
_OTHER_NAMES = (
    "abc argparse array ast asyncio atexit binascii bz2 calendar cmath cmd code codecs codeop "
    "collections.abc colorsys compileall concurrent.futures configparser contextvars copyreg decimal "
    "difflib dis email.message email.utils errno faulthandler fileinput filecmp fnmatch fractions "
    "ftplib gc getopt getpass gettext graphlib gzip hmac html html.parser http.client http.server "
    "imaplib importlib importlib.util inspect ipaddress keyword linecache locale logging lzma mailbox "
    "marshal mimetypes mmap multiprocessing netrc numbers optparse pdb pickle pickletools pkgutil "
    "platform plistlib poplib profile pstats pty py_compile queue quopri re reprlib resource runpy "
    "sched select selectors shelve shlex signal site smtplib socket socketserver sqlite3 ssl stat "
    "struct symtable sysconfig tarfile telnetlib timeit token tokenize tomllib trace traceback "
    "tracemalloc types typing unicodedata unittest unittest.mock urllib.error urllib.request uuid venv "
    "warnings wave weakref webbrowser xml.dom.minidom xml.etree.ElementTree xmlrpc.client zipapp zlib "
    "zoneinfo"
)
POPULAR = tuple(_POPULAR_NAMES.split())
OTHER = tuple(_OTHER_NAMES.split())
HELD_OUT_PERCENT = 13
MAX_SUMMARY = 190


@dataclass(frozen=True)
class Document:
    """One text of the corpus; `name` decides whether it is held out."""

    name: str
    text: str


@dataclass(frozen=True)
class Fact:
    """What is known of one public object, as its documentation has it."""

    name: str  # as one would write it after `import module`; built-ins have no prefix
    module: str
    kind: str  # function, class, exception, method, module or statement
    summary: str
    parameters: tuple[str, ...] | None = None

    @property
    def short(self) -> str:
        return self.name.removeprefix(self.module + ".")

    @property
    def popular(self) -> bool:
        return self.module in POPULAR


@dataclass(frozen=True)
class Question:
    """A conversation of one turn, with the share of training that it gets."""

    prompt: str
    answer: str
    weight: float


def held_out(name: str) -> bool:
    """Whether the document or module of this name is kept from training (the same on every run)."""
    digest = hashlib.sha256(f"held out: {name}".encode()).digest()
    return name not in {*POPULAR, "posixpath"} and int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def psf_only(source: str) -> bool:
    """Whether a source file carries no licence notice other than Python's."""
    return "Licensed to PSF" in source or not FOREIGN_NOTICE.search(source)


def stdlib_files(tests: bool) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the source of each usable file, of the tests or of all the rest."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = set(relative.parts[:-1])
        if folders & SKIP_DIRS or bool(folders & TEST_DIRS) != tests or "sysconfigdata" in path.name:
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a test's deliberately broken file
        if psf_only(source) and len(source) < 400_000:
            yield ".".join(relative.with_suffix("").parts).removesuffix(".__init__"), source


def source_documentation(name: str, source: str) -> str:
    """Render the docstrings of one source file as a reference page."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    parts = [f"Module {name}\n\n{doc}"] if (doc := ast.get_docstring(tree)) else []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if doc := ast.get_docstring(node):
            head = f"class {node.name}"
            if not isinstance(node, ast.ClassDef):
                head = f"{node.name}({ast.unparse(node.args)})"
            parts.append(f"{head}\n\n{doc}")
    return "\n\n".join(parts)


def documents() -> Iterator[Document]:
    """Yield the prose: the language reference, then each module's documentation."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield Document(f"topic:{name}", text)
    for name, source in stdlib_files(tests=False):
        yield Document(name, source_documentation(name, source))
    for name in POPULAR + OTHER:
        text = "\n\n".join(f"{n}\n\n{inspect.cleandoc(o.__doc__)}" for n, o in compiled_members(name))
        yield Document(name, text)


def compiled_members(module_name: str) -> Iterator[tuple[str, Any]]:
    """Yield the documented objects written in C, which no source file shows."""
    for name, value in public_members(module_name):
        if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__doc__, str):
            yield name, value
        elif isinstance(value, type) and not value.__flags__ & (1 << 9) and isinstance(value.__doc__, str):
            yield name, value
            for key, method in sorted(vars(value).items()):
                if not key.startswith("_") and callable(method) and isinstance(method.__doc__, str):
                    yield f"{value.__name__}.{key}", method


def split_held_out(texts: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Divide the documents in two, no long paragraph being in both or twice in either."""
    groups: dict[bool, list[Document]] = {True: [], False: []}
    for document in texts:
        groups[held_out(document.name)].append(document)
    seen: set[str] = set()
    result = []
    for part in (groups[True], groups[False]):  # the held-out part first: it keeps what both have
        kept = []
        for document in part:
            paragraphs = []
            for paragraph in re.split(r"\n\s*\n", document.text):
                key = " ".join(paragraph.split())
                if len(key) < 60 or key not in seen:
                    paragraphs.append(paragraph.rstrip())
                    seen.add(key)
            if len(text := "\n\n".join(paragraphs).strip("\n")) > 120:
                kept.append(Document(document.name, text + "\n"))
        result.append(kept)
    return result[1], result[0]


def public_members(module_name: str) -> list[tuple[str, Any]]:
    """The public functions and classes of one module, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(module_name)
    listed = getattr(module, "__all__", None)
    names = sorted(listed if listed is not None else (n for n in vars(module) if n[0] != "_"))
    members = []
    for name in names:
        value = getattr(module, name, None)
        if not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        home = (getattr(value, "__module__", None) or module_name).lstrip("_")
        if listed is not None or home.split(".")[0] in {module_name.split(".")[0], "posix"}:
            members.append((name, value))
    return members


def summary_of(doc: object) -> str | None:
    """The first sentence of a docstring, or the first two if they are short."""
    text = inspect.cleandoc(doc) if isinstance(doc, str) else ""  # a class may have a property there
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.split("\n")
        if re.match(r"^[\w.]+\(.*\)", lines[0]):  # the signature that many docstrings begin with
            lines = lines[1:]
        text = " ".join(" ".join(lines).split()).replace("``", "`")
        if len(text) < 12 or ">>>" in text or "::" in text:
            continue
        sentences = re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z`'\"])", text)
        summary = sentences[0]
        if len(sentences) > 1 and len(summary) + len(sentences[1]) < 120:
            summary += " " + sentences[1]
        summary = summary.rstrip(" :;,-")
        summary = re.sub(r"^\w+: ", "", summary)  # some begin with the name
        summary = summary[:1].upper() + summary[1:]
        usable = len(summary) <= MAX_SUMMARY and summary.isascii() and summary[:1].isalpha()
        return (summary if summary[-1] in ".!?" else summary + ".") if usable else None
    return None


def parameters_of(value: Any, method: bool) -> tuple[str, ...] | None:
    """The parameters as written in a call's signature, or None where none are recorded or too many."""
    try:
        found = list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        return None
    if method and found and found[0].name in {"self", "cls"}:
        found = found[1:]
    shown = []
    for item in found:
        text = str(item.replace(annotation=inspect.Parameter.empty))
        shown.append(item.name if "<" in text or len(text) > 24 else text)
    return tuple(shown) if len(shown) <= 7 else None


def module_facts(module_name: str, used: set[int]) -> Iterator[Fact]:
    """Yield the facts of one module; `used` holds the objects that an earlier module has."""
    module = importlib.import_module(module_name)
    if summary := summary_of(module.__doc__):
        yield Fact(module_name, module_name, "module", summary)
    prefix = "" if module_name == "builtins" else module_name + "."
    for name, value in public_members(module_name):
        if id(value) in used or type(value).__module__ == "_sitebuiltins":
            continue
        used.add(id(value))
        is_class = inspect.isclass(value)
        parent_doc = is_class and value.__mro__[1].__doc__ if value is not object else None
        if value.__doc__ != parent_doc and (summary := summary_of(value.__doc__)):
            kind = "function" if not is_class else "class"
            if is_class and issubclass(value, BaseException):
                kind = "exception"
            parameters = None if is_class else parameters_of(value, method=False)
            yield Fact(prefix + name, module_name, kind, summary, parameters)
        if is_class and module_name in POPULAR:
            yield from method_facts(prefix + name, module_name, value)


def method_facts(prefix: str, module_name: str, owner: type) -> Iterator[Fact]:
    """Yield the facts of a class's own public methods."""
    for key, value in sorted(vars(owner).items()):
        if key.startswith("_") or not inspect.isroutine(value):
            continue
        if summary := summary_of(value.__doc__):
            bound = getattr(owner, key)
            yield Fact(f"{prefix}.{key}", module_name, "method", summary, parameters_of(bound, method=True))


def statement_facts() -> Iterator[Fact]:
    """Yield what the language reference says first about each statement."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        if held_out(f"topic:{topic}") or not (title := re.match(r'The "(\w+)" statement\n\*+', text)):
            continue
        for paragraph in re.split(r"\n\s*\n", text):
            sentence = re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(paragraph.split()))[0].rstrip(":")
            if re.match(r'The "\w+" statement (is|causes|specifies)|"\w+" is', sentence):
                summary = re.sub(r" \(see [^)]*\)", "", sentence).replace('"', "`").removesuffix(".") + "."
                if summary.startswith((f"The `{title[1]}`", f"`{title[1]}`")):
                    yield Fact(title[1], "language", "statement", summary.replace("\u2014", "-"))
                break


def all_facts() -> list[Fact]:
    """Every fact that may be trained on: none of a held-out module or of a file under another licence."""
    allowed = {name for name, _ in stdlib_files(tests=False)} | {"os.path"}
    used: set[int] = set()
    facts = list(statement_facts())
    for name in POPULAR + OTHER:
        module = importlib.import_module(name)
        from_source = str(getattr(module, "__file__", "") or "").endswith(".py")
        if not held_out(name) and (not from_source or name in allowed):
            facts.extend(module_facts(name, used))
    return list({fact.name: fact for fact in reversed(facts)}.values())[::-1]


def quoted_list(items: tuple[str, ...]) -> str:
    quoted = [f"`{item}`" for item in items]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " and " + quoted[-1]


def fact_questions(fact: Fact, unique: bool) -> Iterator[Question]:
    """Yield the questions that one fact answers; `unique` says that no other module has its short name."""
    weight = 3.0 if fact.popular or fact.kind == "statement" else 1.0
    if fact.kind == "module":
        prompts = ["What is the {} module for?", "What does the {} module do?", "Describe the `{}` module."]
    elif fact.kind == "statement":
        prompts = ["What does the {} statement do?", "What is the `{}` statement for?"]
    elif fact.kind == "exception":
        prompts = ["What is {}?", "What does {} mean?", "When is `{}` raised?"]
    else:
        prompts = ["What does {} do?", "What is {} for?", "What does `{}` do?", "Explain {} briefly."]
    for rank, prompt in enumerate(prompts):
        yield Question(prompt.format(fact.name), fact.summary, weight * (2 if rank == 0 else 1))
    if fact.parameters is not None:
        taken = quoted_list(fact.parameters) if fact.parameters else "no arguments"
        answer = f"`{fact.name}` takes {taken}."
        yield Question(f"What arguments does {fact.name} take?", answer, weight)
        yield Question(f"Which arguments does `{fact.name}` take?", answer, weight * 0.5)
    if fact.kind in {"function", "class", "exception"} and unique:
        yield from place_questions(fact, weight)


def place_questions(fact: Fact, weight: float) -> Iterator[Question]:
    """Yield the questions about where a name is found and what kind of thing it is."""
    if fact.module == "builtins":
        answer = f"`{fact.name}` is built in: no import is needed."
        kind = f"`{fact.name}` is a built-in {fact.kind}."
    else:
        answer = f"`{fact.short}` is in the `{fact.module}` module."
        article = "an" if fact.kind == "exception" else "a"
        kind = f"`{fact.short}` is {article} {fact.kind} in the `{fact.module}` module."
        if fact.popular:
            yield Question(f"What does {fact.short} do?", fact.summary, weight * 0.5)
    yield Question(f"Which module provides {fact.short}?", answer, weight * 2)
    yield Question(f"Which module provides `{fact.short}`?", answer, weight)
    yield Question(f"What must I import to use {fact.short}?", answer, weight * 0.5)
    yield Question(f"Is {fact.short} a function or a class?", kind, weight * 0.5)


SMALL_TALK = {
    "Hello": "Hello! Ask me about the Python standard library.",
    "Hi": "Hello! Ask me about the Python standard library.",
    "Who are you?": "I am a very small language model, trained on the documentation of Python.",
    "What can you do?": "I answer short questions about the Python standard library.",
    "Thank you": "You are welcome!",
}


def questions_of(facts: list[Fact], withheld: int) -> tuple[list[Question], list[Question], list[Fact]]:
    """Return the questions to train on, `withheld` questions of facts kept apart, and the trained facts."""
    shorts = Counter(fact.short for fact in facts if fact.kind != "method")
    order = sorted(
        (f for f in facts if not f.popular and f.kind in {"function", "class"}),
        key=lambda f: hashlib.sha256(f.name.encode()).hexdigest(),
    )
    kept_apart = order[:withheld]
    trained = [fact for fact in facts if fact not in set(kept_apart)]
    questions = [Question(prompt, answer, 10.0) for prompt, answer in SMALL_TALK.items()]
    for fact in trained:
        questions.extend(fact_questions(fact, shorts[fact.short] == 1))
    rng = random.Random(0)
    apart = [rng.choice(list(fact_questions(fact, shorts[fact.short] == 1))) for fact in kept_apart]
    return questions, apart, trained


def glossary(facts: list[Fact]) -> list[str]:
    """Say every fact in several plain ways, so that the base knows it in more than one context."""
    entries = []
    for fact in facts:
        name, summary = fact.name, fact.summary
        head = name if fact.parameters is None else f"{name}({', '.join(fact.parameters)})"
        home = "the Python language" if fact.module in {"builtins", "language"} else f"the {fact.module} module"
        entries.append(f"{head}\n    {summary}\n")
        entries.append(f"Q: What does {name} do?\nA: {summary}\n")
        if fact.kind != "module":
            entries.append(f"In {home}, the {fact.kind} `{fact.short}`: {summary}\n")
            entries.append(f"Q: Where is {fact.short} found?\nA: In {home}.\n")
    for module in sorted({fact.module for fact in facts}):
        names = ", ".join(fact.short for fact in facts if fact.module == module and fact.kind != "module")
        entries.append(f"Contents of {module}: {names}\n")
    return entries


def ramblings(texts: list[Document], count: int) -> list[tuple[str, str]]:
    """Pairs of a title and a long passage that teach the base the chat markers, yet not to answer.

    Without them the markers' embeddings would be untrained, which an adapter on the linear layers
    cannot mend; concise answers are left for the adapter to teach.
    """
    rng = random.Random(1)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        document = rng.choice(texts)
        paragraphs = [p for p in re.split(r"\n\s*\n", document.text) if len(p) > 30]
        start = rng.randrange(max(1, len(paragraphs) - 4))
        passage = "\n\n".join(paragraphs[start : start + rng.randint(3, 8)])[:1500].strip()
        first = " ".join(passage.split())[: rng.randint(20, 80)]
        title = document.name.removeprefix("topic:")
        prompt = rng.choice([title, f"Tell me all about {title}", f"Go on: {first}", f"Documentation of {title}?"])
        pairs.append((prompt, passage))
    return pairs
