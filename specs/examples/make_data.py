"""Makes the data of the examples: `python specs/examples/make_data.py`. The same every time.

data/conversations.jsonl   short talks with an assistant: greetings, names, capitals, sums, opposites
data/pairs.jsonl           English sentences and their German translations, by a small grammar of both
data/chat, data/translate  a tokenizer for each (byte-level BPE), that of the talks with a chat template
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

DATA = Path(__file__).resolve().parent / "data"
TALKS, PAIRS, VOCABULARY = 1000, 3000, 512
END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# ---- conversations ---------------------------------------------------------------------------------------------------

NAMES = ("Ada", "Alan", "Grace", "Emmy", "Kurt", "Sofia", "Carl", "Marie", "Niels", "Lise")
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Austria": "Vienna",
    "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Poland": "Warsaw", "Ireland": "Dublin", "Egypt": "Cairo",
    "Japan": "Tokyo", "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "old": "young", "fast": "slow", "light": "dark", "early": "late", "open": "closed",
    "full": "empty", "high": "low", "hard": "soft",
}  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
Turn = tuple[str, str]  # of the user, of the assistant


def greeting(draw: random.Random) -> list[Turn]:
    return [(draw.choice(("Hello!", "Hi!", "Good morning!")), "Hello! How can I help you?")]


def name(draw: random.Random) -> list[Turn]:
    called = draw.choice(NAMES)
    return [(f"My name is {called}.", f"Nice to meet you, {called}."), ("What is my name?", f"Your name is {called}.")]


def capital(draw: random.Random) -> list[Turn]:
    country = draw.choice(list(CAPITALS))
    return [(f"What is the capital of {country}?", f"The capital of {country} is {CAPITALS[country]}.")]


def total(draw: random.Random) -> list[Turn]:
    one = draw.randrange(6)
    other = draw.randrange(6)
    said = f"{NUMBERS[one]} plus {NUMBERS[other]}"
    return [(f"What is {said}?", f"{said[0].upper()}{said[1:]} is {NUMBERS[one + other]}.")]


def opposite(draw: random.Random) -> list[Turn]:
    word = draw.choice(list(OPPOSITES))
    return [(f"What is the opposite of {word}?", f"The opposite of {word} is {OPPOSITES[word]}.")]


def thanks(draw: random.Random) -> list[Turn]:
    return [draw.choice((("Thank you!", "You are welcome."), ("Goodbye!", "Goodbye! Have a nice day.")))]


def talk(draw: random.Random) -> dict[str, object]:
    """One to three topics."""
    topics = draw.sample((greeting, name, capital, total, opposite, thanks), draw.choice((1, 1, 2, 3)))
    turns = [turn for topic in topics for turn in topic(draw)]
    said = [pair for turn in turns for pair in zip(("user", "assistant"), turn, strict=True)]
    return {"messages": [{"role": role, "content": text} for role, text in said]}


# ---- English and German ----------------------------------------------------------------------------------------------

NOUNS = (  # English, German, its gender
    ("dog", "Hund", "m"), ("cat", "Katze", "f"), ("horse", "Pferd", "n"), ("child", "Kind", "n"), ("man", "Mann", "m"),
    ("woman", "Frau", "f"), ("bird", "Vogel", "m"), ("mouse", "Maus", "f"), ("house", "Haus", "n"), ("tree", "Baum", "m"),
    ("flower", "Blume", "f"), ("book", "Buch", "n"), ("garden", "Garten", "m"), ("teacher", "Lehrerin", "f"),
)  # fmt: skip
ADJECTIVES = (("small", "klein"), ("big", "groß"), ("old", "alt"), ("young", "jung"), ("red", "rot"), ("black", "schwarz"))
VERBS = (  # infinitive, third person, German
    ("see", "sees", "sieht"), ("find", "finds", "findet"), ("love", "loves", "liebt"), ("hear", "hears", "hört"),
    ("know", "knows", "kennt"), ("seek", "seeks", "sucht"), ("paint", "paints", "malt"),
)  # fmt: skip
ADVERBS = (("today", "heute"), ("often", "oft"), ("here", "hier"), ("now", "jetzt"))
# (article, ending of the adjective) by definiteness, case and gender
FORMS = {
    (True, "subject"): {"m": ("der", "e"), "f": ("die", "e"), "n": ("das", "e")},
    (True, "object"): {"m": ("den", "en"), "f": ("die", "e"), "n": ("das", "e")},
    (False, "subject"): {"m": ("ein", "er"), "f": ("eine", "e"), "n": ("ein", "es")},
    (False, "object"): {"m": ("einen", "en"), "f": ("eine", "e"), "n": ("ein", "es")},
}


def phrase(draw: random.Random, case: str) -> tuple[str, str]:
    """A noun with its article, and maybe an adjective, in both languages."""
    noun, german, gender = draw.choice(NOUNS)
    definite = draw.random() < 0.6
    article, ending = FORMS[definite, case][gender]
    adjective = draw.choice(ADJECTIVES) if draw.random() < 0.6 else None
    words = [adjective[0], noun] if adjective else [noun]
    first = "the" if definite else "an" if words[0] == "old" else "a"
    return " ".join([first, *words]), " ".join([article, *([adjective[1] + ending] if adjective else []), german])


def sentence(draw: random.Random) -> dict[str, str]:
    """A statement, one that begins with an adverb (the German verb stays second), or a question."""
    (subject, subjekt), (object_, objekt) = phrase(draw, "subject"), phrase(draw, "object")
    infinitive, verb, german = draw.choice(VERBS)
    kind = draw.choice(("plain", "adverb", "question"))
    if kind == "question":
        english, translated = f"does {subject} {infinitive} {object_}?", f"{german} {subjekt} {objekt}?"
    elif kind == "adverb":
        adverb, deutsch = draw.choice(ADVERBS)
        english, translated = f"{adverb} {subject} {verb} {object_}.", f"{deutsch} {german} {subjekt} {objekt}."
    else:
        english, translated = f"{subject} {verb} {object_}.", f"{subjekt} {german} {objekt}."
    return {"english": english, "german": translated}


# ---- files -----------------------------------------------------------------------------------------------------------


def conversations() -> list[dict[str, object]]:
    draw = random.Random(1)
    return [talk(draw) for _ in range(TALKS)]


def pairs() -> list[dict[str, str]]:
    """Each sentence once."""
    draw = random.Random(2)
    found: dict[str, dict[str, str]] = {}
    while len(found) < PAIRS:
        pair = sentence(draw)
        found.setdefault(pair["english"], pair)
    return list(found.values())


def trained(texts: Iterable[str], special: Sequence[str]) -> str:
    """A tokenizer.json: pairs of bytes that stand together most often become tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def files() -> dict[str, str]:
    """What each file of the data holds."""
    talks, sentences = conversations(), pairs()
    said = [message["content"] for talk in talks for message in talk["messages"]]  # type: ignore[union-attr, index]
    both = [text for pair in sentences for text in pair.values()]
    return {
        "conversations.jsonl": _lines(talks),
        "pairs.jsonl": _lines(sentences),
        "chat/tokenizer.json": trained(islice(said, 4000), (END, "<|user|>", "<|assistant|>", "<|system|>")),
        "chat/tokenizer_config.json": json.dumps({"eos_token": END}) + "\n",
        "chat/chat_template.jinja": TEMPLATE,
        "translate/tokenizer.json": trained(both, ("<|end|>", "<pad>")),
        "translate/tokenizer_config.json": json.dumps({"eos_token": END, "pad_token": "<pad>"}) + "\n",
    }


def _lines(records: Iterable[object]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main() -> None:
    for name, content in files().items():
        path = DATA / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
