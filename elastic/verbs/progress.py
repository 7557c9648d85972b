"""The bar of the verbs that move weights from disk to disk."""

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


def transfer_progress(console: Console) -> Progress:
    """Return a bar that counts bytes, their speed and the time that remains."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
