"""Training batches of a curriculum: every phase reads the stream at its own length and in its own order."""

from elastic.data.stream import Batch, PackedSequences, TokenStream, read_batch
from elastic.router.phases import Curriculum, Moment
from elastic.world.groups import World


class PhaseData:
    """This replica's micro-batches at any step of the curriculum: a pure function of (seed, step)."""

    def __init__(
        self, stream: TokenStream, curriculum: Curriculum, *, micro_batch_size: int, seed: int, world: World
    ) -> None:
        self.micro_batch_size, self.world = micro_batch_size, world
        self.datasets = [
            PackedSequences(stream, phase.sequence_length, seed, salt=index)
            for index, phase in enumerate(curriculum.phases)
        ]

    def batches(self, moment: Moment) -> list[Batch]:
        """Return the micro-batches of one step, in the order they run."""
        replicas = self.world.data_size
        count = moment.phase.global_batch // (self.micro_batch_size * replicas)
        return [
            read_batch(
                self.datasets[moment.phase_index],
                consumed_samples=moment.consumed_samples,
                micro_batch_index=index,
                data_parallel_rank=self.world.data_rank,
                data_parallel_size=replicas,
                micro_batch_size=self.micro_batch_size,
            )
            for index in range(count)
        ]
