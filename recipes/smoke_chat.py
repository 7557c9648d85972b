"""What reasoning costs at each size: `make smoke-chat`, two CPU cores, about 9 minutes, no data downloaded.

Writes made-up conversations about arithmetic, trains a small parent on the assistant's thoughts and answers, trains one
nested family out of it, and lets every budget answer questions that no conversation asked; then small budgets think and
the full one answers, and the other way round. Leaves in runs/smoke_chat: summary.json, accuracy.png and every
intermediate folder. Stopped half-way, the same command goes on where it stopped.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from recipes._arithmetic_chats import held_out_problems, write_chats
from recipes._smoke_chat_report import answer_row, draw_accuracy, summary_table
from recipes.smoke import Smoke, parse_command_line

NUM_CHATS = 20_000
NUM_PROBLEMS = 150
SEED = 1234
# A parent that learns to copy and to add in minutes: two pairs of a Mamba and an attention layer.
PARENT = (
    "model.pattern=M*-M*-",
    "model.hidden=128",
    "model.ffn=384",
    "model.mamba_heads=16",
    "model.head_channels=16",
    "model.mamba_state=16",
    "model.kv_heads=2",
    "model.attention_channels=16",
    "curriculum.0.sequence_length=128",
    "curriculum.0.global_batch=16",
    "curriculum.0.steps=1200",
    "curriculum.0.lr.peak=5e-3",
    "data.micro_batch=8",
    "trainer.val_check_interval=200",
)
FAMILY = (
    "elastic.router.budget_loss_weight=3",  # small models lose much by each cut, as in conf/smoke_elastic.yaml
    "elastic.router.start=uniform",  # as published
    "elastic.budgets.2.tolerance=0.02",  # in a space this coarse, what is within 1% answers worse (docs/method.md 1.3)
    "curriculum.0.sequence_length=128",
    "curriculum.0.steps=450",
    "curriculum.1.sequence_length=128",
    "curriculum.1.steps=250",
    "data.micro_batch=2",
    "trainer.val_check_interval=100",
)
# Who writes: one budget, or one that thinks and another that answers.
WRITERS = {
    "full": ("budget=full",),
    "medium": ("budget=medium",),
    "small": ("budget=small",),
    "small, full": ("think=small", "answer=full"),
    "full, small": ("think=full", "answer=small"),
}


def chain(smoke: Smoke) -> dict[str, Any]:
    """Run every verb and return the summary."""
    folder, data = smoke.folder, smoke.folder / "data"
    if not (folder / ".data.done").exists():
        write_chats(folder / "chats", NUM_CHATS, SEED)
        questions = [json.dumps({"messages": problem.turns()[:1]}) for problem in held_out_problems(NUM_PROBLEMS, SEED)]
        (folder / "questions.jsonl").write_text("\n".join(questions) + "\n")
    source = [f"paths=[{folder / 'chats' / 'chats.jsonl'}]", f"tokenizer_path={folder / 'chats' / 'tokenizer'}"]
    chats = ["document_format=chat", "loss_on=response", *source, f"output_dir={data}"]
    smoke.run("prepare_data", "data", chats, threads=2)
    from_data = f"data.path={data}"
    parent = smoke.run("pretrain_parent", "parent", [from_data, *PARENT, *smoke.into("parent")], distributed=True)
    from_parent = [from_data, "importance.sequence_length=128", f"init_from.parent={parent}"]
    ranking = [*from_parent, "importance.method=activations", *smoke.into("permuted")]
    permuted = smoke.run("estimate_importance", "permuted", ranking, threads=smoke.processes)
    from_permuted = [from_data, f"init_from.permuted_parent={permuted}"]
    family = smoke.run("train_elastic", "family", [*from_permuted, *FAMILY, *smoke.into("family")], distributed=True)

    def answers(name: str, how: tuple[str, ...]) -> dict[str, Any]:
        file = folder / f"answers_{name.replace(', ', '_').replace(' ', '_')}.json"
        given = [f"init_from.checkpoint={family}", f"chat_file={folder / 'questions.jsonl'}", "max_new_tokens=64"]
        given += ["max_think_tokens=64", f"output={file}", "overwrite=true", *how]
        smoke.run("generate", file.stem, given, log=file.with_suffix(".log"))
        return answer_row(name, json.loads(file.read_text())["texts"], held_out_problems(NUM_PROBLEMS, SEED))

    with ThreadPoolExecutor(smoke.processes) as pool:
        rows = list(pool.map(answers, WRITERS, WRITERS.values()))
    return {"num_problems": NUM_PROBLEMS, "members": rows, "seconds": smoke.seconds()}


def main() -> None:
    """Parse the command line, run the chain, report."""
    smoke = parse_command_line(__doc__.splitlines()[0], "smoke_chat")
    summary, folder = chain(smoke), smoke.folder
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw_accuracy(summary, folder / "accuracy.png")
    smoke.console.print(summary_table(summary))
    smoke.console.print(f"summary: {folder / 'summary.json'}   picture: {folder / 'accuracy.png'}")


if __name__ == "__main__":
    main()
