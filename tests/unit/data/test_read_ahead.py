"""Reading a step ahead: the same batches in any order of steps, on a thread, and its errors in the loop."""

import threading

import pytest
import torch

from elastic.data.read_ahead import ReadAhead
from elastic.data.stream import Batch
from elastic.router.phases import Curriculum, Phase

CURRICULUM = Curriculum([Phase(name="one", steps=3), Phase(name="two", steps=3)])


class Reads:
    """A source that notes what it is asked for, and on which thread."""

    def __init__(self, fails_at=None):
        self.fails_at, self.steps, self.threads, self.done = fails_at, [], [], threading.Semaphore(0)

    def __call__(self, moment):
        self.steps.append(moment.step)
        self.threads.append(threading.current_thread())
        self.done.release()
        if moment.step == self.fails_at:
            raise OSError(f"the disk of step {moment.step} is gone")
        return [Batch(*(torch.full((2,), moment.step * 10 + part) for part in range(3)))]


def first_tokens(reader, steps):
    return [int(reader.batches(CURRICULUM.at(step))[0].tokens[0]) for step in steps]


def test_each_step_gets_its_own_batches_across_phases_and_nothing_is_read_beyond_the_end():
    reads = Reads()
    with ReadAhead(reads, CURRICULUM, 5) as reader:
        assert first_tokens(reader, range(5)) == [0, 10, 20, 30, 40]
    assert reads.steps == list(range(5)), "each step once, and not the one after the last"


def test_a_step_that_was_not_expected_is_read_for_itself():
    reads = Reads()
    with ReadAhead(reads, CURRICULUM, 6) as reader:
        assert first_tokens(reader, [3, 1, 2, 2, 5]) == [30, 10, 20, 20, 50]


def test_the_next_step_is_read_on_another_thread_while_this_one_is_computed():
    reads = Reads()
    with ReadAhead(reads, CURRICULUM, 6) as reader:
        reader.batches(CURRICULUM.at(0))
        assert all(reads.done.acquire(timeout=30) for _ in range(2)), "without being asked for step 1"
        assert reads.steps == [0, 1] and reads.threads[1] is not threading.current_thread()
    assert not reads.threads[1].is_alive(), "the thread ends with the block"


def test_an_error_comes_at_its_step_with_its_message():
    with ReadAhead(Reads(fails_at=2), CURRICULUM, 6) as reader:
        assert first_tokens(reader, [0, 1]) == [0, 10]
        with pytest.raises(OSError, match="the disk of step 2 is gone"):
            reader.batches(CURRICULUM.at(2))
    with ReadAhead(Reads(fails_at=2), CURRICULUM, 6) as reader:
        reader.batches(CURRICULUM.at(1))  # a run that ends here never hears of what it did not need
