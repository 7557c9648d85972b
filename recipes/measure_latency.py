"""Time every kind of layer at all choices, on the device at hand: `python recipes/measure_latency.py --config-name RUN
output=FILE key=value ...`.

Any config of recipes/train_elastic.py, of which elastic.deployment.latency=FILE then makes `latency_ms` and
`tokens_per_s` metrics of budgets. Reads no data and no weights.
"""

from recipes._start import start

if __name__ == "__main__":
    start("measure_latency")
