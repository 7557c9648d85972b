"""The verb prepare_data: text becomes a tokenizer and indexed train / validation sets; the work is data/prepare.py."""

from pathlib import Path

from rich.console import Console

from elastic.data.prepare import prepare, skip_lines
from elastic.data.prepare_config import PrepareConfig


def run_prepare(config: PrepareConfig, console: Console) -> Path:
    """Prepare the text, say what was done with it and what was passed over; returns the folder."""
    prepared = prepare(config)
    manifest, state = prepared.manifest, "already prepared" if prepared.already_prepared else "prepared"
    splits = ", ".join(f"{name} {split.num_tokens:,} tokens" for name, split in manifest.splits.items())
    lines = [f"{prepared.folder}: {state}, {manifest.num_documents:,} documents, {splits}"]
    if manifest.tokenizer.bos_ids and not config.is_chat:
        lines.append(f"every document begins with the tokenizer's own {list(manifest.tokenizer.bos_ids)}")
    if manifest.stopped_at_max_bytes:
        lines.append(f"stopped at max_bytes = {manifest.settings['max_bytes']:,}: there are more documents")
    for name, split in manifest.splits.items():
        if split.num_counted is not None:
            lines.append(f"{name}: the loss counts {split.num_counted:,} of its tokens ({config.counted_part})")
    lines += [f"remarked: {line}" for line in skip_lines(manifest.remarks)]
    lines += [f"skipped: {line}" for line in skip_lines(manifest.skipped) or ["nothing"]]
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)
    return Path(prepared.folder)
