"""Deal a corpus over shards: each a prepared folder of its own, all of them together one."""

import re
from dataclasses import dataclass
from pathlib import Path

MOST_SHARDS = 99_999
_NAME = re.compile(r"shard_(\d{5})_of_(\d{5})")


@dataclass(frozen=True)
class Shard:
    """The `number`-th, from 1, of `of` equal shares of a corpus, which follow each other in its order."""

    number: int = 1
    of: int = 1

    @property
    def folder_name(self) -> str:
        """Return the name of its folder, within the folder of all shards."""
        return f"shard_{self.number:05}_of_{self.of:05}"

    def share(self, first: int, size_bytes: int, total_bytes: int, *, is_cut: bool) -> tuple[int, int] | None:
        """Return which bytes (from, to before) of a file are this shard's, None if there are none.

        The file begins at byte `first` of all `total_bytes`. One that `is_cut` is dealt by bytes: its lines belong to
        the shard in which they begin. Any other belongs to the shard in which it begins.
        """
        if self.of == 1:
            return 0, size_bytes
        low, high = (total_bytes * number // self.of for number in (self.number - 1, self.number))
        if not is_cut or size_bytes == 0:
            is_mine = low <= first < high or (self.number == self.of and first >= total_bytes)
            return (0, size_bytes) if is_mine else None
        start, end = max(low - first, 0), min(high - first, size_bytes)
        return (start, end) if start < end else None


WHOLE = Shard()


def parse_shard(text: str) -> Shard | None:
    """Read `3/64`, the third of 64; None if it is not legal."""
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        return None
    return Shard(int(match[1]), int(match[2]))


def shards_in(folder: Path) -> dict[str, Shard]:
    """Return the shards that are in a folder, by their name and in order."""
    found = {match[0]: Shard(int(match[1]), int(match[2])) for match in map(_NAME.fullmatch, _names(folder)) if match}
    return dict(sorted(found.items(), key=lambda item: (item[1].of, item[1].number)))


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def shard_problem(folder: Path) -> str | None:
    """Say why the shards in a folder are not all of one corpus, None if they are, or there are none."""
    shards = list(shards_in(folder).values())
    if not shards:
        return None
    counts = sorted({shard.of for shard in shards})
    if len(counts) > 1:
        return f"holds shards of {' and of '.join(map(str, counts))}; move those away that do not belong together"
    missing = sorted(set(range(1, counts[0] + 1)) - {shard.number for shard in shards})
    if not missing:
        return None
    named = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return f"lacks shard {named} of {counts[0]}; prepare it with shard={missing[0]}/{counts[0]}"
