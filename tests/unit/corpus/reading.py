"""Read a corpus in this process, as the first reading of a preparation does, without the rest of it."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from elastic.corpus.chosen import Chosen
from elastic.corpus.config import PrepareConfig
from elastic.corpus.documents import Document, parse_block
from elastic.corpus.files import Corpus, Tally
from elastic.corpus.workers import Work


def read_documents(corpus: Corpus, tally: Tally) -> Iterator[Document]:
    """Yield the documents that are taken, and count them and the others in `tally`."""
    config = PrepareConfig(**asdict(corpus))
    chosen, work = Chosen(config, 0, lambda num_bytes: None), Work(config, Path())
    chosen.tally = tally
    for block, num_probed, _ in chosen.first():
        chosen.add(work.scan(block, num_probed, None))
        documents = [found for found in parse_block(block, config) if isinstance(found, Document)]
        yield from (found for found, is_taken in zip(documents, chosen.wanted[-1].unpacked(), strict=True) if is_taken)
