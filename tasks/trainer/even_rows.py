"""Several processes train on every row once an epoch, as one process does.

All processes must take equally many micro-batches. Where the rows do not divide, accelerate fills the last ones of an
epoch with rows from its beginning, at full weight. Here blanks fill them instead. A batch is collated without its
blanks, like the short last batch of one process. A batch of nothing but blanks becomes a blank batch: two tokens for
the model, so that its gradients, zeros, meet those of the other processes, and no row for the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.models.tokens import IGNORED

if TYPE_CHECKING:
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import DataLoader
    from transformers import Trainer

#: Key of a batch that has no row in it.
BLANK = "is_blank"

Row = dict[str, Any]
Batch = dict[str, Any]


def is_blank(batch: Any) -> bool:
    """Whether a batch holds no row, only tokens to run the model on."""
    return isinstance(batch, Mapping) and bool(batch.get(BLANK, False))


def num_blanks(trainer: Trainer) -> int:
    """Number of blanks at the end of an epoch; 0 with one process, whose last batch may be short."""
    num_processes = trainer.accelerator.num_processes
    if num_processes == 1:
        return 0
    return -len(trainer.train_dataset) % (trainer.args.train_batch_size * num_processes)


@dataclass(frozen=True)
class EvenSampler:
    """The indices of an epoch in the order of one process, then those of the blanks, which come after all rows."""

    shuffled: SeedableRandomSampler
    num_rows: int
    num_blanks: int

    def __iter__(self) -> Iterator[int]:
        yield from self.shuffled
        yield from range(self.num_rows, len(self))

    def __len__(self) -> int:
        return self.num_rows + self.num_blanks

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate, at the start of an epoch and after a resume."""
        self.shuffled.set_epoch(epoch)


@dataclass(frozen=True)
class EvenRows:
    """A dataset with blanks after its rows. A batch of indices gives its rows only, possibly none."""

    rows: Any
    num_blanks: int

    def __len__(self) -> int:
        # With the blanks: accelerate would cut what processes gather after an epoch that does not divide.
        return len(self.rows) + self.num_blanks

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        of_rows = [index for index in indices if index < len(self.rows)]
        rows: list[Row] = self.rows.__getitems__(of_rows) if of_rows else []
        return rows


@dataclass(frozen=True)
class BlankCollator:
    """A collator that makes a blank batch when it is given no rows."""

    collate: Callable[[Sequence[Row]], Batch]
    blank: Row

    def __call__(self, rows: Sequence[Row]) -> Batch:
        return self.collate(rows) if rows else {**self.collate([self.blank]), BLANK: True}


def blank_row(row: Row) -> Row:
    """A row that is cheap to run a model on: two tokens of everything, none of them supervised."""
    short = {name: value[:2] if isinstance(value, list) else value for name, value in row.items()}
    return short | {"labels": [IGNORED] * len(short["labels"])} if "labels" in short else short


def even_out(trainer: Trainer) -> None:
    """Fill the epochs of a trainer up with blanks. A trainer that needs none stays unchanged.

    The trainer's loss, counts and metrics must leave blank batches out: see `is_blank`.
    """
    if not num_blanks(trainer):
        return
    trainer.data_collator = BlankCollator(trainer.data_collator, blank_row(trainer.train_dataset[0]))

    def get_train_dataloader() -> DataLoader:
        from accelerate.data_loader import SeedableRandomSampler

        rows = EvenRows(trainer.train_dataset, num_blanks(trainer))
        loader = trainer._get_dataloader(
            rows, "Training", trainer.args.train_batch_size, trainer._get_train_sampler, is_training=True
        )
        # The sampler made for `rows` would shuffle the blanks among them. accelerate's own setter, because its loaders
        # hand the epoch on to this one only, after a resume too.
        shuffled = SeedableRandomSampler(range(len(rows.rows)), data_seed=loader.get_sampler().initial_seed)
        loader.set_sampler(EvenSampler(shuffled, len(rows.rows), rows.num_blanks))
        return loader

    trainer.get_train_dataloader = get_train_dataloader
