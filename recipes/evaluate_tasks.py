"""Score budgets on lm-eval's tasks: `python recipes/evaluate_tasks.py key=value ...`, conf/evaluate_tasks.yaml."""

from recipes._start import start

if __name__ == "__main__":
    start("evaluate_tasks")
