"""
The report of finished or running runs: from their folders to one page.

    runs.py           a folder -> its log, its completions, its probes, and what is missing
    completions.py    the completions' parquet files -> rows, without their texts
    answers.py        a completion -> its answer
    logged_groups.py  rows -> groups, and what became of each group
    comparison.py     the samples of base and policy -> pass@k, support, tilt
    finding.py        these numbers -> a finding in words: sharpened or expanded
    diagnosis.py      groups and log -> why the run learns little or much, and what to change
    summary.py        all of it -> the dictionary that is summary.json
    tables.py         the dictionary -> tables
    plots.py          the dictionary -> pictures
    glossary.py       what each number means, and when it misleads
    page.py           dictionary and pictures -> the HTML page

Everything after `runs.py` and `comparison.py` works on numbers, and everything after `summary.py` works on its
dictionary only.
"""
