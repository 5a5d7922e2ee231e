"""
Is the policy learning something new, or does it sharpen what its base could do already? A callback that measures it.

    callback.py   SharpeningCallback: when to probe, what is written and logged
    arguments.py  checks of the callback's arguments
    probe.py      sampling from the trainer's model without a trace in its training
    base.py       the base model of a run, and the cache of its samples
    scoring.py    outcome rewards and judge for the samples of a probe
    batches.py    metrics of the training batches
    compare.py    the samples of base and policy -> numbers (pure)
    log.py        these numbers -> one flat dictionary for the log

The report (`analysis/report/comparison.py`) shows the numbers of `compare.py` too. `compare.py`, `log.py`: no torch.
"""
