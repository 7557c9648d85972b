"""A question of the study as conf/study/ asks it: arms, each a chain of verbs, and the steps these chains share."""

import difflib
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from elastic.config.load import ConfigError, Problem

BASE = "base"
HERE = "@/"  # stands for the folder of all steps, wherever it is: a step is the same one in another
# {seed}, {texts}, {rate}, {rate*0.5}, or an earlier step of the chain, for its folder.
PLACE = re.compile(r"\{([a-z_]+)(?::(\w+))?(?:\*([\d.]+))?\}")
KEYS = {"like", "question", "compare_with", "answer", "limits", "corpora", "rates", "token_ratio", "verbs", "arms"}


@dataclass(frozen=True)
class Step:
    """One verb with its overrides; `name`, its folder, follows from them and from what it reads."""

    verb: str
    name: str
    overrides: tuple[str, ...]

    def arguments(self, folder: Path) -> list[str]:
        """Return the overrides with the steps they name where `folder` has them."""
        return [override.replace(HERE, f"{folder}/") for override in self.overrides]


@dataclass(frozen=True)
class Arm:
    """One way of doing it: verbs one after another (`verb:tag` where a verb stands twice) and their overrides.

    `member` is the budget that a model without a router stands for; `rate_of` the arm whose learning rate serves this
    one, too (itself: it has its own search).
    """

    name: str
    chain: tuple[str, ...]
    overrides: Mapping[str, Mapping[str, Any]]
    rate_of: str
    member: str | None = None

    @cached_property
    def has_rate(self) -> bool:
        """Tell whether there is a learning rate to search."""
        return any("{rate" in str(value) for link in self.chain for value in self.overrides[link].values())

    def steps(self, corpus: Mapping[str, Any], seed: int, rate: float) -> list[Step]:
        """Return the chain's steps on a corpus, which adds overrides to prepare_data's."""
        steps: list[Step] = []
        known: dict[str, str] = {}
        for link in self.chain:
            verb = link.partition(":")[0]
            values = dict(self.overrides[link]) | (dict(corpus) if verb == "prepare_data" else {})
            filled = tuple(f"{key}={_filled(value, known, seed, rate)}" for key, value in values.items())
            name = f"{verb}-{hashlib.sha256(json.dumps([verb, *filled]).encode()).hexdigest()[:10]}"
            steps.append(Step(verb, name, filled))
            known[link] = HERE + name
        return steps


@dataclass(frozen=True)
class Question:
    """What is asked, of which corpora, with which learning rates to search, and the arms that answer it.

    `answer` is what somebody has read in the tables, `limits` what they do not show.
    """

    name: str
    text: str
    compare_with: str
    answer: str | None
    limits: str
    corpora: Mapping[str, Mapping[str, Any]]
    rates: tuple[float, ...]
    token_ratio: str | None
    arms: Mapping[str, Arm]
    # All arms, and the corpus rates are searched on, also of a question that is asked of some alone.
    searching: Mapping[str, Arm]
    searched_on: Mapping[str, Any]

    def only(self, corpora: Sequence[str] | None, arms: Sequence[str] | None) -> "Question":
        """Return the question with these corpora and arms alone (None: all); raises ConfigError for others."""
        problems = [*_unknown("--corpora", corpora or (), self.corpora), *_unknown("--arms", arms or (), self.arms)]
        if problems:
            raise ConfigError(problems)
        kept = {name: self.corpora[name] for name in corpora or self.corpora}
        return replace(self, corpora=kept, arms={name: self.arms[name] for name in arms or self.arms})


def _filled(value: Any, known: Mapping[str, str], seed: int, rate: float) -> str:
    """Write a value as an override does, its places filled."""

    def fill(place: re.Match[str]) -> str:
        word, tag, share = place.groups()
        if word == "rate":
            return f"{rate * float(share or 1):.6g}"
        return {"seed": str(seed), "texts": f"{HERE}texts"}.get(word) or known[f"{word}:{tag}" if tag else word]

    return PLACE.sub(fill, value) if isinstance(value, str) else json.dumps(value)


def question_names(conf: Path) -> list[str]:
    """List the questions there are."""
    return sorted(file.stem for file in conf.glob("*.yaml") if file.stem != BASE)


def read_question(name: str, conf: Path) -> Question:
    """Read conf/study/NAME.yaml over base.yaml, which all questions share; raises ConfigError.

    A question `like` another one asks it again: all but its answer is the other's unless stated, arms one by one.
    """
    base, own = _read(BASE, conf), _read(name, conf, "question")
    if "like" in own:
        other = _read(own["like"], conf, f"{name}.like")
        if "like" in other or own["like"] == name:
            rule, first = "is like another question itself", other["like"]
            raise ConfigError([Problem(f"{name}.like", own["like"], rule, f"name that one: {first}")])
        arms = {**other.get("arms", {}), **own.get("arms", {})}
        own = {**{key: value for key, value in other.items() if key != "answer"}, **own, "arms": arms}
    if problems := list(_problems(name, base, own)):
        raise ConfigError(problems)
    arms = {}
    for arm, given in own["arms"].items():
        chain = tuple(given.get("chain", base["chain"]))
        layers = (base["verbs"], own.get("verbs", {}), given)
        overrides = {}
        for link in chain:  # a verb that stands twice begins with what the first has
            keys = dict.fromkeys((link.partition(":")[0], link))
            overrides[link] = {k: v for layer in layers for key in keys for k, v in layer.get(key, {}).items()}
        arms[arm] = Arm(arm, chain, overrides, given.get("rate_of", arm), given.get("member"))
    return Question(
        name=name,
        text=own["question"],
        compare_with=own["compare_with"],
        answer=own.get("answer"),
        limits=own["limits"],
        corpora={corpus: base["corpora"][corpus] for corpus in own["corpora"]},
        rates=tuple(own.get("rates", base["rates"])),
        token_ratio=own.get("token_ratio"),
        arms=arms,
        searching=arms,
        searched_on=base["corpora"][own["corpora"][0]],
    )


def _read(name: str, conf: Path, field: str = "") -> dict[str, Any]:
    """Read a file of the questions' folder, base.yaml for no field; raises ConfigError where it is none or no YAML."""
    if field and name not in question_names(conf):
        near = difflib.get_close_matches(str(name), question_names(conf), n=1, cutoff=0.0)
        rule = f"is no file of {conf}, which has {', '.join(question_names(conf))}"
        raise ConfigError([Problem(field, name, rule, f"nearest is {near[0] if near else 'none'}")])
    file, content, rule = conf / f"{name}.yaml", None, "holds no keys and values"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        rule = f"is no YAML: {' '.join(str(error).split())}"
    arms = content.get("arms", {}) if isinstance(content, dict) else None
    if (
        not isinstance(content, dict)
        or not isinstance(arms, dict)
        or not all(isinstance(a, dict) for a in arms.values())
    ):
        rule = rule if arms is None else "has arms that are not names with overrides of verbs"
        raise ConfigError([Problem(name, str(file), rule, "write it as the other files there")])
    return content


def _problems(name: str, base: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with a question's file: keys nobody reads, arms and steps that are not there."""
    missing = {"question", "compare_with", "limits", "corpora", "arms"} - own.keys()
    for key in sorted(missing):
        yield Problem(f"{name}.{key}", None, "every question has one", "add it")
    yield from _unknown(name, own, KEYS)
    if missing:
        return
    for field, given, known in (
        ("corpora", own["corpora"], base["corpora"]),
        ("compare_with", [own["compare_with"]], own["arms"]),
        ("token_ratio", [own["token_ratio"]] if own.get("token_ratio") else [], own["arms"]),
    ):
        yield from _unknown(f"{name}.{field}", given, known)
    for arm, given in own["arms"].items():
        chain = given.get("chain", base["chain"])
        yield from _unknown(f"{name}.arms.{arm}", given, {"chain", "member", "rate_of", *chain})
        yield from _unknown(f"{name}.arms.{arm}.rate_of", [given["rate_of"]] if "rate_of" in given else [], own["arms"])
        yield from _unknown(f"{name}.arms.{arm}.chain", [link.partition(":")[0] for link in chain], base["verbs"])
        for position, link in enumerate(chain):
            values = {**base["verbs"].get(link.partition(":")[0], {}), **own.get("verbs", {}).get(link, {})}
            values |= given.get(link, {})
            places = PLACE.findall(" ".join(map(str, values.values())))
            named = dict.fromkeys(f"{word}:{tag}" if tag else word for word, tag, _ in places)
            yield from _unknown(f"{name}.arms.{arm}.{link}", named, {"seed", "rate", "texts", *chain[:position]})


def _unknown(field: str, given: Iterable[str], known: Collection[str]) -> Iterator[Problem]:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
            yield Problem(field, key, f"is none of {', '.join(known)}", f"did you mean {near[0] if near else '?'}?")
