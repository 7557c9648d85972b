"""Tasks of our own for lm-eval, with local data: choices, whole texts, and texts that are written."""

import json
import random
from pathlib import Path

WORDS = ("the", "small", "large", "model", "layer", "head", "learns", "forgets", "keeps", "width", "of", "and")
TASKS = ("made_choices", "made_letters", "made_last", "made_texts", "made_answers")
COMMON = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
BODIES = {
    "made_choices": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
num_fewshot: 2
fewshot_split: test
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "made_letters": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: ["A", "B", "C", "D"]
target_delimiter: ""
metric_list:
  - metric: acc
""",
    "made_last": """output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[0]}}"
metric_list:
  - metric: acc
  - metric: perplexity
""",
    "made_texts": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "made_answers": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{target}}"
generation_kwargs:
  until: ["e"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
}


def write_tasks(folder: Path, count: int = 24) -> Path:
    """Write the tasks of TASKS, with `count` questions each, into a folder for include_path."""
    draw = random.Random(3)
    folder.mkdir(parents=True, exist_ok=True)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    rows = [
        {
            "question": words(2, 14),
            "choices": [f"{words(1, 4)}{end}" for end in ("", ".", "!", "?")],
            "answer": draw.randrange(4),
            "text": words(3, 60),
            "target": "",
        }
        for _ in range(count)
    ]
    (folder / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in BODIES.items():
        text = COMMON.format(name=name, data=folder / "made.jsonl") + body
        (folder / f"{name}.yaml").write_text(text + "metadata:\n  version: 1.0\n")
    return folder
