"""Documents of records and of look-ups, made from a seed.

In code, manuals and prose hardly any token must find one exact place far back. Here
many must: a document tells hundreds of records (JSON, tables, settings, logs,
assignments, sentences) whose keys and values are words, numbers, UUIDs, hashes and the
like, and asks for them in another order and in other words. Heads that are distilled on
some of it learn the queries of such tokens; the source is "records", or "records:SEED"
for other documents. None of the evaluation's tasks is worded like it.
"""

import dataclasses
import random
import uuid
from collections.abc import Callable, Iterator

from sparda_jax.checks import require

NAME = "records"
DOCUMENTS = 64
_MAX_SEED = 2**32 - 1
# Characters of a document: some 15,000 to 30,000 tokens.
_SHORTEST, _LONGEST = 30_000, 60_000

_FIRST = """
    amber ancient bitter bold brisk broad calm careful clever coastal crimson curious
    damp distant dusty eager early empty faded famous fierce fluent frozen gentle gilded
    glossy golden grave hasty hidden hollow honest humble idle iron jolly keen late
    lively lonely lucid marble mellow misty modest narrow nimble noble northern olive
    pale patient plain polished proud quiet rapid ready rough round rural rustic scarlet
    secure shallow silent silver simple sleepy slender smooth sober solid southern
    stable steady stormy sturdy sudden sunny swift tame tender thin tidy urban useful
    velvet vivid warm weary western wide wild wooden young
""".split()
_SECOND = """
    anchor anvil arch badger bakery barrel basin beacon bridge canal candle canyon
    castle cedar chapel cherry cliff clock comet copper cradle crane crown delta desk
    drum eagle elm engine falcon ferry fiddle field forest fountain garden gate glacier
    granite harbour hazel heron hill island ivy kettle lagoon lantern ledger lemon
    library lily lizard maple market meadow mill mirror monk moor nest oak ocean orchard
    otter owl paddle palace parcel pebble pepper pillar pine planet plough pond quarry
    raven ribbon river robin saddle sail shell shore signal sparrow spire station stone
    summit table temple thistle tiger tower trail tunnel valley violin wagon walnut
    willow window wolf
""".split()
_GIVEN = """
    Ada Alan Anna Boris Carla Cyrus Dana Edgar Elena Farid Greta Hana Ivan Jonas Karin
    Lena Marco Nadia Oscar Petra Quentin Rosa Samir Tessa Ulrich Vera Walter Yusuf Zoe
""".split()
_FAMILY = """
    Abbott Berger Castillo Dalton Eriksen Fischer Grant Hoffman Ibarra Jensen Kowalski
    Lindqvist Moreau Novak Okafor Pereira Quist Rossi Schwartz Tanaka Ueda Vargas Weber
    Yilmaz Zeman
""".split()
_LABELS = """
    account address badge balance box code contract file folder invoice label licence
    locker order parcel permit price record reference route serial shelf slot stamp
    ticket token
""".split()
_VERBS = """
    carried crossed counted covered described drew filled found followed guarded held
    kept left lit measured moved opened painted passed reached repaired saw sold studied
""".split()

# Ways to tell a record. A document's chapter keeps to one of them.
_TOLD = (
    '{{"{label}": "{value}", "of": "{key}"}}\n',
    '{{"id": "{key}", "{label}": "{value}"}}\n',
    '    "{key}": "{value}",\n',
    "{key},{value},{word}\n",
    "| {key} | {word} | {value} |\n",
    "{key}: {value}\n",
    "{key} = {value}\n",
    "<{label} of='{key}'>{value}</{label}>\n",
    '{label}s["{key}"] = "{value}"\n',
    'register("{key}", {label}="{value}")\n',
    "INFO {word}: {label} of {key} set to {value}\n",
    "The {label} of {key} is {value}.\n",
    "{key} was given the {label} {value}.\n",
    "For {key} the {word} {label} became {value}.\n",
    "They wrote {value} on the {label} that belongs to {key}.\n",
)
# Ways to ask for it; what stands before the value says which one it must be.
_ASKED = (
    "Whose {label}? That of {key}. It reads {value}.\n",
    "Question: which {label} does {key} have?\nAnswer: {value}\n\n",
    "The {label} of {key} is {value}.\n",
    "{key} -> {value}\n",
    "{key}: {value}\n",
    ">>> {label}s[\"{key}\"]\n'{value}'\n",
    'assert find("{key}") == "{value}"\n',
    '{{"asked": "{key}", "found": "{value}"}}\n',
    "Looking up {key} gives {value}.\n",
    "As was said above, the {label} that {key} has is {value}.\n",
    "SELECT {label} FROM {label}s WHERE name = '{key}';\n{value}\n",
    "Q: {key}?\nA: {value}\n",
)
# The other way round: the value is known, and its key is asked for.
_TURNED = (
    "Which entry has the {label} {value}? That is {key}.\n",
    "{value} <- {key}\n",
    'assert owner("{value}") == "{key}"\n',
)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """One thing that is told, and told again later.

    Attributes:
      text: What must be found.
      told: Character at which the record has it.
      answered: Character at which it is told again.
    """

    text: str
    told: int
    answered: int


@dataclasses.dataclass(frozen=True)
class RecordsDocument:
    """A document.

    Attributes:
      text: All of it.
      lookups: In order of `answered`.
    """

    text: str
    lookups: tuple[Lookup, ...]


def _pair(rng: random.Random) -> str:
    return f"{rng.choice(_FIRST)}-{rng.choice(_SECOND)}"


def _number(rng: random.Random) -> str:
    digits = rng.randint(4, 9)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _hash(rng: random.Random) -> str:
    digits = rng.choice((8, 12, 16, 32, 40))
    return f"{rng.getrandbits(4 * digits):0{digits}x}"


def _path(rng: random.Random) -> str:
    parts = [rng.choice(_SECOND) for _ in range(rng.randint(2, 4))]
    return "/".join(("", *parts, f"{rng.choice(_FIRST)}{rng.randrange(100)}.txt"))


def _person(rng: random.Random) -> str:
    middle = rng.choice("ABCDEFGHJKLMNOPRSTW")
    return f"{rng.choice(_GIVEN)} {middle}. {rng.choice(_FAMILY)}"


def _identifier(rng: random.Random) -> str:
    return f"{rng.choice(_FIRST)}_{rng.choice(_SECOND)}_{rng.randrange(1000)}"


def _mail(rng: random.Random) -> str:
    name = f"{rng.choice(_GIVEN)}.{rng.choice(_FAMILY)}{rng.randrange(100)}"
    return f"{name.lower()}@{rng.choice(_SECOND)}.example"


def _address(rng: random.Random) -> str:
    return ".".join(str(rng.randrange(256)) for _ in range(4))


def _date(rng: random.Random) -> str:
    day = f"{rng.randint(1950, 2049)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return f"{day} {rng.randrange(24):02}:{rng.randrange(60):02}"


_Draw = Callable[[random.Random], str]
# Those that stand twice are drawn twice as often.
_KEYS: tuple[_Draw, ...] = (
    *(_pair, _pair, _uuid, _uuid, _number, _hash),
    *(_path, _person, _identifier, _mail, _address),
)
_VALUES: tuple[_Draw, ...] = (
    *(_number, _number, _uuid, _uuid, _pair, _hash),
    *(_path, _date, _address, _person),
)


@dataclasses.dataclass(frozen=True)
class _Record:
    label: str
    key: str
    value: str
    key_at: int
    value_at: int


class _Writer:
    """The text so far, and where things are in it."""

    def __init__(self) -> None:
        self.length = 0
        self.lookups: list[Lookup] = []
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def add(self, text: str) -> None:
        self._parts.append(text)
        self.length += len(text)

    def fill(self, template: str, **fields: str) -> dict[str, int]:
        """Adds a template, and tells where its keys and values begin."""
        begin, places = self.length, {}
        for field in ("key", "value"):
            before = template.partition("{" + field + "}")[0]
            places[field] = begin + len(before.format(**fields))
        self.add(template.format(**fields))
        return places


def _sentence(rng: random.Random) -> str:
    subject, thing = rng.choice(_SECOND), rng.choice(_SECOND)
    return (
        f"The {rng.choice(_FIRST)} {subject} {rng.choice(_VERBS)} the "
        f"{rng.choice(_FIRST)} {thing}, and {rng.choice(_GIVEN)} {rng.choice(_VERBS)} "
        f"a {rng.choice(_SECOND)}. "
    )


def _tell(writer: _Writer, rng: random.Random, used: set[str]) -> list[_Record]:
    """A chapter: records of one form, close together or with prose between them."""
    template, label = rng.choice(_TOLD), rng.choice(_LABELS)
    draw_key, draw_value = rng.choice(_KEYS), rng.choice(_VALUES)
    spread = rng.random() < 0.25
    count = rng.randint(15, 40) if spread else rng.randint(40, 160)
    writer.add(f"# {label.capitalize()}s of the {rng.choice(_SECOND)}\n\n")
    told = []
    for _ in range(count):
        key, value = draw_key(rng), draw_value(rng)
        if key in used or value in used or key == value:
            continue
        used.update((key, value))
        for _ in range(rng.randint(1, 4) if spread else 0):
            writer.add(_sentence(rng))
        at = writer.fill(
            template, label=label, key=key, value=value, word=rng.choice(_FIRST)
        )
        told.append(_Record(label, key, value, at["key"], at["value"]))
    writer.add("\n")
    return told


def _ask(writer: _Writer, rng: random.Random, records: list[_Record]) -> None:
    """Look-ups of records, in the order that they come in, in a few ways."""
    ways = rng.sample(_ASKED, 2)
    if rng.random() < 0.25:
        ways.append(rng.choice(_TURNED))
    for record in records:
        template = rng.choice(ways)
        at = writer.fill(
            template, label=record.label, key=record.key, value=record.value
        )
        if template in _TURNED:
            found = Lookup(record.key, record.key_at, at["key"])
        else:
            found = Lookup(record.value, record.value_at, at["value"])
        writer.lookups.append(found)
    writer.add("\n")


def make_document(seed: int, index: int) -> RecordsDocument:
    """One document.

    Args:
      seed: Of the source.
      index: Which of its documents.
    """
    rng = random.Random(f"{seed}/{index}")
    writer, used = _Writer(), set()
    writer.add(f"Register {_hash(rng)} of the {_pair(rng)}\n\n")
    size = rng.randint(_SHORTEST, _LONGEST)
    chapters: list[list[_Record]] = []
    # A chapter is followed by questions for all of it, and the last third of the
    # document asks for what any of them told.
    while writer.length < 0.66 * size:
        chapters.append(_tell(writer, rng, used))
        _ask(writer, rng, rng.sample(chapters[-1], len(chapters[-1])))
    told = [record for chapter in chapters for record in chapter]
    while writer.length < size:
        _ask(writer, rng, rng.sample(told, min(20, len(told))))
    return RecordsDocument(writer.text, tuple(writer.lookups))


def records_seed(source: str, field: str = "source") -> int | None:
    """The seed of a source "records" or "records:SEED"; None for any other source.

    Args:
      source: Name or path.
      field: For the message.

    Raises:
      ConfigError: If what follows the colon is no seed.
    """
    name, colon, seed = source.partition(":")
    if name != NAME:
        return None
    if not colon:
        return 0
    number = int(seed) if seed.isascii() and seed.isdigit() and len(seed) < 12 else -1
    wanted = f"'{NAME}', or '{NAME}:SEED' with a SEED from 0 to {_MAX_SEED}"
    require(0 <= number <= _MAX_SEED, field, source, wanted)
    return number


def record_documents(seed: int) -> Iterator[str]:
    """The texts of the source of a seed, in an order that does not change."""
    for index in range(DOCUMENTS):
        yield make_document(seed, index).text
