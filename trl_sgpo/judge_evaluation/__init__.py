"""
How good a step-wise judge is, measured on solutions whose first wrong step is annotated:
`python -m trl_sgpo.scripts.judge_eval`. `data` reads the solutions, `asking` asks the judge and keeps its verdicts,
`metrics` scores them, `robustness` perturbs completions, `evaluation` puts the results together, `tables` and `plots`
show them.
"""
