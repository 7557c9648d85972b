"""Open what `data.path` or `data.blend` names: tokens by source, samples of every phase, what is held out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from elastic.blend.foreign import ForeignStream, foreign_prefixes, is_prepared, tokenizer_record
from elastic.blend.shares import Carried, Mix, Shares
from elastic.config.load import Problem, Problems
from elastic.config.sections import BlendSource, PreparedData
from elastic.data.held_out import HeldOut
from elastic.data.manifest import DataError, TokenizerRecord, holds_chats, read_manifest
from elastic.data.order import mixed_seed
from elastic.data.stream import Row, Samples, samples_of
from elastic.data.tokenizer import TOKENIZER_JSON, same_tokenizer
from elastic.data.tokens import TokenStream, open_split
from elastic.router.phases import Curriculum, Phase


def is_foreign(source: BlendSource) -> bool:
    """Tell whether a source is another tool's."""
    return not is_prepared(Path(source.path)) and bool(foreign_prefixes(Path(source.path)))


def tokenizer_folder(data: PreparedData) -> Path:
    """Return the folder that holds the tokenizer of all the data: one of chats, whose template lies beside it, else
    another prepared one, else what foreign pairs name.
    """
    if not data.blend:
        return Path(data.path)
    prepared = [source.path for source in data.blend if not is_foreign(source)]
    prepared.sort(key=lambda path: not holds_chats(Path(path)))
    named = [source.tokenizer for source in data.blend if source.tokenizer] + [data.tokenizer or ""]
    return Path((prepared or named)[0])


def blend_problems(data: PreparedData) -> Problems:
    """Yield what keeps the sources of a blend from being read together; looks at their settings, not at all bytes."""
    run = tokenizer_folder(data) if data.blend else Path()
    if data.tokenizer and not any(is_foreign(source) and not source.tokenizer for source in data.blend):
        rule = "is for .bin/.idx in data.blend that name none themselves, and there are none"
        yield Problem("data.tokenizer", data.tokenizer, rule, "leave it out")
    for index, source in enumerate(data.blend):
        field, path, named = f"data.blend.{index}", Path(source.path), source.tokenizer or data.tokenizer
        if not is_foreign(source):
            for name in ("tokenizer", "validation"):
                if (value := getattr(source, name)) is not None:
                    rule = "is for what another tool wrote, and a prepared folder holds its own"
                    yield Problem(f"{field}.{name}", value, rule, "leave it out")
        elif is_prepared(path.parent):
            rule = "is a part of a prepared folder, whose loss mask and held-out text would not be read"
            yield Problem(f"{field}.path", source.path, rule, f"give the folder {path.parent}, without tokenizer")
            continue
        elif not named:
            rule = "is missing, and .bin/.idx do not say whose token ids they hold"
            yield Problem(f"{field}.tokenizer", None, rule, "name the folder of the tokenizer that made them")
            continue
        elif not (Path(named) / TOKENIZER_JSON).is_file():
            yield Problem(f"{field}.tokenizer", named, f"holds no {TOKENIZER_JSON}", "name the folder of a tokenizer")
            continue
        own = path if not is_foreign(source) else Path(named or "")
        try:
            record = tokenizer_record(own)
            if record.sha256 != tokenizer_record(run).sha256 and not same_tokenizer(own, run):
                rule = f"is of another tokenizer ({own}) than the run ({run})"
                yield Problem(f"{field}.path", source.path, rule, "prepare the text anew, or take the source out")
            elif is_foreign(source):
                for name in (source.path, *([source.validation] if source.validation else [])):
                    ForeignStream(Path(name), record)
        except DataError as error:
            yield Problem(f"{field}.path", source.path, str(error), "or take the source out")


def open_sources(data: PreparedData, split: str) -> dict[str, TokenStream]:
    """Open a split of every source that has it, by the name of the source; of data.path alone, by the path.

    Raises DataError for damage, and where none has the split.
    """
    if not data.blend:
        return {data.path: open_split(data, split)}
    found: dict[str, TokenStream] = {}
    for name, source in sorted(zip(data.names, data.blend, strict=True), key=lambda pair: pair[0]):
        path = {"train": source.path, "validation": source.validation}.get(split)
        if is_foreign(source):
            if path:
                tokenizer = tokenizer_record(Path(source.tokenizer or data.tokenizer or ""))
                found[name] = ForeignStream(Path(path), tokenizer, data.packing, data.long_documents)
        elif split in read_manifest(Path(source.path)).splits:
            found[name] = open_split(replace(data, path=source.path), split)
    if not found:
        named = ", or name data.blend.0.validation" if split == "validation" else ""
        remedy = f"prepare with a {split}_ratio{named}"
        raise DataError(f"data.blend: no source has a {split} split; {remedy}")
    return found


def open_held_out(data: PreparedData, streams: Mapping[str, TokenStream], sequence_length: int) -> HeldOut:
    """Return the held-out sequences of what `open_sources` opened."""
    parts = {name: HeldOut(stream, sequence_length) for name, stream in streams.items()}
    return BlendedHeldOut(parts, data.weights()) if data.blend else parts[data.path]


class Blended:
    """The samples of several sources: sample n is the next one of the source whose turn it is (shares.py)."""

    def __init__(self, sources: Mapping[str, Samples], mix: Mix, phase: int) -> None:
        """Take all sources of the run, also those that the phase does not read: their numbers are the run's."""
        self.sequence_length = next(iter(sources.values())).sequence_length
        self._sources, self._numbers = sources, {name: number for number, name in enumerate(sources)}
        self._start, self._before = mix.start(phase)
        self._names, self._shares = mix.shares(phase)
        self.is_masked = any(sources[name].is_masked for name in self._names)

    def __len__(self) -> int:
        """Return the samples of one epoch of every source that is read."""
        return sum(len(self._sources[name]) for name in self._names)

    def __str__(self) -> str:
        parts = zip(self._names, self._shares.parts, strict=True)
        return "; ".join(f"{part / self._shares.whole:.2%} {name}, {self._sources[name]}" for name, part in parts)

    def row(self, sample_index: int) -> Row:
        """Return the sequence of a sample of the phase, and the number of its source."""
        name, index = self._at(sample_index)
        return replace(self._sources[name].row(index), source=self._numbers[name])

    def filled(self, sample_index: int) -> int | None:
        """Return how many places of a sample's sequence its packed documents fill; None: nothing is packed."""
        name, index = self._at(sample_index)
        return self._sources[name].filled(index)

    def _at(self, sample_index: int) -> tuple[str, int]:
        """Return the source of a sample of the phase, and its number among the source's."""
        source, index = self._shares.at(sample_index - self._start)
        name = self._names[source]
        return name, self._before.get(name, 0) + index


class BlendedHeldOut(HeldOut):
    """The held-out sequences of several sources, in the shares of a blend, at least one of each; by name."""

    def __init__(self, parts: Mapping[str, HeldOut], weights: Mapping[str, float]) -> None:
        self.parts = {name: part for name, part in parts.items() if len(part)}
        self.weights = [weights[name] for name in self.parts]

    def __len__(self) -> int:
        """Return how many sequences there are."""
        return sum(map(len, self.parts.values()))

    def spread(self, num_sequences: int) -> dict[str, list[int]]:
        """Return which sequences, by source, as `row` takes them: `num_sequences` as far as a source has its share."""
        if not self.parts:
            raise DataError("data.blend: no held-out split has a sequence; prepare with a larger validation_ratio")
        chosen = {}
        counts = zip(self.parts.items(), Shares(self.weights).counts(num_sequences), strict=True)
        for number, ((name, part), count) in enumerate(counts):
            places = part.spread(min(max(1, count), len(part))).values()
            chosen[name] = [place * len(self.parts) + number for of_one in places for place in of_one]
        return chosen

    def row(self, place: int) -> Row:
        """Return a sequence."""
        place, number = divmod(place, len(self.parts))
        return list(self.parts.values())[number].row(place)


class TrainingData:
    """What a run trains on: the samples of every phase, and how far each source has been read at any step."""

    def __init__(self, data: PreparedData, phases: Sequence[Phase], seed: int) -> None:
        """Open the training splits; raises DataError."""
        self.data, self.curriculum, self.streams = data, Curriculum(phases), open_sources(data, "train")
        seeds = {name: mixed_seed(seed, *name.encode()) if data.blend else seed for name in self.streams}
        self.by_source: list[dict[str, Samples]] = [
            {
                name: samples_of(stream, phase.sequence_length, seeds[name], number)
                for name, stream in self.streams.items()
            }
            for number, phase in enumerate(phases)
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of a blend's sources in the order of their numbers; none without a blend."""
        return tuple(self.streams) if self.data.blend else ()

    @property
    def tokenizer(self) -> TokenizerRecord:
        """Return the tokenizer of all sources."""
        return tokenizer_record(tokenizer_folder(self.data))

    @property
    def in_words(self) -> str:
        """Say how sequences are made of the documents."""
        words = {stream.in_words for stream in self.streams.values()}
        named = (f"{name} {stream.in_words}" for name, stream in self.streams.items())
        return words.pop() if len(words) == 1 else "; ".join(named)

    def samples(self, carried: Carried | None = None) -> list[Samples]:
        """Return what each phase reads, of a run that `carried` says where it changed its weights."""
        if not self.data.blend:
            return [of_phase[self.data.path] for of_phase in self.by_source]
        mix = self.mix(carried)
        return [Blended(of_phase, mix, number) for number, of_phase in enumerate(self.by_source)]

    def epochs(self, step: int, carried: Carried | None = None) -> dict[str, float]:
        """Return how often each source has been read through before a step, by name, or by the path without a blend."""
        phases = self.curriculum.phases
        lengths, num_samples = self._lengths()
        last = step >= self.curriculum.total_steps
        moment = None if last else self.curriculum.at(step)
        place = (len(phases) - 1, num_samples[-1]) if moment is None else (moment.phase_index, moment.consumed_samples)
        return self.mix(carried).epochs(lengths, num_samples, *place)

    def carried(self, then: PreparedData, phases: Sequence[Phase], before: Carried | None, step: int) -> Carried | None:
        """Return where a run that goes on at `step` stands in its sources, given its config and `before` until then.

        Where its weights are what they were, that is `before`.
        """
        if not self.data.blend and not then.blend:
            return before
        if step >= self.curriculum.total_steps:
            return before
        old, new = run_mix(then, phases, before), self.mix()
        moment = self.curriculum.at(step)
        phase, sample = moment.phase_index, moment.consumed_samples
        if all(old.parts(number) == new.parts(number) for number in range(min(phase + 1, len(old.weights)))):
            return before
        num_samples = self._lengths()[1]
        read = old.read(num_samples, phase - 1, num_samples[phase - 1]) if phase else []
        if phase < len(old.weights) and old.parts(phase) == new.parts(phase):  # only phases before differ
            return Carried(phase, *old.start(phase), read)
        return Carried(phase, sample, old.consumed(phase, sample) if sample else {}, read)

    def _lengths(self) -> tuple[list[dict[str, int]], list[int]]:
        """Return, phase by phase, the samples of an epoch of each source, and those of the whole phase."""
        lengths = [{name: len(samples) for name, samples in of_phase.items()} for of_phase in self.by_source]
        return lengths, [phase.num_steps * phase.global_batch for phase in self.curriculum.phases]

    def checksums(self) -> dict[str, Mapping[str, str]]:
        """Return the checksums of the tokenizer and of every split's files, by what a problem would call them."""
        found: dict[str, Mapping[str, str]] = {}
        for name, stream in self.streams.items():
            field = f"data.blend {name}" if self.data.blend else "data.path"
            if isinstance(stream, ForeignStream):
                found[f"{field} (train split)"] = stream.checksums()
                continue
            for split, record in stream.manifest.splits.items():
                found[f"{field} ({split} split)"] = {file: one.sha256 for file, one in record.files.items()}
        return found

    def end_problems(self, num_steps: int, carried: Carried | None = None) -> Problems:
        """Yield a problem for every source that is to be read once and would be read more often in so many steps."""
        epochs, default = self.epochs(num_steps, carried), self.data.on_end
        told = {name: source.on_end or default for name, source in zip(self.data.names, self.data.blend, strict=True)}
        for index, (name, on_end) in enumerate((told or {self.data.path: default}).items()):
            if on_end == "stop" and epochs[name] > 1:
                field = f"data.blend.{index}.on_end" if told else "data.on_end"
                rule = f"the {num_steps:,} steps would read {name} {epochs[name]:.2f} times"
                what = "lower its weight, " if told else ""
                yield Problem(field, "stop", rule, f"{what}train fewer tokens, add text, or set repeat")

    def mix(self, carried: Carried | None = None) -> Mix:
        """Return which source each sample comes from."""
        return run_mix(self.data, self.curriculum.phases, carried)


def packings(words: str, names: Sequence[str]) -> dict[str, str]:
    """Read what `TrainingData.in_words` says of each source; without a blend, under no name."""
    parts = words.split("; ")
    return {name: next((part[len(name) + 1 :] for part in parts if part.startswith(f"{name} ")), words)
            for name in names or ("",)}  # fmt: skip


def run_mix(data: PreparedData, phases: Sequence[Phase], carried: Carried | None) -> Mix:
    """Return which source each sample of a run comes from."""
    weights = [data.weights(phase.blend_weights) if data.blend else {data.path: 1.0} for phase in phases]
    return Mix(weights, carried or Carried())
